"""Image data sets of TensorFlow Datasets, by name, with random access."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from byol_jax.errors import BadPicture, UserError, did_you_mean
from byol_jax.sources.base import Source
from byol_jax.sources.decode import decoding, read_header
from byol_jax.sources.quiet_tensorflow import tf
from byol_jax.sources.tfds_files import open_builder, open_records, prepare

# data.label_key='auto' takes the label that the data set declares.
AUTO = 'auto'

_SEQUENCES = (tfds.features.Sequence, tfds.features.Dataset)


def flatten_features(features: Any, above: str = '') -> Iterator[tuple[str, Any]]:
    """All features with their paths, which are also their keys in a serialized example.

    A sequence counts as one feature; the features inside it are not listed.

    Args:
      features: a FeaturesDict.
      above: the path of `features` with a '/' at its end; '' at the top.

    Yields:
      (path, feature), such as ('x/image', Image).
    """
    for key, feature in features.items():
        path = f'{above}{key}'
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from flatten_features(feature, f'{path}/')
        else:
            yield path, feature


def picture_features(features: Any, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The features that hold the pictures.

    Args:
      features: the data set's features.
      name: the data set's name, for messages.
      keys: paths of the features.

    Returns:
      The feature of each key.

    Raises:
      UserError: a feature is not a picture: it is a sequence, an animation or a measurement, say.
    """
    flat = dict(flatten_features(features))
    images = [
        path
        for path, feature in flat.items()
        if isinstance(feature, tfds.features.Image) and not _unusable(feature)
    ]
    chosen = {}
    for key in keys:
        feature = flat.get(key)
        why = _unusable(feature) if isinstance(feature, tfds.features.Image) else ''
        why = why or _several(flat, key)
        if key not in images:
            raise UserError(
                f"data.pair_keys names '{key}', but the pictures of TFDS '{name}' are: "
                f'{", ".join(images) or "none"}.{why}{did_you_mean(key, images)}'
            )
        chosen[key] = feature
    return chosen


def _unusable(feature: Any) -> str:
    """Why an Image feature is not a picture to train on: a sentence for a message, or ''."""
    if feature.np_dtype == np.float32:
        return ' That feature holds 32-bit floats (depth, say), whose range is not known.'
    if len(feature.shape) != 3:
        return ' That feature holds animations.'
    return ''


def _several(flat: Mapping[str, Any], key: str) -> str:
    """A sentence for a message if a feature lies in a sequence, or ''."""
    for path, feature in flat.items():
        if _is_sequence(feature) and (key == path or key.startswith(f'{path}/')):
            return (
                f" '{path}' is a sequence: an example may have any number of its entries, so none "
                'of them is the picture.'
            )
    return ''


def label_feature(info: Any, name: str, key: str) -> tuple[str, Any] | None:
    """The feature that holds the labels.

    Args:
      info: the data set's DatasetInfo.
      name: the data set's name, for messages.
      key: the feature's path, '' for no labels, or 'auto': the feature that the data set declares
        (supervised_keys), else the one called 'label', else its only ClassLabel.

    Returns:
      (path, feature), where the feature is a ClassLabel or an integer; None without labels.

    Raises:
      UserError: several features could be the label, or `key` names none that could.
    """
    if not key:
        return None
    flat = dict(flatten_features(info.features))
    classes = [path for path, f in flat.items() if isinstance(f, tfds.features.ClassLabel)]
    usable = [path for path, feature in flat.items() if _is_label(feature)]
    if key != AUTO:
        if key not in usable:
            raise UserError(_no_label(name, key, flat, usable))
        return key, flat[key]
    declared = [path for path in _supervised(info.supervised_keys) if path in usable]
    for candidates in (declared[-1:], ['label'] if 'label' in usable else [], classes):
        if len(candidates) == 1:
            return candidates[0], flat[candidates[0]]
        if candidates:
            raise UserError(
                f"TFDS '{name}' has several features that could be the label: "
                f'{", ".join(candidates)}. Choose one with --config.data.label_key='
                f"{candidates[0]}, or none with --config.data.label_key=''. Training never uses it."
            )
    return None


def label_lists(features: Any) -> Iterator[str]:
    """Paths of class labels in sequences, such as 'objects/label', several for one example."""
    for path, feature in flatten_features(features):
        if isinstance(feature, _SEQUENCES):
            yield from _class_labels(feature, path)


def _class_labels(feature: Any, path: str) -> Iterator[str]:
    if isinstance(feature, tfds.features.ClassLabel):
        yield path
    elif isinstance(feature, _SEQUENCES):
        yield from _class_labels(feature.feature, path)
    elif isinstance(feature, tfds.features.FeaturesDict):
        for key, part in feature.items():
            yield from _class_labels(part, f'{path}/{key}')


