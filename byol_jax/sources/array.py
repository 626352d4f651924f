"""Pictures of one size, all in memory, from an .npz file."""

from __future__ import annotations

import functools
import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from byol_jax.errors import UserError, did_you_mean
from byol_jax.sources.base import Source

# The arrays that are read from an .npz file; all others in it are ignored.
ARRAYS = ('images', 'labels', 'label_names', 'names')

_FORMAT = (
    "An .npz holds 'images', uint8 [N, H, W, 3], RGB, and if there are any 'labels', whole numbers "
    "[N], 'label_names' and 'names'; numpy.savez or examples/make_array.py makes one."
)


class Array(Source):
    """Pictures of one size, all in memory, from an .npz file or (`of`) from arrays.

    Attributes:
      images: uint8 [N, H, W, 3], RGB.
      path: the file's path; None for arrays that were given in memory.
      keys: as in `Source`.
      labels: as in `Source`.
      label_names: as in `Source`.
    """

    def __init__(self, path: str | Path):
        """Reads the file. Pickled objects, which could execute code, are refused.

        Args:
          path: path of an .npz file with 'images' and, if there are any, 'labels', 'label_names'
            and 'names'.

        Raises:
          UserError: the file does not exist, or an array is missing or has a wrong shape or type.
        """
        if isinstance(path, np.ndarray):
            raise UserError(
                'Array reads a file: give its path, or make a source of an array in memory with '
                'Array.of(images).'
            )
        self.path: Path | None = Path(path).expanduser()
        self._take(_read(self.path), f'data.path={self.path}')

    @classmethod
    def of(
        cls,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        label_names: Sequence[str] = (),
        names: Sequence[str] = (),
    ) -> Array:
        """Makes a source from arrays in memory; contiguous images are not copied.

        Args:
          images: uint8 [N, H, W, 3], RGB.
          labels: int [N], at least 0; None for unlabelled pictures.
          label_names: the name of each label; '0', '1', ... by default.
          names: the name of each image; its number by default.

        Raises:
          UserError: an array has a wrong shape or type, or the arrays do not fit each other.
        """
        arrays = {'images': np.asarray(images)}
        if labels is not None:
            arrays['labels'] = np.asarray(labels)
        for name, texts in (('label_names', label_names), ('names', names)):
            if len(texts):
                arrays[name] = np.asarray(texts)
        made = cls.__new__(cls)
        made.path = None
        made._take(arrays, 'array')
        return made

    def _take(self, arrays: Mapping[str, np.ndarray], where: str) -> None:
        """Checks and keeps the given arrays; messages begin with `where` they come from."""
        self._where = where
        self.images = self._checked_images(arrays['images'])
        count = len(self.images)
        self.labels = self._checked_labels(arrays.get('labels'), count)
        self.label_names = self._checked_names(arrays.get('label_names'), 'label_names')
        self._names = self._checked_names(arrays.get('names'), 'names')
        if 'names' in arrays and len(self._names) != count:
            raise self._error(f"'names' has {len(self._names):,} entries for {count:,} images.")
        self._check_label_names('label_names' in arrays)

    @functools.cached_property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the images' shape and pixels."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(self.images.data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, key: str) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return self._names[index] if self._names else str(index)

    def size(self, index: int, key: str) -> tuple[int, int]:
        height, width = self.images.shape[1:3]
        return height, width

    def _error(self, what: str) -> UserError:
        return UserError(f'{self._where}: {what} {_FORMAT}')

    def _checked_images(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8:
            advice = ''
            if np.issubdtype(images.dtype, np.floating):
                advice = ' Values in [0, 1] become it by numpy.rint(255 * images).astype("uint8").'
            raise self._error(f"'images' is {images.dtype} and must be uint8.{advice}")
        if images.ndim != 4 or images.shape[3] != 3:
            advice = ''
            if images.ndim == 4 and images.shape[1] == 3:
                advice = ' If the channels come first: images.transpose(0, 2, 3, 1).'
            elif images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1):
                advice = ' If they are grey: numpy.repeat(images.reshape(N, H, W, 1), 3, axis=3).'
            raise self._error(
                f"'images' has the shape {list(images.shape)} and must have [N, H, W, 3].{advice}"
            )
        if not images.size:
            raise self._error(f"'images' is empty, {list(images.shape)}.")
        # Only this view becomes read-only, not the caller's array.
        images = np.ascontiguousarray(images).view()
        images.flags.writeable = False
        return images

    def _checked_labels(self, labels: np.ndarray | None, count: int) -> np.ndarray | None:
        if labels is None:
            return None
        if not np.issubdtype(labels.dtype, np.integer):
            raise self._error(f"'labels' is {labels.dtype} and must be whole numbers.")
        if labels.shape != (count,):
            raise self._error(
                f"'labels' has the shape {list(labels.shape)} and must have [{count}], one for "
                'each of the images.'
            )
        if labels.min() < 0:
            raise self._error(f"'labels' must not be negative; one is {labels.min()}.")
        return labels.astype(np.int64)

    def _check_label_names(self, given: bool) -> None:
        if self.labels is None:
            if given:
                raise self._error("it has 'label_names' but no 'labels'.")
            return
        last = int(self.labels.max())
        if not given:
            if last >= len(self.images):
                raise self._error(
                    f"'labels' goes up to {last:,} for {len(self.images):,} images: number the "
                    "classes from 0, or give 'label_names'."
                )
            self.label_names = [str(label) for label in range(last + 1)]
        elif last >= len(self.label_names):
            raise self._error(
                f"'label_names' has {len(self.label_names):,} entries, and 'labels' goes up to "
                f'{last:,}.'
            )

    def _checked_names(self, names: np.ndarray | None, name: str) -> list[str]:
        if names is None:
            return []
        if names.ndim != 1 or names.dtype.kind != 'U':
            raise self._error(
                f"'{name}' is {names.dtype} {list(names.shape)} and must be texts, [N]."
            )
        return names.tolist()


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads those of ARRAYS that the file holds.

    Raises:
      UserError: the file cannot be read, or holds no 'images'.
    """
    if not path.is_file():
        kind = 'is a folder, not an .npz file' if path.is_dir() else 'does not exist'
        raise UserError(f'data.path={path} {kind}. {_FORMAT}')
    if not zipfile.is_zipfile(path):
        raise UserError(f'data.path={path} is not an .npz file, or its end is missing. {_FORMAT}')
    try:
        with np.load(path, allow_pickle=False) as file:
            if 'images' not in file:
                there = ', '.join(f"'{name}'" for name in file) or 'nothing'
                raise UserError(
                    f"data.path={path}: there is no 'images' in it."
                    f'{did_you_mean("images", file)} It holds {there}. {_FORMAT}'
                )
            return {name: file[name] for name in ARRAYS if name in file}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        if 'Object arrays' in str(error):
            raise UserError(
                f'data.path={path} holds pickled objects, which could run anything and are never '
                f'loaded. {_FORMAT}'
            ) from error
        raise UserError(f'data.path={path} cannot be read: {error}. {_FORMAT}') from error
