"""Optuna's database: opening it, retrying calls, a study's definition, and the lives of its trials."""
