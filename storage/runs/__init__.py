"""A run's record at its output: manifest, listings, commits, ledger, lock, live rows."""
