"""What a source holds: selected objects, grouped into shards; tars in and out."""
