"""Everything at rest: object stores, shards, annotation Parquet and the record of a run."""
