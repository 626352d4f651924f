"""Features of many pictures as one file: NumPy's .npz or Apache Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.files import check_place, write_whole

# Bytes of features in a row group of Parquet: what is in memory twice while it is written.
_ROW_GROUP_BYTES = 2**26


def check_embeddings_path(path: Path) -> None:
    """Checks, before the pictures are encoded, that `write_embeddings` can write this file.

    Raises:
      UserError: the suffix is neither '.npz' nor '.parquet', a folder (or a file where a folder
        should be) is in the way, or the suffix asks for pyarrow, which is not installed.
    """
    if path.suffix not in _WRITERS:
        raise UserError(
            f'{path}: embeddings are written to a file that ends in {" or ".join(_WRITERS)}.'
        )
    check_place(path)
    if path.suffix == '.parquet':
        _pyarrow()


class Embeddings(NamedTuple):
    """Features and whose they are.

    Attributes:
      features: float32 [N, D].
      names: of the N pictures.
      labels: int [N], indices into label_names, or None. One that is no index has no name: in a
        .parquet its `label` is null.
      label_names: of the labels.
      encoder_sha256: hexadecimal digest of the weights that made the features.
    """

    features: np.ndarray
    names: Sequence[str]
    labels: np.ndarray | None
    label_names: Sequence[str]
    encoder_sha256: str


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Writes features with the names and labels of their pictures; the file is replaced as a whole.

    A .npz holds the arrays `features`, `names`, `encoder_sha256` and, where there are labels,
    `labels` and `label_names`; none needs pickle. A .parquet holds the columns `name` (string),
    `features` (float32 lists of fixed size D) and, where there are labels, `label` (string) and
    `label_index` (int64); its schema's metadata holds `byol_jax.encoder_sha256` and
    `byol_jax.feature_size`, the latter in decimal digits.

    Args:
      path: what to write, in a folder that exists; the suffix says which of the two.
      embeddings: what to write.

    Raises:
      UserError: what `check_embeddings_path` raises.
      ValueError: there are not as many names or labels as features.
      OSError: the file could not be written; what was there before still is.
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
    # A file, not its name, to which NumPy would add '.npz'.
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
            # A view of the features: Arrow takes their memory as it lies.
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

    # Dictionaries and statistics of features would cost time and help nobody.
    options = {'use_dictionary': ['label'], 'write_statistics': ['name', 'label', 'label_index']}
    with pa.parquet.ParquetWriter(path, schema, **options) as writer:
        for group in groups():
            writer.write_batch(group)


_WRITERS: dict[str, Callable[..., None]] = {'.npz': _write_npz, '.parquet': _write_parquet}


def _utf8(names: Sequence[str]) -> list[str]:
    """Names as UTF-8 can say them: what is no text in a file's name becomes '\\udcXX'."""
    return [name.encode(errors='backslashreplace').decode() for name in names]


def _pyarrow() -> Any:
    # Imported where it is needed: .npz does without.
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            'Parquet needs pyarrow: pip install pyarrow, or write .npz instead.'
        ) from error
    return pyarrow
