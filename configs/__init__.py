"""Configs of byol_jax: each file has a `get_config([arg])` that returns a ConfigDict."""
