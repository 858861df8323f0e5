"""Console, tables and bars, written once for all commands."""
