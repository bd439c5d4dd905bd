"""What the terminal shows while a search runs, and when it ends."""
