"""Bytes to upright pixels to network input."""
