"""A look at the first pictures and views of a run: pixels that can teach nothing, and why."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from byol_jax.cores import usable_cores
from byol_jax.errors import BadPicture, printable
from byol_jax.input.stream import NoPictureError, Stream
from byol_jax.sources.containers import SNIFFED, kind_of
from byol_jax.sources.decode import decoding, opened

# Examples that are looked at, at most.
LOOKED_AT = 32

# A picture whose values are no larger is black. JPEG leaves a level or two where nothing was.
_BLACK = 2
# Values of photographs reach 255; of all that are looked at, the largest is far above these. 12-bit
# values in 16-bit files reach 16, 10-bit ones 4.
_DARK, _VERY_DARK = 64, 32
# The standard deviation of a picture, or view, below which it shows one colour, in levels of 255.
_FLAT = 1.0
# Shares of the pictures from which on something is a finding, and a severe one.
_SHARE, _SEVERE_SHARE = 0.5, 0.9

# PNG 3rd edition, 11.2.1: the bit depth stands behind the signature, length, type and both sides.
_PNG_DEPTH = 24


class Finding(NamedTuple):
    """Something odd about pixels.

    Attributes:
      name: of the kind, such as 'dark_pictures'.
      severe: nothing can be learned from these.
      evidence: what was seen.
      cause: the likely one.
      remedy: what to do.
    """

    name: str
    severe: bool
    evidence: str
    cause: str
    remedy: str


class Look(NamedTuple):
    """One example.

    Attributes:
      name: of the example that is shown.
      file: that holds its first picture; it need not be the path of a file.
      pictures: of each view, uint8 [H, W, 3].
      views: made of these, uint8 [S, S, 3].
    """

    name: str
    file: str
    pictures: tuple[np.ndarray, ...]
    views: tuple[np.ndarray, ...]


def look(stream: Stream, most: int = LOOKED_AT, workers: int = 0) -> list[Finding]:
    """What is odd about the first pictures and views of a run; mostly nothing.

    Args:
      stream: of the run.
      most: examples to look at. Those that cannot be read are passed over.
      workers: examples at a time; 0: one per CPU core.
    """
    positions = range(min(most, len(stream.source)))
    drawn = stream.draw(positions)
    steps = [view.steps(drawn[name]) for name, view in stream.views.items()]

    def at(position: int) -> Look | None:
        try:
            loaded = stream.load(position)
        except NoPictureError:
            return None
        own = zip(stream.views.values(), loaded.pictures, steps, strict=True)
        views = tuple(view.make(picture, each[position]) for view, picture, each in own)
        key = next(iter(stream.views.values())).picture
        name = stream.source.name(loaded.example)
        return Look(name, stream.source.file(loaded.example, key), loaded.pictures, views)

    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        looks = [each for each in pool.map(at, positions) if each is not None]
    return findings(looks)


def findings(looks: Sequence[Look]) -> list[Finding]:
    """What is odd about some examples.

    Args:
      looks: the examples; of fewer than two nothing is said.
    """
    if len(looks) < 2:
        return []
    # Each rule takes it that those before it have found nothing.
    pictures = next(filter(None, (rule(looks) for rule in (_black, _dark, _flat, _same))), None)
    if pictures is not None:
        return [pictures]
    return [found for found in (_flat_views(looks), _same_views(looks)) if found]


def _black(looks: Sequence[Look]) -> Finding | None:
    black = [each for each in looks if _largest(each) <= _BLACK]
    if len(black) < _SHARE * len(looks):
        return None
    cause, remedy = _cause(black[0], _largest(black[0]))
    return Finding(
        'black_pictures',
        len(black) >= _SEVERE_SHARE * len(looks),
        f'{len(black):,} of the first {len(looks):,} pictures are black ({_names(black)})',
        cause,
        remedy,
    )


def _dark(looks: Sequence[Look]) -> Finding | None:
    largest = max(map(_largest, looks))
    if largest > _DARK:
        return None
    cause, remedy = _cause(max(looks, key=_largest), largest)
    return Finding(
        'dark_pictures',
        largest <= _VERY_DARK,
        f'the largest value in the first {len(looks):,} pictures is {largest} of 255 '
        f'({_names(looks)})',
        cause,
        remedy,
    )


def _flat(looks: Sequence[Look]) -> Finding | None:
    flat = [each for each in looks if max(map(_spread, each.pictures)) < _FLAT]
    if len(flat) < _SHARE * len(looks):
        return None
    return Finding(
        'flat_pictures',
        len(flat) >= _SEVERE_SHARE * len(looks),
        f'{len(flat):,} of the first {len(looks):,} pictures show one colour ({_names(flat)})',
        'empty pictures or placeholders, or tiles of an empty border',
        'look at views.png, and leave these files out (data.exclude)',
    )


def _same(looks: Sequence[Look]) -> Finding | None:
    if len({name for name, *_ in looks}) < 2 or len(set(map(_digest_of_pictures, looks))) > 1:
        return None
    return Finding(
        'same_pictures',
        True,
        f'the first {len(looks):,} pictures are all the same ({_names(looks)})',
        'one picture copied under many names, or a source that ignores its index',
        'look at views.png and at the data',
    )


def _flat_views(looks: Sequence[Look]) -> Finding | None:
    views = [view for each in looks for view in each.views]
    flat = sum(_spread(view) < _FLAT for view in views)
    if flat < _SHARE * len(views):
        return None
    return Finding(
        'flat_views',
        flat >= _SEVERE_SHARE * len(views),
        f'{flat:,} of the first {len(views):,} views show one colour, and their pictures do not',
        'crops of next to nothing, or operations that leave nothing of a picture',
        'look at views.png, and raise views.*.crop_area or weaken the other operations',
    )


def _same_views(looks: Sequence[Look]) -> Finding | None:
    same = sum(
        all(np.array_equal(each.views[0], view) for view in each.views[1:]) for each in looks
    )
    if len(looks[0].views) < 2 or same < _SHARE * len(looks):
        return None
    return Finding(
        'same_views',
        same >= _SEVERE_SHARE * len(looks),
        f'of {same:,} of the first {len(looks):,} pictures the views are the same, pixel by pixel',
        'views.* change nothing: no random crop, and every probability is 0',
        'give the operations of views.* back their ranges and probabilities',
    )


def _cause(darkest: Look, largest: int) -> tuple[str, str]:
    """The likely cause of dark or black pictures, by the file of one, and the remedy."""
    depth, mode, opaque = _file_values(darkest.file)
    if depth == 16 and largest > 0:
        bits = max(1, math.ceil(math.log2((largest - 0.5) * 257)))
        return (
            f'the files have 16 bits a channel and hold values of about {bits} bits',
            f'scale them to all 16 bits (times {2 ** (16 - bits):,}), or store them with 8 bits',
        )
    if opaque is not None and opaque < 128:
        return (
            f'the alpha channel is not transparency but data, {opaque:.0f} of 255 on average '
            f'({printable(darkest.name)}): alpha is laid over black',
            'store the pictures without alpha (RGB), or what alpha holds as pictures of its own',
        )
    if largest <= 1:
        return (
            'empty files, or values in [0, 1] that were stored as whole numbers',
            'look at the files with another program, and store values from 0 to 255',
        )
    if mode in ('P', 'L', '1', 'I'):
        return (
            'label maps or masks, whose values are small numbers, or values of fewer than 8 bits',
            'leave masks out (data.exclude), or scale the values to 0 to 255',
        )
    return (
        'values of fewer than 8 bits, or pictures that are underexposed',
        'scale the values to 0 to 255',
    )


def _file_values(path: str) -> tuple[int, str, float | None]:
    """(bits a channel, mode, mean of alpha or None) of an image file; (8, '', None) of others."""
    if not os.path.isfile(path):
        return 8, '', None
    try:
        with open(path, 'rb') as file, decoding(path):
            head = file.read(SNIFFED)
            file.seek(0)
            depth = head[_PNG_DEPTH] if kind_of(head) == 'PNG' else 8
            with opened(file, path, math.inf) as image:
                opaque = None
                if image.mode in ('RGBA', 'LA', 'PA'):
                    opaque = float(np.asarray(image.getchannel('A')).mean())
                return depth, image.mode, opaque
    except (OSError, BadPicture):
        # A video, say, or a file that has gone since.
        return 8, '', None


def _largest(each: Look) -> int:
    return max(int(picture.max()) for picture in each.pictures)


def _spread(image: np.ndarray) -> float:
    """Standard deviation over the picture, of the channel that varies most."""
    return float(image.reshape(-1, image.shape[-1]).std(axis=0).max())


def _digest_of_pictures(each: Look) -> str:
    digest = hashlib.sha256()
    for picture in each.pictures:
        digest.update(str(picture.shape).encode())
        digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()


def _names(looks: Sequence[Look], most: int = 3) -> str:
    shown = ', '.join(printable(each.name) for each in looks[:most])
    return shown + (', ...' if len(looks) > most else '')
