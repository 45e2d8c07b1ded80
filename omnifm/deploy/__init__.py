"""A federation across machines: the server without data, the hospitals with theirs."""
