"""How messages travel between server and clients."""
