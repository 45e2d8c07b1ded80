"""The spectral path: frequency embedding, knowledge bank, cross-attention, prefix and suffix, alignment; pure torch."""
