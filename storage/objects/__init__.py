"""The contract: one Protocol per verb, and what works on any store."""
