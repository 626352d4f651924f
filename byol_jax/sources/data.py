"""The pictures to train on and the pictures held out, from wherever the settings say."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from byol_jax import settings
from byol_jax.errors import UserError, did_you_mean, printable
from byol_jax.names import Registry
from byol_jax.sources.array import Array
from byol_jax.sources.bad_files import SHOWN, BadFile, name_some
from byol_jax.sources.base import Cached, Progress, Source, Subset, no_progress
from byol_jax.sources.cache import DiskCached
from byol_jax.sources.folder import Div2k, FilePairs, Folder, prepared_by_tfds
from byol_jax.sources.sample import SamplePhotographs
from byol_jax.sources.tiles import ShiftedTiles, Tiles
from byol_jax.sources.video import Video

# How many unknown labels a message names.
_SHOWN = 5

# Classes that a run's first lines name.
_CLASSES = 10

# How folders of splits are called, such as 'train', 'val2017' or 'test_set'.
_SPLIT = re.compile(
    r'(train|training|val|valid|validation|test|testing|dev|eval|holdout|held_?out|unlabell?ed)'
    r'([-_]?(set|data|images|imgs|split|\d+))?',
    re.IGNORECASE,
)
_WITHOUT = 'data.label_key is empty'

# How many examples' labels are checked before a run begins.
_LABELS_CHECKED = 64

_WAYS_OUT = (
    'There are three ways: (1) run where the network can be reached, and TFDS downloads DIV2K; '
    '(2) give a folder with --config.data.path=DIR, where DIR holds DIV2K_train_HR (the official '
    'archives, unpacked) or div2k (prepared by TFDS); '
    '(3) train on the embedded sample with --config=configs/div2k.py:sample.'
)


# The `data.source` of a run whose source was given in Python, to byol_jax.pretrain.
GIVEN = 'given'


class Data(NamedTuple):
    """The training and held-out pictures of a run, and what was left out of them.

    Attributes:
      train: the training pictures, which are also the gallery of the nearest-neighbour evaluation.
      held_out: pictures that are never trained on; may be empty.
      bad: pictures that have no tiles because their size cannot be read.
      small: (name, height, width) of pictures smaller than a tile; they are in neither part.
      opened: the source of both parts as it was opened: whole, without tiles or a cache.
      unused: lines about data that exists but is not used, such as lists of labels.
      cache: the cache of decoded pictures on disk that both parts read, if there is one.
      test: a separate test set, if the config names one. Its `train` is the whole test set, with
        the label numbers of this training set.
    """

    train: Source
    held_out: Source
    bad: Sequence[BadFile] = ()
    small: Sequence[tuple[str, int, int]] = ()
    opened: Source | None = None
    unused: Sequence[str] = ()
    cache: DiskCached | None = None
    test: Data | None = None

    @property
    def everything(self) -> Source:
        """The source that both parts are taken from."""
        return self.train.source if isinstance(self.train, Subset) else self.train

    def check_labels(self) -> None:
        """Reads the labels of a few evenly spaced examples, to find wrong labels early.

        Raises:
          UserError: some examples have a label and some have none.
        """
        for source in (self.everything, *(() if self.test is None else (self.test.train,))):
            if source.label_names and len(source):
                spaced = np.linspace(0, len(source) - 1, _LABELS_CHECKED).astype(int)
                source.labels_of(np.unique(spaced))

    def lines(self) -> list[str]:
        """Lines for a person about what was found: labels, and what is not used."""
        lines = label_lines(self.everything)
        if self.test is not None:
            lines += [f'test set: {line}' for line in label_lines(self.test.train)]
        return [*lines, *self.left_out()]

    def left_out(self) -> list[str]:
        """Lines for a person about pictures and data that are not used; usually none."""
        lines = []
        if self.bad:
            lines.append(
                f'left out, {len(self.bad):,} picture(s) whose size cannot be read: '
                f'{name_some(self.bad)}'
            )
        if self.small:
            some = [f'{printable(name)} ({w}x{h})' for name, h, w in self.small[:SHOWN]]
            more = len(self.small) - len(some)
            lines.append(
                f'left out, {len(self.small):,} picture(s) smaller than a tile: {", ".join(some)}'
                + (f', and {more:,} more' if more else '')
            )
        if self.test is not None:
            lines += [f'test set: {line}' for line in self.test.left_out()]
        return [*lines, *self.unused]


def label_lines(source: Source) -> list[str]:
    """Lines for a person: the labels of all pictures with their numbers, or why there are none.

    A line more is a hint where the classes look like the splits of one data set, or as if each
    picture had a folder of its own.

    Args:
      source: the pictures. Labels that are not at hand are not counted.
    """
    names = source.label_names
    if not source.labels_at_hand and names:
        some = ', '.join(map(printable, names[:_CLASSES]))
        return [f'labels: {len(names):,} {source.labels_are}, {some}{_others(len(names))}']
    if not source.labels_at_hand or source.labels is None:
        return [f'labels: none{f" ({source.unlabelled})" if source.unlabelled else ""}']
    labels = np.asarray(source.labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    known = [*names, *map(str, range(len(names), len(counts)))]
    found = [(name, int(count)) for name, count in zip(known, counts, strict=True) if count]
    some = ', '.join(f'{printable(name)} ({count:,})' for name, count in found[:_CLASSES])
    lines = [f'labels: {len(found):,} {source.labels_are}, {some}{_others(len(found))}']
    if source.labels_are == 'classes':
        lines += _hints([name for name, _ in found], len(labels))
    return lines


def _others(count: int) -> str:
    return f', and {count - _CLASSES:,} more' if count > _CLASSES else ''


def _hints(classes: Sequence[str], pictures: int) -> list[str]:
    """What classes may really be."""
    without = '--config.data.label_key= (nothing) does without labels'
    if len(classes) > 1 and all(map(_SPLIT.fullmatch, classes)):
        return [
            'hint: these look like the splits of one data set, not like classes: give one of them '
            f'as data.path, and one to test on as evaluate.data_path; {without}'
        ]
    if len(classes) > pictures / 2:
        return [
            f'hint: {len(classes):,} classes of {pictures:,} pictures look like a folder for each '
            f'picture, not like classes; {without}'
        ]
    return []


def open_data(data: settings.Data, *, seed: int = 0, progress: Progress = no_progress) -> Data:
    """Opens a source, cuts tiles and splits off the held-out part.

    Args:
      data: the settings of the source, the tiles and the split.
      seed: the run's seed, which shifts the grid of tiles (data.tile_shift).
      progress: called during slow work: listing files, reading sizes, checking videos.

    Raises:
      UserError: the data does not exist or does not fit the settings. No other data is ever used
        in its place.
    """
    return split_source(open_source(data, progress), data, seed=seed, progress=progress)


def split_source(
    source: Source, data: settings.Data, *, seed: int = 0, progress: Progress = no_progress
) -> Data:
    """Like `open_data`, for a source that is already open.

    Args:
      source: the pictures.
      data: the settings of the tiles and the split.
      seed: see `open_data`.
      progress: see `open_data`.

    Raises:
      UserError: the source does not fit the settings.
    """
    if not len(source):
        raise UserError(f"data.source='{data.source}' ({type(source).__name__}) has no pictures.")
    opened, unused = source, source.unused
    keys = data.pair_keys
    for key in keys:
        if key not in source.keys:
            raise UserError(
                f"data.pair_keys={keys}: this source has no picture '{key}'."
                f'{did_you_mean(key, source.keys)} It has: {", ".join(source.keys)}.'
            )
    memory = int(data.cache_gib * 2**30) if data.tile_size else 0
    cache = None
    if data.cache:
        # data.max_megapixels is a limit for files; cached pictures of other sources pass.
        limit = data.max_megapixels if source.own_files else math.inf
        source = cache = DiskCached(source, data.cache, memory, limit)
    elif data.tile_size:
        source = Cached(source, memory)
    if data.tile_size:
        # DIV2K's tiles are counted in high-resolution pixels, whichever view those feed.
        counted = 'hr' if 'hr' in source.keys else source.keys[0]
        tiles = Tiles(source, data.tile_size, data.tile_stride, counted, progress)
        if not data.label_key:
            tiles.labels, tiles.label_names, tiles.unlabelled = None, (), _WITHOUT
        part = (data.held_out_fraction, data.held_out_seed)
        train, held_out = tiles.split(*part)
        training: Source = Subset(tiles, train)
        if data.tile_shift:
            training = ShiftedTiles(tiles, train, tiles.blocks(*part), seed, keys)
        tested = Subset(tiles, held_out)
        return Data(training, tested, tiles.bad, tiles.small, opened, unused, cache)
    train, held_out = _split(source, data.held_out_fraction, data.held_out_seed)
    if not data.label_key and source.label_names:
        # Only now: the same pictures are held out with and without labels.
        source = Relabelled(source, (), None)
        source.unlabelled = _WITHOUT
    training, tested = Subset(source, train), Subset(source, held_out)
    if data.held_out_fraction and not len(held_out):
        unused = [
            *unused,
            f'nothing is held out: data.held_out_fraction={data.held_out_fraction:g} is less than '
            'one picture, or group of pictures, of each label',
        ]
    return Data(training, tested, opened=opened, unused=unused, cache=cache)


def open_source(data: settings.Data, progress: Progress = no_progress) -> Source:
    """Opens the source that `data.source` names, without tiles or a split.

    Args:
      data: the settings of the source. A user's own source is called with data.kwargs and, if
        data.path is given, with it as `path`.
      progress: see `open_data`.

    Raises:
      UserError: there is no such source, or it cannot be opened.
    """
    _check_for_files(data)
    if data.source in SOURCES:
        if data.kwargs:
            raise UserError(
                f"data.kwargs={dict(data.kwargs)} are for a source of your own; '{data.source}' "
                'takes the other keys of data.'
            )
        return SOURCES.find(data.source)(data, progress)
    path = {} if data.path is None else {'path': data.path}
    source = SOURCES.build(data.source, {**path, **data.kwargs})
    if not isinstance(source, Source):
        raise UserError(
            f"data.source='{data.source}' gives a {type(source).__name__}, which is no "
            'byol_jax.sources.Source.'
        )
    if source.labels_at_hand and source.labels is not None:
        labels = np.asarray(source.labels)
        whole = isinstance(source.labels, np.ndarray) and np.issubdtype(labels.dtype, np.integer)
        if not whole or labels.shape != (len(source),):
            raise UserError(
                f"data.source='{data.source}': labels are a {type(source.labels).__name__} of "
                f'{labels.dtype} {list(labels.shape)}, and must be an array of integers '
                f'[{len(source)}], places in label_names.'
            )
    return source


def _check_for_files(data: settings.Data) -> None:
    """Raises UserError if a key is given that this kind of source does not have."""
    if data.exclude and data.source not in ('folder', 'video'):
        raise UserError(
            f'data.exclude={data.exclude} leaves out files of a folder, and data.source='
            f"'{data.source}' reads none."
        )
    if data.label_key not in ('auto', '') and data.source in SOURCES and data.source != 'tfds':
        raise UserError(
            f'data.label_key={data.label_key} names a feature of a TFDS data set. With '
            f"data.source='{data.source}' it is 'auto' for the labels there are (class folders), "
            'or nothing for none: --config.data.label_key='
        )


def _open_sample(data: settings.Data, progress: Progress) -> Source:
    return SamplePhotographs()


def _open_folder(data: settings.Data, progress: Progress) -> Source:
    if not data.path:
        raise UserError(
            "data.source='folder' needs the folder: --config.data.path=DIR with JPEG, PNG, "
            'WebP or BMP files, in class folders or not.'
        )
    if any('*' in key for key in data.pair_keys):
        return FilePairs(
            data.path, data.pair_keys, data.max_megapixels, data.index, progress, data.exclude
        )
    return Folder(
        data.path,
        data.max_megapixels,
        index=data.index,
        progress=progress,
        exclude=data.exclude,
    )


def _open_video(data: settings.Data, progress: Progress) -> Source:
    if not data.path:
        raise UserError(
            "data.source='video' needs the folder: --config.data.path=DIR with video files, or "
            'folders of numbered frames.'
        )
    if data.tile_size:
        raise UserError(
            f"data.tile_size={data.tile_size} cuts still pictures; with data.source='video' "
            'it must be 0.'
        )
    return Video(
        data.path,
        data.max_frame_gap,
        data.max_megapixels,
        data.workers,
        data.index,
        progress,
        data.exclude,
    )


def _open_tfds(data: settings.Data, progress: Progress) -> Source:
    is_div2k = data.name.split('/')[0].split(':')[0] == 'div2k'
    if is_div2k and data.path and not prepared_by_tfds(data.path):
        return Div2k(data.path, data.split, data.pair_keys, data.max_megapixels)
    # Imported here because other sources need no TensorFlow Datasets.
    from byol_jax.sources.tfds import Tfds

    try:
        return Tfds(
            data.name,
            data.split,
            data.path,
            tuple(dict.fromkeys(data.pair_keys)),
            label_key=data.label_key,
            max_megapixels=data.max_megapixels,
            download=data.download,
        )
    except UserError as error:
        if is_div2k:
            raise UserError(f'{error}\n{_WAYS_OUT}') from error
        raise


def _open_array(data: settings.Data, progress: Progress) -> Source:
    if not data.path:
        raise UserError(
            "data.source='array' needs the file: --config.data.path=FILE.npz with an array "
            "'images', uint8 [N, H, W, 3]. examples/make_array.py makes one of class folders."
        )
    return Array(data.path)


def _open_given(data: settings.Data, progress: Progress) -> Source:
    raise UserError(
        'This run was given its pictures in Python, by byol_jax.pretrain: give them in the same '
        'way again.'
    )


SOURCES = Registry(
    'source',
    'data.source',
    {
        'sample': _open_sample,
        'folder': _open_folder,
        'video': _open_video,
        'tfds': _open_tfds,
        'array': _open_array,
        GIVEN: _open_given,
    },
    'data.kwargs (with data.path as path)',
)


def _split(source: Source, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the examples into training and held-out ones: indices, int [any number] each.

    `fraction` of the groups of each label is held out, or of all groups if labels are not at hand.
    In a source without groups, every example is a group.
    """
    labels = source.labels if source.labels_at_hand else None
    if labels is None:
        labels = np.zeros(len(source), np.int64)
    groups = np.arange(len(source)) if source.groups is None else source.groups
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    labels = labels[first]
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    held_out = np.zeros(len(first), bool)
    order = np.argsort(labels, kind='stable')
    for alike in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        members = rng.permutation(alike)
        held_out[members[: int(len(members) * fraction)]] = True
    return np.flatnonzero(~held_out[group]), np.flatnonzero(held_out[group])


