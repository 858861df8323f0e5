"""The stores themselves, and what opens them; S3 has a room of its own."""
