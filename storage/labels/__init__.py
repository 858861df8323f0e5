"""Label versions at rest: rows and lineage."""
