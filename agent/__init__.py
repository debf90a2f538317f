"""postgres-pitr: point-in-time recovery for PostgreSQL on Kubernetes."""
