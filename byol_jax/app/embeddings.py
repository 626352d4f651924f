"""Writes the features of many pictures to one file: NumPy's .npz or Apache Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.files import check_place, write_whole

# Bytes of features in a row group of Parquet. Writing holds one row group in memory a second time.
_ROW_GROUP_BYTES = 2**26


def check_embeddings_path(path: Path) -> None:
    """Checks that `write_embeddings` can write this file, before any picture is encoded.

    Raises:
      UserError: the suffix is neither '.npz' nor '.parquet', the path is a folder, one of its
        parents is a file, or the file is a '.parquet' and pyarrow is not installed.
    """
    if path.suffix not in _WRITERS:
        raise UserError(
            f'{path}: embeddings are written to a file that ends in {" or ".join(_WRITERS)}.'
        )
    check_place(path)
    if path.suffix == '.parquet':
        _pyarrow()


class Embeddings(NamedTuple):
    """Features with the names and labels of their pictures.

    Attributes:
      features: float32 [N, D].
      names: names of the N pictures.
      labels: int [N], indices into `label_names`; None without labels. An index out of range means
        that the picture has no label; its `label` in a .parquet is null.
      label_names: names of the labels.
      encoder_sha256: hexadecimal sha256 of the weights that made the features.
    """

    features: np.ndarray
    names: Sequence[str]
    labels: np.ndarray | None
    label_names: Sequence[str]
    encoder_sha256: str


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Writes features with the names and labels of their pictures, replacing an existing file.

    A .npz holds the arrays `features`, `names`, `encoder_sha256` and, if there are labels,
    `labels` and `label_names`; none needs pickle. A .parquet holds the columns `name` (string),
    `features` (float32 lists of fixed size D) and, if there are labels, `label` (string) and
    `label_index` (int64). The metadata of its schema holds `byol_jax.encoder_sha256` and
    `byol_jax.feature_size` (decimal digits).

    Args:
      path: file to write, '.npz' or '.parquet', in a folder that exists.
      embeddings: the features, names and labels.

    Raises:
      UserError: as for `check_embeddings_path`.
      ValueError: the numbers of names, labels and features differ.
      OSError: the file cannot be written; an older file of that name is kept.
    """
    check_embeddings_path(path)
    columns = [embeddings.names] + ([] if embeddings.labels is None else [embeddings.labels])
    if any(len(column) != len(embeddings.features) for column in columns):
        raise ValueError('names and labels must be as many as the features')
    write = _WRITERS[path.suffix]
    write_whole(path, lambda partial: write(partial, embeddings))


def _write_npz(path: Path, embeddings: Embeddings) -> None:
    features, names, labels, label_names, encoder_sha256 = embeddings
    arrays: dict[str, Any] = {
        'features': features,
        'names': np.array(names, str),
        'encoder_sha256': np.array(encoder_sha256),
    }
    if labels is not None:
        arrays |= {'labels': labels, 'label_names': np.array(label_names, str)}
    # An open file, because NumPy would add '.npz' to a name.
    with path.open('wb') as file:
        np.savez(file, **arrays)


def _write_parquet(path: Path, embeddings: Embeddings) -> None:
    features, names, labels, label_names, encoder_sha256 = embeddings
    pa = _pyarrow()
    size = features.shape[1]
    fields = [('name', pa.string()), ('features', pa.list_(pa.float32(), size))]
    if labels is not None:
        fields += [('label', pa.string()), ('label_index', pa.int64())]
    about = {'byol_jax.encoder_sha256': encoder_sha256, 'byol_jax.feature_size': str(size)}
    schema = pa.schema(fields, metadata=about)
    known = pa.array(_utf8(label_names), pa.string())

    def groups() -> Iterator[Any]:
        rows = max(1, _ROW_GROUP_BYTES // (4 * max(1, size)))
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            # No copy: Arrow uses the memory of the features.
            flat = pa.array(features[part].reshape(-1))
            columns = [
                pa.array(_utf8(names[part]), pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, type=schema.field('features').type),
            ]
            if labels is not None:
                index = np.asarray(labels[part], np.int64)
                unnamed = (index < 0) | (index >= len(label_names))
                columns += [known.take(pa.array(index, mask=unnamed)), pa.array(index)]
            yield pa.record_batch(columns, schema=schema)

    # Dictionaries and statistics of features would cost time and are of no use.
    options = {'use_dictionary': ['label'], 'write_statistics': ['name', 'label', 'label_index']}
    with pa.parquet.ParquetWriter(path, schema, **options) as writer:
        for group in groups():
            writer.write_batch(group)


_WRITERS: dict[str, Callable[..., None]] = {'.npz': _write_npz, '.parquet': _write_parquet}


def _utf8(names: Sequence[str]) -> list[str]:
    """Makes names valid UTF-8: a byte of a file's name that is no text becomes '\\udcXX'."""
    return [name.encode(errors='backslashreplace').decode() for name in names]


def _pyarrow() -> Any:
    # Imported late, because .npz does not need it.
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            'Parquet needs pyarrow: pip install pyarrow, or write .npz instead.'
        ) from error
    return pyarrow
