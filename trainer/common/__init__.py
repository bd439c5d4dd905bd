"""Shared by all of the trainer: errors, whole files, the cache folder, the command line's frame, imports."""
