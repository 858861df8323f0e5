"""Label Studio: the only room that knows it."""
