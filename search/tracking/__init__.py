"""MLflow: runs written, kept in an outbox while it is away, delivered, read back. Only this room imports it."""
