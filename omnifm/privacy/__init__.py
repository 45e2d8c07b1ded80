"""What keeps one client's contribution from whoever sees the sum of all: secure aggregation, differential privacy."""
