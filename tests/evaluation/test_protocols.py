"""Protocols on plain arrays, the user's own ones, and their names and arguments in a config."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from byol_jax import UserError, evaluation
from byol_jax.evaluation import FeatureSet, Found, Metric, Protocol, Subject, Unmeasured
from byol_jax.evaluation.protocols import PROTOCOLS, Knn, build_protocols, measure_encoder
from byol_jax.settings import Settings
from configs import default

C, D = 3, 6


def features(count, seed):
    """Classes around fixed centres, which overlap a little."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, count)
    centres = np.random.default_rng(9).normal(size=(C, D))
    return FeatureSet(centres[labels] + 0.3 * rng.normal(size=(count, D)), labels)


def subject(**changes):
    return Subject(**{'gallery': features(90, 0), 'queries': features(40, 1), **changes})


def options(*protocols, **changes):
    config = default.get_config()
    config.evaluate.update({'protocols': protocols, 'knn_k': (5,), **changes})
    return Settings.of(config).evaluate


@dataclasses.dataclass(frozen=True)
class Spread(Protocol):
    """A user's own protocol: the largest norm over the smallest."""

    factor: float = 1.0

    @property
    def metrics(self):
        return ['spread']

    def measure(self, subject):
        if len(subject.gallery) < 2:
            raise Unmeasured('one picture has no spread')
        norms = np.linalg.norm(subject.gallery.features, axis=1)
        ratio = self.factor * norms.max() / norms.min()
        return Found({'spread': Metric(ratio, 'largest over smallest norm', '.2f')})


def count(subject, *, times=1):
    """A protocol as a function, whose metric has no explanation."""
    return Found({'count': times * len(subject.gallery)}, {'times': times})


def wrong(subject):
    """Returns no `Found`."""
    return {'x': 1.0}


def nan(subject):
    """One of its two metrics is NaN."""
    return Found({'fine': 1.0, 'broken': float('nan'), 'count': 2.0})


class NoProtocol:
    """A class without `measure`."""


def test_all_of_ours_that_need_no_pictures():
    """Arrays are enough for all protocols but the two that need new views, which say so."""
    built = build_protocols(options(*PROTOCOLS, knn_k=(5, 20)))
    assert list(built) == list(PROTOCOLS)
    lines = []
    found = measure_encoder(subject(say=lines.append), built)
    assert set(found.metrics) == {'feature_std', 'rankme', 'knn_5', 'knn_20', 'kmeans_nmi'} | {
        'ridge',
        'probe',
    }
    assert set(found.unmeasured) == {'recall_1', 'recall_5', 'linear'}
    assert 'only their features are given' in found.unmeasured['recall_1']
    assert found.metrics['knn_5'].value > 0.9
    assert all(metric.explained for metric in found.metrics.values())
    assert [line.split(':')[0] for line in lines] == ['spectrum', 'knn', 'kmeans', 'ridge', 'probe']


def test_the_same_numbers_as_the_functions():
    """A protocol gives the numbers of the function that it wraps."""
    gallery, queries = features(90, 0), features(40, 1)
    found = measure_encoder(subject(), build_protocols(options('knn', 'kmeans', 'spectrum')))
    sets = gallery.features, gallery.labels, queries.features, queries.labels
    assert found.metrics['knn_5'].value == evaluation.knn_accuracy(*sets, k=5)
    nmi = evaluation.clustering_score(queries.features, queries.labels, seed=0)
    assert found.metrics['kmeans_nmi'].value == nmi
    assert found.metrics['rankme'].value == evaluation.rank_me(gallery.features)


def test_ones_own(monkeypatch):
    """A class or a function, with arguments; its explanations are kept."""
    own = options(
        (f'{__name__}:Spread', {'factor': 2.0}), (f'{__name__}:count', {'times': 3}), 'spectrum'
    )
    found = measure_encoder(subject(), build_protocols(own))
    norms = np.linalg.norm(features(90, 0).features, axis=1)
    spread = found.metrics['spread']
    assert spread.value == pytest.approx(2 * norms.max() / norms.min())
    assert (spread.explained, spread.shown) == ('largest over smallest norm', '.2f')
    assert found.metrics['count'] == Metric(270.0)
    about = found.protocols[f'{__name__}:count']
    assert (about['times'], set(about)) == (3, {'times', 'seconds'})
    one = FeatureSet(np.ones((1, D)))
    found = measure_encoder(subject(gallery=one), build_protocols(own))
    assert found.unmeasured == {'spread': 'one picture has no spread'}


def test_what_own_protocols_may_get_wrong():
    """Results other than `Found`, NaN, and the name of another protocol's metric are errors."""
    with pytest.raises(
        UserError, match=r":wrong' returned a dict, not a byol_jax.evaluation.Found"
    ):
        measure_encoder(subject(), build_protocols(options(f'{__name__}:wrong')))
    both = build_protocols(options(f'{__name__}:count', f'{__name__}:nan'))
    found = measure_encoder(subject(), both)
    assert set(found.metrics) == {'count', 'fine', f'{__name__}:nan/count'}
    assert found.unmeasured == {'broken': 'its value is nan'}


def test_arguments_beside_a_name_go_before_the_flat_keys():
    """evaluate.knn_k and the like are arguments of the built-in protocols; others override them."""
    built = build_protocols(options(('knn', {'k': (1, 3)}), knn_temperature=0.5))
    assert built == {'knn': Knn((1, 3), 0.5)}


@pytest.mark.parametrize(
    ('protocols', 'words'),
    [
        ((), 'measures nothing'),
        (('liner',), r"'liner' is not a known protocol.*mean 'linear'"),
        (('knn', ('knn', {'k': (1,)})), "names 'knn' twice"),
        ((('knn', {'n': 3}),), r"'knn' takes no argument 'n'.*k, temperature"),
        ((('knn', {'k': (0,)}),), 'knn.k=.* must be different numbers above 0'),
        ((('kmeans', {'restarts': 0}),), "do not fit 'kmeans': restarts=0 must be above 0"),
        ((('spectrum', {'rows': -1}),), 'rows=-1 must be above 0'),
        ((('probe', {'penalties': ()}),), r'penalties=\(\) must be above 0'),
        ((('ridge', {'penalties': (1.0, 0.0)}),), r'penalties=\(1.0, 0.0\) must be above 0'),
        ((('retrieval', {'ranks': (0, 5)}),), r'ranks=\(0, 5\) must be above 0'),
        ((3,), 'neither a name nor'),
        ((f'{__name__}:cuont',), "has no 'cuont'"),
        (((f'{__name__}:count', {'subject': 3}),), "takes no argument 'subject'"),
        ((f'{__name__}:NoProtocol',), 'neither a subclass of byol_jax.evaluation.Protocol nor'),
    ],
)
def test_names_and_arguments_that_cannot_be(protocols, words):
    """One line says what was given and what exists, before anything is measured."""
    with pytest.raises(UserError, match=words):
        build_protocols(options(*protocols))


def test_every_name_of_the_package_is_there():
    """Each public name can be imported, and a wrong one is an AttributeError."""
    for name in evaluation.__all__:
        assert getattr(evaluation, name).__name__ == name
    with pytest.raises(AttributeError, match='no attribute'):
        evaluation.nothing  # noqa: B018
