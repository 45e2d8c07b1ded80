"""What federated learning is: rounds, clients, strategies, sharing, aggregation, evaluation."""
