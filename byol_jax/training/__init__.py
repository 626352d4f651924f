"""The training run: loop, step, state and checkpoint."""
