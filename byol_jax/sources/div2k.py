"""The official DIV2K folders: high-resolution pictures and their bicubic reductions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from byol_jax.errors import UserError
from byol_jax.sources.base import Source
from byol_jax.sources.decode import read_file, read_size
from byol_jax.sources.folder import existing_folder

_SUBSETS = {'train': 'train', 'validation': 'valid', 'valid': 'valid'}


class Div2k(Source):
    """DIV2K as unpacked from its own archives, with the pictures 'hr' and 'lr' of each example.

    Below `root` lie `DIV2K_train_HR/0001.png` and, for 'lr', `DIV2K_train_LR_bicubic/X2/0001x2.png`
    (`valid` for the validation split). `root` may also be the HR folder itself.
    """

    keys = ('hr', 'lr')
    own_files = True

    def __init__(
        self, root: str | Path, split: str, keys: tuple[str, ...], max_megapixels: float = 200
    ):
        """Lists the pictures and checks that each has what `keys` asks for; decodes none.

        Raises:
          UserError: a folder or a picture's partner is missing.
        """
        root = existing_folder(Path(root).expanduser())
        if split not in _SUBSETS:
            raise UserError(f"data.split='{split}': DIV2K's folders have 'train' and 'validation'.")
        subset = _SUBSETS[split]
        if root.name == f'DIV2K_{subset}_HR':
            root = root.parent
        self.max_megapixels = max_megapixels
        hr = root / f'DIV2K_{subset}_HR'
        if not hr.is_dir():
            raise UserError(
                f'data.path={root} holds no folder DIV2K_{subset}_HR. It holds: '
                f'{", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"}. A folder '
                'that TFDS has prepared DIV2K in would hold div2k.'
            )
        self._files = {'hr': sorted(hr.glob('[0-9]*.png'))}
        if not self._files['hr']:
            raise UserError(f'{hr} holds no picture such as 0001.png.')
        if 'lr' in keys:
            self._files['lr'] = _partners(root, subset, self._files['hr'])

    def __len__(self) -> int:
        return len(self._files['hr'])

    def load(self, index: int, key: str) -> np.ndarray:
        return read_file(self._files[key][index], self.max_megapixels)

    def name(self, index: int) -> str:
        return self._files['hr'][index].name

    def file(self, index: int, key: str) -> str:
        return str(self._files[key][index])

    def size(self, index: int, key: str) -> tuple[int, int]:
        return read_size(self._files[key][index], self.max_megapixels)


def prepared_by_tfds(root: str | Path) -> bool:
    """Whether a folder holds DIV2K as TFDS prepares it, and not as its own archives unpack."""
    root = Path(root).expanduser()
    return (root / 'div2k').is_dir() and not any(root.glob('DIV2K_*_HR'))


def _partners(root: Path, subset: str, hr: list[Path]) -> list[Path]:
    """The low-resolution file of each high-resolution one, of the least reduction there is."""
    folders = sorted((root / f'DIV2K_{subset}_LR_bicubic').glob('X[0-9]'))
    if not folders:
        raise UserError(
            f"data.pair_keys asks for 'lr', but {root} holds no folder "
            f'DIV2K_{subset}_LR_bicubic/X2.'
        )
    factor = re.sub('[^0-9]', '', folders[0].name)
    files = [folders[0] / f'{path.stem}x{factor}.png' for path in hr]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f'{folders[0]} lacks {len(missing)} of {len(files)} pictures, {missing[0]} first.'
        )
    return files
