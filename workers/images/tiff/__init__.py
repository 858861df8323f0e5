"""TIFF: its tags, its directories and its pixels."""
