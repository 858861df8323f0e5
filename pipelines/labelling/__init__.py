"""`labelfleet run` and `labelfleet plan`."""
