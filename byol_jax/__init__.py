"""BYOL (Bootstrap Your Own Latent, arXiv:2006.07733) for any Flax image encoder.

Names are imported when they are first used: an encoder loads without the packages of training.
"""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax import evaluation as evaluation
    from byol_jax import input as input
    from byol_jax import interop as interop
    from byol_jax import methods as methods
    from byol_jax import models as models
    from byol_jax import sources as sources
    from byol_jax import training as training
    from byol_jax import views as views
    from byol_jax.app.hooks import Event as Event
    from byol_jax.app.hooks import Hook as Hook
    from byol_jax.app.pretrain import Pretrained as Pretrained
    from byol_jax.app.pretrain import pretrain as pretrain
    from byol_jax.errors import UserError as UserError
    from byol_jax.input.pipeline import view_batches as view_batches
    from byol_jax.interop.encoder import Encoder as Encoder
    from byol_jax.interop.encoder import make_encoder as make_encoder
    from byol_jax.interop.export import load_encoder as load_encoder
    from byol_jax.interop.export import save_encoder as save_encoder
    from byol_jax.methods.base import Method as Method
    from byol_jax.methods.byol import Byol as Byol
    from byol_jax.models.heads import MLP as MLP
    from byol_jax.models.registry import build_encoder as build_encoder
    from byol_jax.models.tap import tap as tap
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

__version__ = '0.1.0'

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        # A whole run, and its encoder.
        'app.hooks': ('Event', 'Hook'),
        'app.pretrain': ('Pretrained', 'pretrain'),
        'errors': ('UserError',),
        'interop.encoder': ('Encoder', 'make_encoder'),
        'interop.export': ('load_encoder', 'save_encoder'),
        # The parts, for your own training loop.
        'input.pipeline': ('view_batches',),
        'methods.base': ('Method',),
        'methods.byol': ('Byol',),
        'models.heads': ('MLP',),
        'models.registry': ('build_encoder',),
        'models.tap': ('tap',),
        'training.optimizers': ('decay_mask', 'lars'),
        'training.schedules': ('learning_rate_schedule', 'target_tau'),
        'training.state': ('TrainState', 'init_state'),
        'training.step': ('AXIS', 'make_train_step', 'pmap_step', 'replicate', 'shard_batch'),
    },
    packages=(
        'evaluation',
        'input',
        'interop',
        'methods',
        'models',
        'sources',
        'training',
        'views',
    ),
)
