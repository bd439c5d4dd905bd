"""Hyperparameter search over LoRA fine-tunings: Optuna proposes, the trainer runs, MLflow records."""