def _no_label(name: str, key: str, flat: Mapping[str, Any], usable: list[str]) -> str:
    what = f'is not a feature of TFDS {name!r}'
    if _several(flat, key):
        what = 'holds any number of labels for a picture, but accuracy needs exactly one'
    elif key in flat:
        what = f'({type(flat[key]).__name__}) is not a whole number'
    return (
        f"data.label_key='{key}' {what}. Features that can be the label: "
        f'{", ".join(usable) or "none"}.{did_you_mean(key, usable)} '
        "--config.data.label_key='' uses no labels."
    )


def _is_sequence(feature: Any) -> bool:
    return isinstance(feature, _SEQUENCES) or (
        not isinstance(feature, tfds.features.Image) and len(getattr(feature, 'shape', ())) > 0
    )


def _is_label(feature: Any) -> bool:
    if isinstance(feature, tfds.features.ClassLabel):
        return True
    return (
        isinstance(feature, tfds.features.Tensor)
        and feature.shape == ()
        and np.issubdtype(feature.np_dtype, np.integer)
    )


def _supervised(keys: Any) -> list[str]:
    """The feature names in TFDS's supervised_keys, which may be nested."""
    if isinstance(keys, str):
        return [keys]
    if isinstance(keys, Mapping):
        keys = keys.values()
    return [name for part in keys or () for name in _supervised(part)]


# Marks a label that has not been read; no real label has this value.
_UNREAD = np.iinfo(np.int64).min

_ADVICE = 'Prepare the data set again.'


