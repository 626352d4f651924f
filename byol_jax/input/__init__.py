"""Source -> batches of views for the training step."""
