"""Makes batches of views from a source."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax.input.feed import open_feed as open_feed
    from byol_jax.input.pipeline import view_batches as view_batches
    from byol_jax.input.stream import Stream as Stream

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'feed': ('open_feed',),
        'pipeline': ('view_batches',),
        'stream': ('Stream',),
    },
)
