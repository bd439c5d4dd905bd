"""Optuna's database: opened, locked, retried; a study's definition and the lives of its trials."""
