"""What lives on a GPU: decode, letterbox, detect, write, and the Ray shell around it."""
