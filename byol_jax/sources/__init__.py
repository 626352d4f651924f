"""Where pictures come from: random access by index."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

if TYPE_CHECKING:
    from byol_jax.sources.array import Array as Array
    from byol_jax.sources.bad_files import BadFiles as BadFiles
    from byol_jax.sources.base import Cached as Cached
    from byol_jax.sources.base import Source as Source
    from byol_jax.sources.base import Subset as Subset
    from byol_jax.sources.base import Wrapped as Wrapped
    from byol_jax.sources.data import Data as Data
    from byol_jax.sources.data import open_data as open_data
    from byol_jax.sources.data import open_source as open_source
    from byol_jax.sources.data import split_source as split_source
    from byol_jax.sources.decode import decoding as decoding
    from byol_jax.sources.folder import FilePairs as FilePairs
    from byol_jax.sources.folder import Files as Files
    from byol_jax.sources.folder import Folder as Folder
    from byol_jax.sources.sample import SamplePhotographs as SamplePhotographs
    from byol_jax.sources.tfds import Tfds as Tfds
    from byol_jax.sources.tiles import Tiles as Tiles
    from byol_jax.sources.video import Video as Video

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'array': ('Array',),
        'bad_files': ('BadFiles',),
        'base': ('Cached', 'Source', 'Subset', 'Wrapped'),
        'data': ('Data', 'open_data', 'open_source', 'split_source'),
        'decode': ('decoding',),
        'folder': ('FilePairs', 'Files', 'Folder'),
        'sample': ('SamplePhotographs',),
        'tfds': ('Tfds',),
        'tiles': ('Tiles',),
        'video': ('Video',),
    },
)
