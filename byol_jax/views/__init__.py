"""The views of an example: operations on pictures, recipes, and how they are drawn."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax.views.colors import Blur as Blur
    from byol_jax.views.colors import Flip as Flip
    from byol_jax.views.colors import Gray as Gray
    from byol_jax.views.colors import Jitter as Jitter
    from byol_jax.views.colors import Solarize as Solarize
    from byol_jax.views.crop import Crop as Crop
    from byol_jax.views.operation import Operation as Operation
    from byol_jax.views.operation import Resizing as Resizing
    from byol_jax.views.recipes import paper_views as paper_views
    from byol_jax.views.view import View as View

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'colors': ('Blur', 'Flip', 'Gray', 'Jitter', 'Solarize'),
        'crop': ('Crop',),
        'operation': ('Operation', 'Resizing'),
        'recipes': ('paper_views',),
        'view': ('View',),
    },
)
