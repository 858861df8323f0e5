"""A local page over a run's own Parquet and the source's images."""
