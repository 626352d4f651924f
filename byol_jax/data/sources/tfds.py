"""Image data sets of TensorFlow Datasets, by name, with random access."""

from __future__ import annotations

import functools
import os
import re
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError

import byol_jax.data.quiet_tensorflow  # noqa: F401  (must come before TFDS imports it)
from byol_jax.data.sources.base import Source
from byol_jax.errors import BadPicture, UserError, did_you_mean

_DOWNLOAD_ERRORS = (
    OSError,  # those of requests among them
    AssertionError,  # files that must be downloaded by hand are missing
    tfds.download.DownloadError,
    tfds.download.download_manager.NonMatchingChecksumError,
)

# What comes of a damaged record, depending on the file's format and on what decodes its pictures:
# ArrayRecord's reader raises RuntimeError, and a picture that OpenCV gives up on is a None.
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    SyntaxError,
    TypeError,
    AttributeError,
    DecodeError,
    cv2.error,
)

# TFRecord framing: uint64 length, uint32 crc of it, the record, uint32 crc of the record.
_LENGTH = struct.Struct('<Q')
_HEADER, _FOOTER = 12, 4


class Tfds(Source):
    """One split of a TFDS data set; downloads and prepares it if it is not on disk yet."""

    labels_at_hand = False

    def __init__(
        self, name: str, split: str, data_dir: str | None = None, keys: tuple[str, ...] = ('image',)
    ):
        """Opens the data set.

        Args:
          name: such as 'imagenette/160px-v2' or 'div2k/bicubic_x2'.
          split: such as 'train' or 'train[:90%]'; slices work on every format.
          data_dir: where TFDS keeps its data; by default its own choice.
          keys: features that hold the pictures.

        Raises:
          UserError: no such data set, split or feature, or it can be neither found nor downloaded.
        """
        builder = _builder(name, data_dir or None)
        self._check_features(builder, name, keys)
        _prepare(builder, name)
        self.keys = keys
        self._title = name
        self._records = _records(builder, name, split)
        self._split = f'{builder.data_dir} {split}'
        self._files = [i.filename for i in builder.info.splits[split].file_instructions]
        features = builder.info.features
        label = features['label'] if 'label' in features else None  # noqa: SIM401 (no get)
        if isinstance(label, tfds.features.ClassLabel):
            self.label_names = label.names

    @functools.cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        return self.labels_of(np.arange(len(self)))

    def labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        if not self.label_names:
            return None
        return np.array([int(self._record(int(i))['label']) for i in indices], np.int64)

    @staticmethod
    def _check_features(builder: Any, name: str, keys: tuple[str, ...]) -> None:
        features = builder.info.features
        images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
        for key in keys:
            if key not in images:
                raise UserError(
                    f"data.pair_keys names '{key}', but the pictures of TFDS '{name}' are: "
                    f'{", ".join(images) or "none"}.{did_you_mean(key, images)}'
                )

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int, key: str) -> np.ndarray:
        picture = np.asarray(self._record(index)[key])
        if picture.dtype == np.uint16:
            picture = np.rint(picture / 257).astype(np.uint8)
        if picture.shape[-1] == 4:
            # Alpha over black, as files are decoded.
            picture = np.rint(picture[..., :3] * (picture[..., 3:] / 255)).astype(np.uint8)
        if picture.shape[-1] != 3:
            picture = np.repeat(picture[..., :1], 3, axis=-1)
        return picture

    def name(self, index: int) -> str:
        return f'{self._title} #{index}'

    def stamp(self, index: int, key: str) -> tuple[str, str] | None:
        return f'{self._split} #{index} {key}', self._version

    @functools.cached_property
    def _version(self) -> str:
        """What changes when a file of the split does."""
        found = [(file, os.stat(file)) for file in self._files]
        return ' '.join(f'{file} {stat.st_size} {stat.st_mtime_ns}' for file, stat in found)

    def _record(self, index: int) -> Any:
        try:
            return self._records[index]
        except _UNREADABLE as error:
            said = ' '.join(str(error).split())[:300].rstrip('.')
            raise BadPicture(
                self.name(index),
                f'cannot be read: {type(error).__name__}: {said}',
                'Prepare the data set again.',
            ) from error


