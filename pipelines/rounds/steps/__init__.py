"""The steps of a round: what decides the result of each, and how it is taken."""
