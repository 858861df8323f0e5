"""Loss, data and the training loop."""
