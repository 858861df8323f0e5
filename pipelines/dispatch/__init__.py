"""Which shard goes where, and what each event means."""
