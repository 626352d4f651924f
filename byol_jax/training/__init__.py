"""The training step, its state, optimizers and schedules."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax.training.optimizers import build_optimizer as build_optimizer
    from byol_jax.training.optimizers import decay_mask as decay_mask
    from byol_jax.training.optimizers import lars as lars
    from byol_jax.training.schedules import learning_rate_schedule as learning_rate_schedule
    from byol_jax.training.schedules import target_tau as target_tau
    from byol_jax.training.state import TrainState as TrainState
    from byol_jax.training.state import init_state as init_state
    from byol_jax.training.step import AXIS as AXIS
    from byol_jax.training.step import make_train_step as make_train_step
    from byol_jax.training.step import pmap_step as pmap_step
    from byol_jax.training.step import replicate as replicate
    from byol_jax.training.step import shard_batch as shard_batch

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'optimizers': ('build_optimizer', 'decay_mask', 'lars'),
        'schedules': ('learning_rate_schedule', 'target_tau'),
        'state': ('TrainState', 'init_state'),
        'step': ('AXIS', 'make_train_step', 'pmap_step', 'replicate', 'shard_batch'),
    },
)
