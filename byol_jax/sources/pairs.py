"""Pairs of image files by the patterns of their names: stereo, bursts, before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from byol_jax.errors import UserError
from byol_jax.sources.base import Source
from byol_jax.sources.decode import read_file, read_size
from byol_jax.sources.folder import class_labels, list_files
from byol_jax.sources.names import Names

_SHOWN = 5


class FilePairs(Source):
    """Two pictures an example, from the files of a folder whose names follow two patterns.

    A pattern is a path relative to the folder, without its extension, and holds one `*`, which
    stands for anything: `*_left` and `*_right` pair `street/7_left.png` with `street/7_right.jpg`,
    and `left/*` and `right/*` pair `left/7.png` with `right/7.png`. The patterns are the keys of
    the pictures. Files that follow neither are left out. Labels are those of `Folder`, by the
    files of the first pattern.
    """

    own_files = True

    def __init__(
        self,
        root: str | Path,
        patterns: tuple[str, ...],
        max_megapixels: float = 200,
        index: str = '',
    ):
        """Lists the files; decodes none.

        Args:
          root: the folder. patterns: as above. max_megapixels: larger pictures are refused.
          index: as `Folder`.

        Raises:
          UserError: the folder does not exist or holds no image, a pattern does not hold one `*`
            or is followed by no file, or a file has no partner, or two.
        """
        self.root = Path(root).expanduser()
        self.max_megapixels = max_megapixels
        self.keys = tuple(dict.fromkeys(patterns))
        for pattern in self.keys:
            if pattern.count('*') != 1:
                raise UserError(
                    f'data.pair_keys={patterns}: a pattern of file names must hold one *, such as '
                    f"'*_left'; '{pattern}' holds {pattern.count('*')}."
                )
        files = list_files(self.root, 'data.path', index=index)
        found = {pattern: self._matching(pattern, files) for pattern in self.keys}
        first = found[self.keys[0]]
        for pattern, other in found.items():
            self._check_partners(files, first, other, pattern)
            self._check_partners(files, other, first, self.keys[0])
        # In the order of the first pattern's files.
        self._files = {key: files.take(found[key][name] for name in first) for key in self.keys}
        self.labels, self.label_names = class_labels(self._files[self.keys[0]])

    def _matching(self, pattern: str, files: Names) -> dict[str, int]:
        """The places of the files that follow a pattern, by what its * stands for in each."""
        before, after = pattern.split('*')
        found: dict[str, int] = {}
        for place, file in enumerate(files):
            name = file[: file.rindex('.')]
            if not (name.startswith(before) and name.endswith(after)):
                continue
            between = name[len(before) : len(name) - len(after)]
            if between in found:
                raise UserError(
                    f'{files[found[between]]} and {file} in {self.root} are the same picture to '
                    f"the pattern '{pattern}'. Take one of them out."
                )
            if between:
                found[between] = place
        if not found:
            raise UserError(
                f"No image in {self.root} follows the pattern '{pattern}' of data.pair_keys; its "
                f'{len(files):,} images are {", ".join(files[:_SHOWN])}'
                f'{", ..." if len(files) > _SHOWN else ""}. A pattern '
                'says nothing of the extension.'
            )
        return found

    def _check_partners(
        self, files: Names, some: dict[str, int], others: dict[str, int], pattern: str
    ) -> None:
        alone = [place for name, place in some.items() if name not in others]
        if alone:
            shown = ', '.join(files[place] for place in alone[:_SHOWN])
            raise UserError(
                f"{len(alone):,} of {len(some):,} images in {self.root} have no partner '{pattern}'"
                f': {shown}{", ..." if len(alone) > _SHOWN else ""}. Add the partners, or take '
                'these files out.'
            )

    def __len__(self) -> int:
        return len(self._files[self.keys[0]])

    def load(self, index: int, key: str) -> np.ndarray:
        return read_file(self.root / self._files[key][index], self.max_megapixels)

    def name(self, index: int) -> str:
        return self._files[self.keys[0]][index]

    def file(self, index: int, key: str) -> str:
        return str(self.root / self._files[key][index])

    def size(self, index: int, key: str) -> tuple[int, int]:
        return read_size(self.root / self._files[key][index], self.max_megapixels)
