"""The training step, the state it changes, optimizers and schedules."""
