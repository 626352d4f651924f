"""Methods: what is learned, as networks and a loss."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax.methods.base import LossScale as LossScale
    from byol_jax.methods.base import Method as Method
    from byol_jax.methods.base import Outputs as Outputs
    from byol_jax.methods.base import build_method as build_method
    from byol_jax.methods.base import l2_normalize as l2_normalize
    from byol_jax.methods.byol import Byol as Byol
    from byol_jax.methods.byol import regression_loss as regression_loss

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'base': ('LossScale', 'Method', 'Outputs', 'build_method', 'l2_normalize'),
        'byol': ('Byol', 'regression_loss'),
    },
)
