"""Label versions made and compared."""
