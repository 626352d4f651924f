"""Evaluation of features: protocols, neighbours, probes, clusters and label-free measures."""

from typing import TYPE_CHECKING

from byol_jax.lazy import lazy

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

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        'clustering': ('clustering_score',),
        'features': ('Labelled', 'encode_source'),
        'linear': ('linear_evaluation',),
        'monitors': ('alignment', 'lidar', 'rank_me', 'uniformity', 'unit_std'),
        'neighbours': ('knn_accuracy', 'nearest', 'recall'),
        'probes': ('logistic_probe', 'ridge_probe'),
        'protocols': ('Found', 'Metric', 'Protocol', 'build_protocols', 'measure_encoder'),
        'subject': ('FeatureSet', 'Subject', 'Unmeasured', 'subject_of'),
    },
)
