"""What the features are worth: protocols, neighbours, probes, clusters and label-free measures.

The names below are functions of plain arrays (features, labels) or what a protocol of one's own is
made of; each module is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol_jax.evaluation.clustering import clustering_score as clustering_score
    from byol_jax.evaluation.features import Labelled as Labelled
    from byol_jax.evaluation.features import encode_source as encode_source
    from byol_jax.evaluation.linear import linear_evaluation as linear_evaluation
    from byol_jax.evaluation.monitors import alignment as alignment
    from byol_jax.evaluation.monitors import lidar as lidar
    from byol_jax.evaluation.monitors import rank_me as rank_me
    from byol_jax.evaluation.monitors import uniformity as uniformity
    from byol_jax.evaluation.monitors import unit_std as unit_std
    from byol_jax.evaluation.neighbours import knn_accuracy as knn_accuracy
    from byol_jax.evaluation.neighbours import nearest as nearest
    from byol_jax.evaluation.neighbours import recall as recall
    from byol_jax.evaluation.probes import logistic_probe as logistic_probe
    from byol_jax.evaluation.probes import ridge_probe as ridge_probe
    from byol_jax.evaluation.protocols import Found as Found
    from byol_jax.evaluation.protocols import Metric as Metric
    from byol_jax.evaluation.protocols import Protocol as Protocol
    from byol_jax.evaluation.protocols import build_protocols as build_protocols
    from byol_jax.evaluation.protocols import measure_encoder as measure_encoder
    from byol_jax.evaluation.subject import FeatureSet as FeatureSet
    from byol_jax.evaluation.subject import Subject as Subject
    from byol_jax.evaluation.subject import Unmeasured as Unmeasured
    from byol_jax.evaluation.subject import subject_of as subject_of

_MODULES = {
    'clustering': ('clustering_score',),
    'features': ('Labelled', 'encode_source'),
    'linear': ('linear_evaluation',),
    'monitors': ('alignment', 'lidar', 'rank_me', 'uniformity', 'unit_std'),
    'neighbours': ('knn_accuracy', 'nearest', 'recall'),
    'probes': ('logistic_probe', 'ridge_probe'),
    'protocols': ('Found', 'Metric', 'Protocol', 'build_protocols', 'measure_encoder'),
    'subject': ('FeatureSet', 'Subject', 'Unmeasured', 'subject_of'),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_WHERE[name]}'), name)


def __dir__() -> list[str]:
    return __all__
