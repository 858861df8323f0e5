"""The detector protocol and NMS."""
