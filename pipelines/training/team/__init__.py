"""A training on several workers of a Ray cluster, who hears of it, and its output in a store."""
