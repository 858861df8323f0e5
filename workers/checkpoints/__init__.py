"""Checkpoint files, read without executing anything in them, and their cache."""
