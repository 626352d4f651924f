"""Finds and prepares a TFDS data set on disk, and reads its records by number."""

from __future__ import annotations

import abc
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

import numpy as np
import tensorflow_datasets as tfds

import byol_jax.sources.quiet_tensorflow  # noqa: F401  (must come before TFDS imports it)
from byol_jax.errors import UserError, did_you_mean
from byol_jax.files import read_json
from byol_jax.names import check_word
from byol_jax.sources.folder import existing_folder

_DOWNLOAD_ERRORS = (
    OSError,  # includes the errors of requests
    AssertionError,  # files that must be downloaded by hand are missing
    tfds.download.DownloadError,
    tfds.download.download_manager.NonMatchingChecksumError,
)

# The beginning of TFDS's messages, without information for the user.
_PREFIX = re.compile('Failed to construct dataset ".*?", builder_kwargs ".*?": ')


def open_builder(name: str, data_dir: str | None) -> Any:
    """Finds a TFDS builder.

    Args:
      name: the data set's name, such as 'imagenette/160px-v2' or 'mnist:3.0.1'.
      data_dir: the folder where TFDS keeps its data; None for TFDS's default.

    Raises:
      UserError: the folder does not exist, or there is no such data set, config or version.
    """
    if data_dir and '://' in data_dir:
        raise UserError(
            f'data.path={data_dir} is not a folder on this machine. Records are read in random '
            'order, so copy the prepared data set to a local disk or mount it.'
        )
    if data_dir:
        _check_folder(Path(data_dir).expanduser())
    short = re.split('[/:]', name)[0]
    if ':' in name.split('/')[0] and name.split(':')[0] == 'huggingface':
        raise UserError(
            f"data.name='{name}': data sets of Hugging Face are read from the network. Prepare it "
            'with TFDS under a name of its own, or save its pictures to a folder.'
        )
    if data_dir:
        for path in sorted((Path(data_dir).expanduser() / short).glob('**/features.json')):
            _check_words(path)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f"data.name='{name}' is not a TFDS data set.{did_you_mean(short, known)} "
            'tensorflow.org/datasets/catalog lists them.'
        ) from error
    except (ValueError, AssertionError) as error:
        # TFDS reports an unknown config or version of a known data set by these errors.
        configs = ''
        if short in tfds.list_builders(with_community_datasets=False):
            names = tfds.builder_cls(short).builder_configs
            configs = f' Configs: {", ".join(names)}.' if names else ''
        said = _PREFIX.sub('', str(error).splitlines()[0])
        raise UserError(f"data.name='{name}': {said}{configs}") from error


def _check_words(path: Path) -> None:
    """Checks a prepared data set's features.json, whose words TFDS would import.

    Raises:
      UserError: it names a class of a module that neither is imported nor TFDS's own.
    """
    found: list[Any] = [read_json(path)]
    while found:
        value = found.pop()
        if not isinstance(value, dict):
            continue
        found += value.values()
        for key in ('type', 'pythonClassName', 'python_class_name'):
            word = value.get(key)
            module, _, name = str(word).rpartition('.')
            if isinstance(word, str) and module and not module.startswith('tensorflow_datasets.'):
                check_word(f'{module}:{name}', (), f'{path}: {key}', encoder=False)


def _check_folder(root: Path) -> None:
    try:
        existing_folder(root)
    except UserError as error:
        # Do not create the folder: with a mistyped path, everything would be downloaded again.
        made = '' if root.exists() else ' To let TFDS prepare data sets there, create the folder.'
        raise UserError(f'{error}{made}') from error


def prepare(builder: Any, name: str, download: bool) -> None:
    """Lets TFDS download and prepare a data set that is not on disk; otherwise uses no network.

    Args:
      builder: the data set's builder.
      name: the data set's name.
      download: whether TFDS may download; if not, a data set that is not on disk is an error.

    Raises:
      UserError: the data set is not on disk, and may not or cannot be downloaded.
    """
    if builder.is_prepared():
        return
    missing = f"TFDS '{name}' is not prepared in {builder.data_path}"
    manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    how = (
        f'{_others(builder)}Give the folder that holds it with --config.data.path=DIR; or prepare '
        f'it where the network can be reached, and copy {builder.data_path} from there:\n'
        f'{prepare_command(name, builder.data_dir_root)}'
    )
    if manual:
        how += f'\nIts archives must be downloaded by hand first: {" ".join(manual.split())[:600]}'
    if not download:
        raise UserError(f'{missing}, and data.download=False. {how}')
    try:
        if not manual:
            _check_hosts(builder)
        builder.download_and_prepare()
    except _DOWNLOAD_ERRORS as e:
        raise UserError(
            f'{missing} and could not be downloaded: {type(e).__name__}: {str(e)[:400]}\n{how}'
        ) from e