def _builder(name: str, data_dir: str | None) -> Any:
    short = re.split('[/:]', name)[0]
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f"data.name='{name}' is no TFDS data set.{did_you_mean(short, known)} "
            'tensorflow.org/datasets/catalog lists them.'
        ) from error
    except (ValueError, AssertionError) as error:
        # How TFDS reports an unknown config or version of a data set it knows.
        configs = ''
        if short in tfds.list_builders(with_community_datasets=False):
            names = tfds.builder_cls(short).builder_configs
            configs = f' Configs: {", ".join(names)}.' if names else ''
        raise UserError(f"data.name='{name}': {str(error).splitlines()[0]}{configs}") from error


def _prepare(builder: Any, name: str) -> None:
    if builder.is_prepared():
        return
    try:
        _check_hosts(builder)
        builder.download_and_prepare()
    except _DOWNLOAD_ERRORS as e:
        raise UserError(
            f"TFDS '{name}' is not prepared in {builder.data_dir} and could not be downloaded: "
            f'{type(e).__name__}: {str(e)[:400]}'
        ) from e


def _check_hosts(builder: Any) -> None:
    """Raises OSError at once if a host to download from has no address.

    TFDS would try again for over three minutes before it gave up.
    """
    if urllib.request.getproxies():
        return  # The proxy resolves the names.
    urls = builder.url_infos or ()
    for host in sorted({urllib.parse.urlparse(url).hostname or '' for url in urls}):
        try:
            socket.getaddrinfo(host, 443)
        except socket.gaierror as error:
            raise OSError(f'{host} cannot be reached ({error.strerror})') from error


def _records(builder: Any, name: str, split: str) -> Sequence[Any]:
    """The split's examples, by index, in either file format."""
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        known = list(builder.info.splits)
        raise UserError(
            f"data.split='{split}' is no split of TFDS '{name}'.{did_you_mean(split, known)} "
            f'It has: {", ".join(known)}.'
        ) from error
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return builder.as_data_source(split) if instructions else ()
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        return TfRecords(instructions, builder.info.features)
    raise UserError(
        f"TFDS '{name}' is prepared as {builder.info.file_format}, which has no random access. "
        "Prepare it again with file_format='array_record'."
    )


class TfRecords(Sequence[Any]):
    """Random access to TFRecord files: an index of offsets, made from the records' headers."""

    def __init__(self, instructions: Sequence[Any], features: Any):
        self._features = features
        self._files: list[str] = []
        places = []
        for instruction in instructions:
            offsets = _offsets(Path(instruction.filename))
            stop = None if instruction.take == -1 else instruction.skip + instruction.take
            kept = offsets[instruction.skip : stop]
            places += [(len(self._files), *place) for place in kept]
            self._files.append(str(instruction.filename))
        # [N, 3]: file, offset and length of each record, in bytes.
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        file, offset, length = (int(v) for v in self._places[index])
        with open(self._files[file], 'rb') as stream:
            stream.seek(offset)
            return self._features.deserialize_example_np(stream.read(length))


def _offsets(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of every record's payload, bytes."""
    places, position, size = [], 0, path.stat().st_size
    with path.open('rb') as stream:
        while position < size:
            stream.seek(position)
            head = stream.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                raise UserError(f'{path} ends in the middle of a record: prepare it again.')
            (length,) = _LENGTH.unpack(head)
            position += _HEADER
            if position + length + _FOOTER > size:
                raise UserError(f'{path} ends in the middle of a record: prepare it again.')
            places.append((position, length))
            position += length + _FOOTER
    return places
