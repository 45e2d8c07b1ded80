"""The cohort format and everything up to arrays: reading, checking, splitting, cutting into clients, caching."""
