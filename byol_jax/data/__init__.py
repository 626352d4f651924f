"""Images from disk to pairs of uint8 views: sources, augment, pipeline."""
