"""The Ray shell: actor, pool, events, spot notices."""
