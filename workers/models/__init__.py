"""Which model a request means, and a detector of it."""
