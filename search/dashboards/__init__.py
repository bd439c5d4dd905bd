"""Notes and plots on optuna-dashboard, the two dashboards' servers, and access to them."""
