"""omnifm: federated learning on heterogeneous medical images."""

__version__ = "0.1.0"
