"""`labelfleet train`."""