def matched(test: Source, train: Source, *, tiles: bool) -> Source:
    """Gives the test set the label numbers of the training set; labels are matched by name.

    Args:
      test: the whole test set.
      train: the whole training set.
      tiles: whether the examples are tiles. A tile's label is its picture, and no picture is in
        both sets, so the test set then has no labels.

    Raises:
      UserError: the test set is empty, or has a label that the training set does not have.
    """
    if not len(test):
        raise UserError('The test set holds no picture: evaluate.data_split or evaluate.data_path.')
    if tiles or not test.label_names or not train.label_names:
        return Relabelled(test, (), None)
    numbers = {name: number for number, name in enumerate(train.label_names)}
    known = np.array([numbers.get(name, -1) for name in test.label_names], np.int64)
    if (known < 0).any():
        # `labels` would stop at the first record that cannot be read.
        labels = test.shown_labels(np.arange(len(test)))
        counts = np.bincount(labels[labels >= 0], minlength=len(known))
        unknown = np.flatnonzero((known < 0) & (counts > 0)).tolist()
        if unknown:
            raise _unknown([(test.label_names[i], int(counts[i])) for i in unknown], numbers)
    return Relabelled(test, train.label_names, known)


def _unknown(unknown: list[tuple[str, int]], known: dict[str, int]) -> UserError:
    shown = [
        f"'{name}' ({count:,} picture(s)){did_you_mean(name, known)}"
        for name, count in unknown[:_SHOWN]
    ]
    more = f', and {len(unknown) - _SHOWN:,} more' if len(unknown) > _SHOWN else ''
    there = ', '.join(sorted(known)[:20]) + (', ...' if len(known) > 20 else '')
    return UserError(
        f'{len(unknown):,} label(s) of the test set are not in the training set, so no answer '
        f'could be right: {"; ".join(shown)}{more}. Labels are matched by name; the training set '
        f'has {len(known):,}: {there}. Rename them, or take these pictures out of the test set.'
    )


class Relabelled(Subset):
    """All examples of another source, with other numbers and names for their labels."""

    def __init__(self, source: Source, names: Sequence[str], numbers: np.ndarray | None):
        """Reads nothing yet.

        Args:
          source: the examples.
          names: names of the new labels.
          numbers: the new label of each old label, int [old labels]; None for no labels.
        """
        super().__init__(source, np.arange(len(source)))
        self._names, self._numbers = names, numbers

    @property
    def label_names(self) -> Sequence[str]:  # type: ignore[override]
        return self._names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        return self.labels_of(np.arange(len(self)))

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        labels = None if self._numbers is None else super().labels_of(indices)
        return None if labels is None or self._numbers is None else self._numbers[labels]
