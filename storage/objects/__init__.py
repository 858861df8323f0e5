"""The object store contract: one Protocol per verb, and code that works on any store."""
