-- Run once, when the volume is empty: a database and a role each for Optuna and MLflow, which must not share one.
-- The passwords come from the environment of psql, so that they stand in no file and no argument (psql 15 or newer).
\getenv optuna_password OPTUNA_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD
CREATE ROLE optuna LOGIN PASSWORD :'optuna_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE optuna OWNER optuna;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE optuna FROM PUBLIC;
REVOKE CONNECT ON DATABASE mlflow FROM PUBLIC;
