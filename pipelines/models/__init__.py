"""The model that a run loads: requested, resolved, compiled, measured."""
