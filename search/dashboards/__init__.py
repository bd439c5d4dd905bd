"""What MLflow's pages and optuna-dashboard show of a study, and who may open them."""
