"""A source's objects, selected and grouped into shards; tar reading and writing."""
