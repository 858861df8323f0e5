"""Bytes at rest, and the one HTTP peer: stores, shards, annotation Parquet, the run's record."""
