"""Parquet read and written one way: checksums, footer JSON, append-only parts, errors."""
