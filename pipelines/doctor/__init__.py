"""`labelfleet doctor`: what this machine, storage and model look like."""