def prepare_command(name: str, data_dir: Any, file_format: str = '') -> str:
    """The command that prepares a data set without Apache Beam, which `tfds build` needs."""
    which = f", file_format='{file_format}'" if file_format else ''
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}'{which}).download_and_prepare()\""
    )


def _others(builder: Any) -> str:
    """A sentence that lists the versions and configs that are prepared; '' if there are none."""
    root = Path(builder.data_dir_root)
    found = sorted(path.parent for path in (root / builder.name).glob('**/dataset_info.json'))
    names = [f'{path.parent.relative_to(root).as_posix()}:{path.name}' for path in found]
    return f'Prepared there: {", ".join(names)}. ' if names else ''


def _check_hosts(builder: Any) -> None:
    """Raises OSError if a host to download from has no address; TFDS would retry for 3 minutes."""
    if urllib.request.getproxies():
        return  # The proxy resolves the names.
    urls = builder.url_infos or ()
    for host in sorted({urllib.parse.urlparse(url).hostname or '' for url in urls}):
        try:
            socket.getaddrinfo(host, 443)
        except socket.gaierror as error:
            raise OSError(f'{host} cannot be reached ({error.strerror})') from error


# TFRecord framing: the length (uint64), its CRC (uint32), the record, and its CRC (uint32).
_LENGTH = struct.Struct('<Q')
_HEADER, _FOOTER = 12, 4

# How many row groups of Parquet files are kept decoded, so that reading in the order on disk
# decodes each once. TFDS writes 100 records to a group, about 10 MB of photographs.
_ROW_GROUPS = 4


