"""What a detector is, and NMS."""
