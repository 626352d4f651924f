"""Which features of a TFDS data set are its pictures, and which one is its label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from byol_jax.errors import UserError, did_you_mean

# data.label_key of a data set that is left to declare its label itself.
AUTO = 'auto'

_SEQUENCES = (tfds.features.Sequence, tfds.features.Dataset)


def flatten_features(features: Any, above: str = '') -> Iterator[tuple[str, Any]]:
    """(path, feature) of every feature that an example has once, such as ('x/image', Image).

    The path is also the key of the feature in a serialized example. What lies in a sequence is not
    entered: the sequence is the feature.
    """
    for key, feature in features.items():
        path = f'{above}{key}'
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from flatten_features(feature, f'{path}/')
        else:
            yield path, feature


def picture_features(features: Any, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The features that hold the pictures `keys`.

    Raises:
      UserError: one is no picture, or there are several in an example, or it holds measurements.
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
    """Why an Image feature is no picture to train on, or ''."""
    if feature.np_dtype == np.float32:
        return ' That feature holds 32-bit floats (depth, say), whose range is not known.'
    if len(feature.shape) != 3:
        return ' That feature holds animations.'
    return ''


def _several(flat: Mapping[str, Any], key: str) -> str:
    """Says that a feature lies in a sequence, or ''."""
    for path, feature in flat.items():
        if _is_sequence(feature) and (key == path or key.startswith(f'{path}/')):
            return (
                f" '{path}' is a sequence with any number of entries an example, of which none is "
                'the picture.'
            )
    return ''


def label_feature(info: Any, name: str, key: str) -> tuple[str, Any] | None:
    """The feature that holds the labels.

    Args:
      info: of the data set.
      name: of the data set, for messages.
      key: the feature's path; 'auto': the one that the data set declares (supervised_keys), or is
        called 'label', or is its only ClassLabel; '': none.

    Returns:
      (path, feature), a ClassLabel or an integer; None if there is none.

    Raises:
      UserError: there are several that could be meant, or `key` names something else.
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
    """Paths of the class labels of which an example has any number, such as 'objects/label'."""
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
    what = f'is no feature of TFDS {name!r}'
    if _several(flat, key):
        what = 'holds any number of labels for a picture, and accuracy is of one'
    elif key in flat:
        what = f'({type(flat[key]).__name__}) is no whole number'
    return (
        f"data.label_key='{key}' {what}. Features that can be the label: "
        f'{", ".join(usable) or "none"}.{did_you_mean(key, usable)} '
        "--config.data.label_key='' does without."
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
    """The names in TFDS's supervised_keys, which nest like features do."""
    if isinstance(keys, str):
        return [keys]
    if isinstance(keys, Mapping):
        keys = keys.values()
    return [name for part in keys or () for name in _supervised(part)]
