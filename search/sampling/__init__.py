"""What is tried next: a study's space, Optuna's samplers and the stages of `--strategy staged`."""
