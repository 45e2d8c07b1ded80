"""Backbones: thin builders over libraries and published weights. Each turns an image into tokens."""
