"""What a run trains on, in few numbers: by them it knows its data again, wherever it lies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.array import Array
from byol_jax.sources.base import Source
from byol_jax.sources.data import Data
from byol_jax.sources.folder import Files

# Names that are hashed at once.
_CHUNK = 4096

# Files whose sizes are looked at, at most: evenly spaced ones of more. On a network's file system
# a size takes 0.5 ms.
_MOST_SIZES = 200_000
# Sizes are put into so many digests. With fewer files each has its own, so that a file known to be
# bad may change.
_GROUPS = 1024
_THREADS = 16

# Pictures whose bytes, or else pixels, are looked at.
_READ, _DECODED = 64, 16
# Bytes at the beginning and at the end of a file.
_BYTES = 2**19
# Mean colours that are so near are the same: decoders differ by less than a level.
_LEVELS = 2.0
# If no more entries than this differ, their pictures are loaded, to see whether they are bad now.
_LOADED = 16
# What is looked at of pictures, and the words for a difference.
_LOOKED_AT = {'sizes': 'have other sizes', 'contents': 'looked at have another content'}
# Stands for a picture that cannot be read.
_BAD = 'bad'

# Which of some entries of 'sizes' or 'contents' may differ, because a file in them is or was bad.
Excused = Callable[[str, Sequence[int]], Collection[int]]


def no_excuse(key: str, places: Sequence[int]) -> Collection[int]:
    """An `Excused` that finds none."""
    return ()


def fingerprint(data: Data, keys: Sequence[str] = ()) -> dict[str, Any]:
    """What identifies a data set, as data.json has it.

    Args:
      data: of a run.
      keys: the pictures of an example that are used (data.pair_keys); the first one by default.

    Returns:
      The numbers of examples in both parts; 'names_sha256', a digest of their names; of files,
      'sizes', 32 bits for each file or group of files; 'contents', an entry for each of some
      pictures: 64 bits of a file's bytes, or else height, width and mean colour of the pixels. Of
      an array, 'pictures_sha256' in place of the last two.
    """
    opened = data.opened or data.everything
    found = names_of(data)
    if isinstance(opened, Array):
        return {**found, 'pictures_sha256': opened.sha256}
    if not len(opened):
        return found
    keys = _keys(opened, keys)
    if opened.stored_in(0, keys[0]) is not None:
        found['sizes'] = ' '.join(_sizes(opened, keys))
    found['contents'] = ' '.join(_contents(opened, keys[0]))
    return found


def _keys(source: Source, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(keys)) or source.keys[:1]


def names_of(data: Data) -> dict[str, Any]:
    """The part of `fingerprint` that needs no look at the pictures."""
    found = {
        'examples': len(data.train),
        'held_out': len(data.held_out),
        'names_sha256': _digest(_names(data)),
    }
    if isinstance(data.opened, Files):
        # Their names are paths, and the folder in which they lie together may be another.
        paths = list(data.opened.names(np.arange(len(data.opened))))
        if len({os.path.isabs(path) for path in paths}) == 1:
            folder = os.path.commonpath([os.path.dirname(path) for path in paths])
            names = (name.removeprefix(folder) for name in _names(data))
            found['names_in_folder_sha256'] = _digest(names)
    return found


def _names(data: Data) -> Iterator[str]:
    for part in (data.train, data.held_out):
        for start in range(0, len(part), _CHUNK):
            yield from part.names(np.arange(start, min(start + _CHUNK, len(part))))


def _digest(names: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        # A file's name need not be text.
        digest.update(f'{name}\n'.encode(errors='surrogatepass'))
    return digest.hexdigest()


def _spaced(count: int, most: int) -> np.ndarray:
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _entries(source: Source, key: str, kind: str) -> tuple[np.ndarray, int]:
    """What the entries of 'sizes' or 'contents' are of.

    Args:
      source: the pictures.
      key: the first picture of an example that is used.
      kind: 'sizes' or 'contents'.

    Returns:
      The examples that are looked at, and how many entries there are. Entry i is of the examples
      [i::entries] of these.
    """
    if kind == 'sizes':
        looked_at = _spaced(len(source), _MOST_SIZES)
        return looked_at, min(len(looked_at), _GROUPS)
    of_files = source.stored_in(0, key) is not None
    looked_at = _spaced(len(source), _READ if of_files else _DECODED)
    return looked_at, len(looked_at)


def _size(path: str | None) -> int:
    """Bytes of a file; 0 for one that is lost."""
    try:
        return os.stat(path or '').st_size
    except OSError:
        return 0


def _sizes(source: Source, keys: Sequence[str]) -> list[str]:
    """A digest for each entry of 'sizes'."""
    looked_at, count = _entries(source, keys[0], 'sizes')
    rows = np.array_split(looked_at, max(1, len(looked_at) // _CHUNK))

    def of_row(row: np.ndarray) -> list[str]:
        return [
            ' '.join(str(_size(source.stored_in(index, key))) for key in keys)
            for index in row.tolist()
        ]

    groups = [hashlib.sha256() for _ in range(count)]
    place = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for texts in pool.map(of_row, rows):
            for text in texts:
                groups[place % len(groups)].update(f'{text}\n'.encode())
                place += 1
    return [group.hexdigest()[:8] for group in groups]


def _contents(source: Source, key: str) -> list[str]:
    looked_at, _ = _entries(source, key, 'contents')

    def content(index: int) -> str:
        path = source.stored_in(index, key)
        return _pixels(source, index, key) if path is None else _bytes(path)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(content, looked_at.tolist()))


def _bytes(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(file.read(_BYTES))
            file.seek(max(size - _BYTES, 0))
            digest.update(file.read(_BYTES))
    except OSError:
        return _BAD
    return digest.hexdigest()[:16] if size else _BAD


def _pixels(source: Source, index: int, key: str) -> str:
    try:
        picture = source.load(index, key)
    except BadPicture:
        return _BAD
    height, width = picture.shape[:2]
    colour = ','.join(f'{mean:.1f}' for mean in picture.mean(axis=(0, 1)))
    return f'{height}x{width}:{colour}'


class Excuses:
    """Finds files that may be others than when a run began: they were bad, or are bad now."""

    def __init__(self, data: Data, keys: Sequence[str], listed: Path):
        """Looks at nothing yet.

        Args:
          data: of the run.
          keys: as for `fingerprint`.
          listed: bad_files.txt of the run.
        """
        self._source = data.opened or data.everything
        self._keys = _keys(self._source, keys)
        self._listed = listed

    def __call__(self, key: str, places: Sequence[int]) -> set[int]:
        """Those of some entries of 'sizes' or 'contents' in which an example's file may differ."""
        text = ''
        if self._listed.is_file():
            text = self._listed.read_text('utf-8', 'surrogateescape')
        bad = {line.partition('\t')[0] for line in text.splitlines()}
        examples = self._examples(key)
        found = {p for p in places if any(self._is_excused(i, bad) for i in examples(p))}
        others = [p for p in places if p not in found]
        if len(others) <= _LOADED and sum(len(examples(p)) for p in others) <= _CHUNK:
            found |= {p for p in others if any(self._is_bad(i) for i in examples(p))}
        return found

    def _examples(self, key: str) -> Callable[[int], list[int]]:
        """The examples in each entry."""
        looked_at, count = _entries(self._source, self._keys[0], key)
        return lambda place: looked_at[place::count].tolist()

    def _is_excused(self, index: int, bad: Collection[str]) -> bool:
        source = self._source
        return any(
            source.file(index, key) in bad or not _size(source.stored_in(index, key))
            for key in self._keys
        )

    def _is_bad(self, index: int) -> bool:
        try:
            for key in self._keys:
                self._source.load(index, key)
        except BadPicture:
            return True
        return False


