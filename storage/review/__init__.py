"""The review queue and the answers at rest."""
