"""Encoders that leave: the exported format and its loader."""
