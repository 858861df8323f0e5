"""The thread pipeline: a shard in, committed rows out."""
