"""Checkpoint files, read without running them, and their cache."""
