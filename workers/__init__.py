"""The worker: decode, letterbox, detect, write, and the Ray shell around it."""
