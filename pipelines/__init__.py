"""The driver: what runs, in which order."""