class Records(abc.ABC):
    """The serialized examples of a split, in their order on disk."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """Reads record `index`, a serialized tf.train.Example. Called from many threads."""


def open_records(builder: Any, name: str, split: str) -> Records:
    """Opens a split of a prepared data set, or a slice or sum of splits.

    Args:
      builder: the data set's builder.
      name: the data set's name, for messages.
      split: the split, such as 'train' or 'train[:10%]+test'.

    Raises:
      UserError: there is no such split, a file is missing or cut short, or the file format has no
        random access or needs a package that is not installed.
    """
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        known = list(builder.info.splits)
        numbers = [f'{key} ({builder.info.splits[key].num_examples:,})' for key in known]
        raise UserError(
            f"data.split='{split}' is not a split of TFDS '{name}'.{did_you_mean(split, known)} "
            f'Its splits, with their numbers of examples: {", ".join(numbers)}. Slices and sums of '
            "them are allowed, such as 'train[:10%]+test'."
        ) from error
    if not instructions or any(instruction.take < 0 for instruction in instructions):
        raise UserError(f"data.split='{split}' of TFDS '{name}' holds no example.")
    file_format = builder.info.file_format
    if file_format not in _READERS:
        raise UserError(
            f"TFDS '{name}' is prepared as {file_format.value}, which has no random access (these "
            f'do: {", ".join(f.value for f in _READERS)}). {_again(builder, name, "array_record")}'
        )
    for instruction in instructions:
        _check_file(instruction.filename, name)
    try:
        return _READERS[file_format](builder, split, instructions)
    except ModuleNotFoundError as error:
        package = _PACKAGES[file_format]
        raise UserError(
            f"TFDS '{name}' is prepared as {file_format.value}, and {package} is not installed: "
            f'pip install {package}. {_again(builder, name, "tfrecord")}'
        ) from error


def _again(builder: Any, name: str, file_format: str) -> str:
    """A sentence that says how to prepare a data set in another file format, in its own folder."""
    folder = Path(builder.data_dir_root) / file_format
    return (
        f'Or prepare it as {file_format}, and give --config.data.path={folder}:\n'
        f'mkdir -p {folder}; {prepare_command(name, folder, file_format)}'
    )


def _check_file(path: str, name: str) -> None:
    if not Path(path).is_file():
        raise UserError(
            f"TFDS '{name}' lacks {path}. Copy the file there, or delete the data set's folder and "
            'prepare it again.'
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or 'damaged'
    return UserError(f'{path} cannot be read: {said.rstrip(".")}. Mend it, or prepare it again.')


def _wrong_count(path: Path, found: int, declared: int) -> UserError:
    return UserError(
        f'{path} holds {found:,} records, but its dataset_info.json says {declared:,}: it was not '
        'copied completely, or belongs to another version. Prepare the data set again.'
    )


class _Files(Records):
    """Records in several files, of each of which some or all are used.

    Attributes:
      paths: paths of the files.
    """

    def __init__(self, instructions: Sequence[Any]):
        self.paths = [Path(instruction.filename) for instruction in instructions]
        self._skips = [instruction.skip for instruction in instructions]
        # The number of each file's first record, and of all records: [files + 1].
        self._starts = np.cumsum([0, *(instruction.take for instruction in instructions)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """Finds record `index`: (number of the file, number of the record in the file)."""
        file = int(np.searchsorted(self._starts, index, side='right')) - 1
        return file, int(index - self._starts[file]) + self._skips[file]


class TfRecords(_Files):
    """TFRecord files. An index of their records, 8 bytes each, is made from the headers."""

    def __init__(self, builder: Any, split: str, instructions: Sequence[Any]):
        """Reads the headers of all records. Raises UserError if a file is cut short."""
        super().__init__(instructions)
        self._bounds = []
        for path, instruction in zip(self.paths, instructions, strict=True):
            try:
                bounds = record_bounds(path)
            except OSError as error:
                raise _unreadable(path, error) from error
            if len(bounds) - 1 != instruction.examples_in_shard:
                raise _wrong_count(path, len(bounds) - 1, instruction.examples_in_shard)
            self._bounds.append(bounds)

    def read(self, index: int) -> bytes:
        file, number = self._place(index)
        begin, end = (int(bound) for bound in self._bounds[file][number : number + 2])
        with self.paths[file].open('rb', buffering=0) as stream:
            stream.seek(begin)
            data = stream.read(end - begin)
        length = end - begin - _HEADER - _FOOTER
        if len(data) < end - begin or _LENGTH.unpack_from(data)[0] != length:
            raise OSError(f'{self.paths[file]} has changed since the run began')
        return data[_HEADER:-_FOOTER]


def record_bounds(path: Path) -> np.ndarray:
    """The offset of each record in a TFRecord file, and of the last one's end.

    Returns:
      Offsets in bytes, int64 [N + 1].

    Raises:
      UserError: the file is cut short.
    """
    bounds, position = [0], 0
    unpack, cut = _LENGTH.unpack, f'{path} ends in the middle of a record: prepare it again.'
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        while position < size:
            head = os.pread(file, _LENGTH.size, position)
            if len(head) < _LENGTH.size:
                raise UserError(cut)
            position += unpack(head)[0] + _HEADER + _FOOTER
            bounds.append(position)
    finally:
        os.close(file)
    if position != size:
        raise UserError(cut)
    return np.array(bounds, np.int64)


class ArrayRecords(Records):
    """ArrayRecord files, which have an index of their own."""

    def __init__(self, builder: Any, split: str, instructions: Sequence[Any]):
        """Reads the number of records of every file. Raises UserError if one is damaged or cut."""
        from array_record.python import array_record_module

        for instruction in instructions:
            path = Path(instruction.filename)
            try:
                reader = array_record_module.ArrayRecordReader(str(path))
                count = reader.num_records()
                reader.close()
            except RuntimeError as error:
                raise _unreadable(path, error) from error
            if count != instruction.examples_in_shard:
                raise _wrong_count(path, count, instruction.examples_in_shard)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw)
        self._length = len(self._records)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> bytes:
        return self._records[index]


class ParquetRecords(_Files):
    """Parquet files as TFDS writes them: one column of serialized examples, in row groups.

    A row group is decoded as a whole, so reading a random record costs as much as reading about a
    hundred.
    """

    def __init__(self, builder: Any, split: str, instructions: Sequence[Any]):
        from pyarrow import parquet

        super().__init__(instructions)
        self._parquet = parquet
        self._metadata, self._groups = [], []
        for path, instruction in zip(self.paths, instructions, strict=True):
            try:
                metadata = parquet.read_metadata(path)
            except (OSError, ValueError) as error:
                raise _unreadable(path, error) from error
            if metadata.num_rows != instruction.examples_in_shard:
                name = '/'.join(builder.info.full_name.split('/')[:-1])  # without the version
                raise UserError(
                    f'{_wrong_count(path, metadata.num_rows, instruction.examples_in_shard)} Not '
                    'as Parquet: TFDS 4.9.10 drops records there when a file has more than 100. '
                    f'{_again(builder, name, "array_record")}'
                )
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._metadata.append(metadata)
            self._groups.append(np.cumsum([0, *rows]))
        self._column = functools.lru_cache(_ROW_GROUPS)(self._read_group)

    def read(self, index: int) -> bytes:
        file, number = self._place(index)
        group = int(np.searchsorted(self._groups[file], number, side='right')) - 1
        return self._column(file, group)[number - int(self._groups[file][group])].as_py()

    def _read_group(self, file: int, group: int) -> Any:
        # Each call opens the file, because a ParquetFile is not thread-safe.
        with self._parquet.ParquetFile(self.paths[file], metadata=self._metadata[file]) as opened:
            return opened.read_row_group(group, use_threads=False).column(0)


_READERS: dict[Any, Any] = {
    tfds.core.FileFormat.TFRECORD: TfRecords,
    tfds.core.FileFormat.ARRAY_RECORD: ArrayRecords,
    tfds.core.FileFormat.PARQUET: ParquetRecords,
}
_PACKAGES = {
    tfds.core.FileFormat.ARRAY_RECORD: 'array_record',
    tfds.core.FileFormat.PARQUET: 'pyarrow',
}
