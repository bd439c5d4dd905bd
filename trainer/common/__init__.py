"""What every room of the trainer uses: errors, files, the command line's frame, imports."""
