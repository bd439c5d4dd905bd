"""Worker processes, the supervisor that watches them, and one trial's life in a worker."""
