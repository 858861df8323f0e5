"""The recipe of a training: geometry, colour, mosaics, and what of the network learns how fast."""
