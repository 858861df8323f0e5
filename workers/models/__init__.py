"""Resolve a model request and load its detector."""
