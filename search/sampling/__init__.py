"""What is tried next: a trial's params, Optuna's samplers, and the stages of `--strategy staged`."""
