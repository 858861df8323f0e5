"""Review commands: push, pull, status."""
