"""Images from disk to pairs of uint8 views: sources, augment, stream, pipeline, device_views."""
