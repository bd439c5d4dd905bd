"""What is tried next: a trial's params, and the samplers among which `--strategy` chooses."""
