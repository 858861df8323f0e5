"""Which images people should see."""