class Tfds(Source):
    """One split of a TFDS data set, which is downloaded and prepared if it is not on disk yet."""

    labels_at_hand = False

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None = None,
        keys: tuple[str, ...] = ('image',),
        *,
        label_key: str = AUTO,
        max_megapixels: float = 200,
        download: bool = True,
    ):
        """Opens the data set.

        Args:
          name: the data set's name, such as 'imagenette/160px-v2' or 'div2k/bicubic_x2'.
          split: the split, such as 'train' or 'train[:90%]'; slices work with every file format.
          data_dir: the folder where TFDS keeps its data; None for TFDS's default.
          keys: paths of the features that hold the pictures; 'x/image' is feature 'image' in 'x'.
          label_key: path of the feature that holds the label (see `label_feature`).
          max_megapixels: larger pictures are refused.
          download: whether TFDS may download a data set that is not on disk.

        Raises:
          UserError: the data set, split or feature does not exist, or the data is not on disk and
            cannot be downloaded.
        """
        builder = open_builder(name, data_dir or None)
        self._images = picture_features(builder.info.features, name, keys)
        self._label = label_feature(builder.info, name, label_key)
        if label_key == AUTO and self._label is None:
            self.unused = _lists_of_labels(name, list(label_lists(builder.info.features)))
        prepare(builder, name, download)
        self.keys = keys
        self.max_megapixels = max_megapixels
        self._title = name
        self._records = open_records(builder, name, split)
        self._split = f'{builder.data_dir} {split}'
        self._files = [i.filename for i in builder.info.splits[split].file_instructions]
        self._seen_labels = np.full(len(self), _UNREAD, np.int64)

    @functools.cached_property
    def label_names(self) -> Sequence[str]:  # type: ignore[override]
        """As in `Source`. If labels are plain numbers, all records are read to find the names."""
        if self._label is None:
            return ()
        names = getattr(self._label[1], 'names', None)
        return tuple(str(number) for number in self._numbers) if names is None else names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        return self.labels_of(np.arange(len(self)))

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        """Reads the labels from the records of the examples; decodes no picture.

        Args:
          indices: indices of the examples, int [any number].

        Returns:
          Labels as indices into `label_names`, int [len(indices)]; None without labels, or if all
          are -1, by which TFDS marks labels that are not public.

        Raises:
          UserError: some of the labels are -1, but not all.
          BadPicture: a record cannot be read.
        """
        if self._label is None:
            return None
        if getattr(self._label[1], 'names', None) is None:
            return self._numbered(self._read_labels(indices))
        labels = self._read_labels(indices)
        hidden = labels < 0
        if not hidden.any():
            return labels
        if hidden.all():
            return None
        raise UserError(
            f"{hidden.sum():,} of {len(labels):,} examples of TFDS '{self._title}' have no label "
            f'(-1 in {self._label[0]}), such as {self.name(int(indices[hidden.argmax()]))}. Choose '
            "another data.split, or use no labels: --config.data.label_key=''."
        )

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """All different labels, ascending, for labels without names; skips bad records."""
        labels = self._read_labels(np.arange(len(self)), skip=True)
        return np.unique(labels[labels != _UNREAD])

    def _numbered(self, labels: np.ndarray) -> np.ndarray:
        """The indices of labels in `_numbers`; -1 for a label that was skipped there."""
        known = np.isin(labels, self._numbers)
        return np.where(known, np.searchsorted(self._numbers, labels), -1)

    def shown_labels(self, indices: np.ndarray) -> np.ndarray:
        """As in `Source`; -1 also if a label is not public or its record cannot be read."""
        if self._label is None:
            return np.full(len(indices), -1)
        labels = self._read_labels(indices, skip=True)
        if getattr(self._label[1], 'names', None) is None:
            return self._numbered(labels)
        return np.where(labels == _UNREAD, -1, labels)

    def _read_labels(self, indices: np.ndarray, *, skip: bool = False) -> np.ndarray:
        """Reads labels from the records; records that were read before are not read again.

        Args:
          indices: indices of the examples, int [any number].
          skip: whether a record that cannot be read gives _UNREAD instead of an error.
        """
        for index in indices[self._seen_labels[indices] == _UNREAD].tolist():
            try:
                self._see_label(self._record(index), index)
            except BadPicture:
                if not skip:
                    raise
        return self._seen_labels[indices]

    def _see_label(self, record: Any, index: int) -> None:
        assert self._label is not None
        values = self._feature(record, index, self._label[0]).int64_list.value
        if len(values) != 1:
            raise self._bad(index, 'holds no label')
        self._seen_labels[index] = values[0]

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int, key: str) -> np.ndarray:
        record = self._record(index)
        if self._label is not None:
            self._see_label(record, index)
        with self._decoding(index):
            data = self._encoded(record, index, key)
            # Checks the size that the header declares, before the picture is decoded.
            read_header(io.BytesIO(data), self.name(index), self.max_megapixels)
            return _to_rgb(np.asarray(self._images[key].decode_example_np(data)))

    def size(self, index: int, key: str) -> tuple[int, int]:
        """Reads the size from the header; ignores the orientation in EXIF, as TFDS does."""
        data = io.BytesIO(self._encoded(self._record(index), index, key))
        height, width, _ = read_header(data, self.name(index), self.max_megapixels)
        return height, width

    def _encoded(self, record: Any, index: int, key: str) -> bytes:
        data = self._feature(record, index, key).bytes_list.value
        if len(data) != 1 or not data[0]:
            raise self._bad(index, 'holds no picture')
        return data[0]

    def name(self, index: int) -> str:
        return f'{self._title} #{index}'

    def stamp(self, index: int, key: str) -> tuple[str, str] | None:
        return f'{self._split} #{index} {key}', self._version

    @functools.cached_property
    def _version(self) -> str:
        """Changes with any file of the split, and with the version of TFDS, the decoder."""
        found = [(file, os.stat(file)) for file in self._files]
        files = (f'{file} {stat.st_size} {stat.st_mtime_ns}' for file, stat in found)
        return ' '.join([f'TFDS {tfds.__version__}', *files])

    def _record(self, index: int) -> Any:
        """The undecoded features of an example, by path."""
        with self._decoding(index):
            return tf.train.Example.FromString(self._records.read(index)).features.feature

    def _feature(self, record: Any, index: int, path: str) -> Any:
        if path not in record:
            raise self._bad(index, f"has no feature '{path}'")
        return record[path]

    def _bad(self, index: int, reason: str) -> BadPicture:
        return BadPicture(self.name(index), reason, _ADVICE)

    def _decoding(self, index: int) -> AbstractContextManager[None]:
        return decoding(self.name(index), 'cannot be read', _ADVICE)


def _lists_of_labels(name: str, paths: list[str]) -> tuple[str, ...]:
    if not paths:
        return ()
    return (
        f"left out, the labels of TFDS '{name}' ({', '.join(paths)}): a picture has any number of "
        'them, but accuracy needs exactly one',
    )


def _to_rgb(picture: np.ndarray) -> np.ndarray:
    """Converts any picture that TFDS decodes, [H, W, 1 to 4], to uint8 [H, W, 3]."""
    if picture.dtype == np.uint16:
        picture = picture / 257
    if picture.shape[-1] in (2, 4):
        # Transparent pixels are laid over black, as in `sources.decode`.
        picture = picture[..., :-1] * (picture[..., -1:] / 255)
    if picture.shape[-1] != 3:
        picture = np.repeat(picture[..., :1], 3, axis=-1)
    return np.rint(picture).astype(np.uint8) if picture.dtype != np.uint8 else picture
