"""Parquet as every room writes and opens it: checksums, footer JSON, append-only parts, errors."""
