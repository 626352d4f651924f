"""Encoders in and out: our own export format, and other libraries' files."""
