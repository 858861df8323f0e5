"""Label versions: made, compared, exported."""
