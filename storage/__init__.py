"""Bytes at rest: stores, shards, annotation Parquet, the record of a run."""