def check_same_data(
    then: Mapping[str, Any], now: Mapping[str, Any], excused: Excused = no_excuse
) -> list[str]:
    """Checks that the data is that which a run began with.

    Args:
      then: `fingerprint` of the run; one of an older version may lack keys.
      now: `fingerprint` of the data.
      excused: finds the entries that may differ.

    Returns:
      Lines for a person: how many files have changed and may.

    Raises:
      UserError: it is not; says in what.
    """
    named = [k for k in ('names_sha256', 'names_in_folder_sha256') if k in then or k in now]
    same_names = not named or any(then.get(key) == now.get(key) is not None for key in named)
    counts = [(each.get('examples', 0), each.get('held_out', 0)) for each in (then, now)]
    if not same_names or counts[0] != counts[1]:
        raise UserError(
            f'The data is not what this run began with: {counts[0][0]:,} training and '
            f'{counts[0][1]:,} held-out examples then, {counts[1][0]:,} and {counts[1][1]:,} now, '
            'or other names. The order of the data and the schedules would change. Restore the '
            'files (an empty one in place of one that is lost will do, if no tiles are cut: it '
            'counts as bad), or start anew in another --workdir.'
        )
    if 'pictures_sha256' in then and then['pictures_sha256'] != now.get('pictures_sha256'):
        raise _other('the names are the same, but the array holds other pictures')
    said = []
    for key, what in _LOOKED_AT.items():
        if key not in then or key not in now:
            continue
        old, new = then[key].split(), now[key].split()
        if len(old) != len(new):
            raise _other('other files are looked at')
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if not _alike(a, b)]
        left = len(changed) - len(excused(key, changed) if changed else ())
        if left:
            many = f'{left:,} of {len(new):,}' if left < len(new) else f'all {left:,}'
            kind = 'groups of files' if key == 'sizes' and len(new) == _GROUPS else 'files'
            raise _other(f'the names are the same, but {many} {kind} {what}')
        if changed:
            said.append(f'{len(changed):,} file(s) that were bad then, or are now, have changed')
    return list(dict.fromkeys(said))


def _other(what: str) -> UserError:
    return UserError(
        f'The data is not what this run began with: {what}. Restore the files, or start '
        'anew in another --workdir.'
    )


def _alike(a: str, b: str) -> bool:
    """Whether two entries are of the same picture, as far as can be told."""
    if a == b or _BAD in (a, b):
        return True
    (size, _, colour), (other, _, another) = a.partition(':'), b.partition(':')
    if not (colour and another) or size != other:
        return False
    values = ([float(value) for value in text.split(',')] for text in (colour, another))
    return all(abs(x - y) <= _LEVELS for x, y in zip(*values, strict=True))
