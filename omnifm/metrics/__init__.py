"""Metrics whose states merge across clients exactly."""
