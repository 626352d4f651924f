"""Evaluation protocols: ways to measure an encoder's features, built in or the user's own."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from byol_jax.errors import UserError
from byol_jax.evaluation.clustering import clustering_score
from byol_jax.evaluation.features import Labelled
from byol_jax.evaluation.linear import LEARNING_RATES, linear_evaluation
from byol_jax.evaluation.monitors import rank_me, unit_std
from byol_jax.evaluation.neighbours import nearest, recall, vote_accuracy
from byol_jax.evaluation.probes import PENALTIES, ProbeResult, logistic_probe, ridge_probe
from byol_jax.evaluation.subject import Subject, Unmeasured, check_several
from byol_jax.names import Registry
from byol_jax.settings import PROTOCOL_KEYS, Evaluate
from byol_jax.sources.bad_files import BadFile

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Metric(NamedTuple):
    """A number and how to show it.

    Attributes:
      value: the number, finite.
      explained: what it is, in a few words that are printed after name and value.
      shown: format specification that the value is printed with.
    """

    value: float
    explained: str = ''
    shown: str = '.4g'


class Found(NamedTuple):
    """The result of a protocol.

    Attributes:
      metrics: metrics by name; a plain number is a `Metric` without an explanation.
      details: the options and counts behind them, as JSON values.
      unmeasured: the reason why a metric could not be measured, by its name.
      bad: files that could not be read, beyond those in `Subject.pictures.bad`.
    """

    metrics: Mapping[str, Metric | float]
    details: Mapping[str, Any] = _NOTHING
    unmeasured: Mapping[str, str] = _NOTHING
    bad: Sequence[BadFile] = ()


class Protocol(abc.ABC):
    """A way of measuring an encoder.

    A protocol of your own is a subclass (most simply a frozen dataclass whose fields are its
    options) or a function (subject, **options) -> Found. `evaluate.protocols` can name either.
    """

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics that are reported as unmeasured if `measure` raises `Unmeasured`.

        If empty, the name of the protocol is reported.
        """
        return ()

    @abc.abstractmethod
    def measure(self, subject: Subject) -> Found:
        """Measures an encoder.

        Args:
          subject: the encoder's features, their labels and the pictures behind them.

        Raises:
          Unmeasured: the data do not allow it; the message says why.
        """


def _check_above_0(**arguments: float | Sequence[float]) -> None:
    """Raises ValueError if an argument, or one of its numbers, is not above 0, or has none."""
    for name, value in arguments.items():
        values = value if isinstance(value, Sequence) else (value,)
        if not values or not min(values) > 0:
            raise ValueError(f'{name}={value} must be above 0')


@dataclasses.dataclass(frozen=True)
class Knn(Protocol):
    """k-nearest-neighbour accuracy (Wu et al. 2018, arXiv:1805.01978, Section 3.4).

    Attributes:
      k: numbers of neighbours that vote; a metric for each.
      temperature: the weight of a neighbour's vote is exp(cosine / temperature).
    """

    k: Sequence[int] = (20, 200)
    temperature: float = 0.07

    def __post_init__(self) -> None:
        _check_above_0(k=self.k, temperature=self.temperature)

    @property
    def metrics(self) -> Sequence[str]:
        return [f'knn_{k}' for k in self.k]

    def measure(self, subject: Subject) -> Found:
        train, test = subject.labelled
        count = len(train.labels)
        possible = [k for k in self.k if k <= count]
        metrics = {}
        if possible:
            found = nearest(train.features, test.features, max(possible))
            for k in possible:
                vote = found.first(k), train.labels, test.labels, self.temperature
                metrics[f'knn_{k}'] = _share(
                    vote_accuracy(*vote),
                    f'accuracy, vote of the {k} nearest training pictures, T={self.temperature:g}',
                )
        return Found(
            metrics,
            {'temperature': self.temperature, 'k': possible},
            {
                f'knn_{k}': f'there are only {count:,} training pictures, fewer than {k:,}'
                for k in self.k
                if k > count
            },
        )


@dataclasses.dataclass(frozen=True)
class Linear(Protocol):
    """BYOL's linear evaluation, with new random crops and flips in every epoch; see `linear`.

    Attributes:
      learning_rates: base learning rates for a batch of 256; held-out training pictures choose one.
      epochs: passes over the training pictures.
      batch_size: pictures per step.
    """

    learning_rates: Sequence[float] = LEARNING_RATES
    epochs: int = 80
    batch_size: int = 1024

    def __post_init__(self) -> None:
        _check_above_0(
            learning_rates=self.learning_rates, epochs=self.epochs, batch_size=self.batch_size
        )

    @property
    def metrics(self) -> Sequence[str]:
        return ['linear']

    def measure(self, subject: Subject) -> Found:
        train, test = subject.labelled
        held = subject.choosing
        examples = int(np.sum(~held))
        steps = self.epochs * examples // self.batch_size
        if not steps:
            raise Unmeasured(
                f'{self.epochs} epochs of {examples:,} training pictures are less than one batch '
                f'of {self.batch_size:,}; lower evaluate.linear_batch_size'
            )
        crops = subject.at_hand.crops(np.flatnonzero(~held))
        subject.say(
            f'linear: {self.epochs} epochs of new crops of {examples:,} pictures; '
            'evaluate.protocols can leave it out'
        )
        result = linear_evaluation(
            crops,
            examples,
            Labelled(train.features[held], train.labels[held]),
            test,
            classes=subject.classes,
            learning_rates=self.learning_rates,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=subject.seed,
            progress=subject.progress,
        )
        about = {
            'epochs': self.epochs,
            'batch_size': self.batch_size,
            'steps': steps,
            'trained_on': examples,
        }
        how = f'SGD on random crops, learning rate {result.chosen:g} chosen'
        return _of_probe(subject, 'linear', 'learning_rate', result, how, about)


@dataclasses.dataclass(frozen=True)
class _FittedProbe(Protocol):
    """A linear classifier that is fitted to the features of centre crops; see `probes`.

    Attributes:
      metric: name of its accuracy.
      method: what it is, in words.
      fit: fits and tests it.
      penalties: L2 penalties, each above 0; held-out training pictures choose one.
    """

    metric: ClassVar[str]
    method: ClassVar[str]
    fit: ClassVar[Callable[..., ProbeResult]]

    penalties: Sequence[float] = PENALTIES

    def __post_init__(self) -> None:
        _check_above_0(penalties=self.penalties)

    @property
    def metrics(self) -> Sequence[str]:
        return [self.metric]

    def measure(self, subject: Subject) -> Found:
        train, test = subject.labelled
        result = self.fit(
            train,
            test,
            classes=subject.classes,
            penalties=self.penalties,
            held_out=subject.choosing,
        )
        how = f'{self.method} on centre crops, penalty {result.chosen:g} chosen'
        return _of_probe(subject, self.metric, 'penalty', result, how, {})


class LogisticProbe(_FittedProbe):
    """Logistic regression on the features of centre crops; see `probes.logistic_probe`."""

    metric, method, fit = 'probe', 'logistic regression', staticmethod(logistic_probe)


class RidgeProbe(_FittedProbe):
    """Ridge regression on the features of centre crops; see `probes.ridge_probe`."""

    metric, method, fit = 'ridge', 'ridge regression', staticmethod(ridge_probe)


def _of_probe(
    subject: Subject,
    name: str,
    tuned: str,
    result: ProbeResult,
    how: str,
    about: Mapping[str, Any],
) -> Found:
    metrics = {name: _share(result.top1, f'accuracy, {how}')}
    # With five classes or fewer, top-5 accuracy is always 1.
    if subject.classes > 5:
        metrics[f'{name}_top5'] = _share(result.top5, f'top-5 accuracy, {how}')
    return Found(
        metrics,
        {
            **about,
            tuned: result.chosen,
            'held_out_accuracy': {f'{value:g}': x for value, x in result.held_out.items()},
            'chosen_on': int(np.sum(subject.choosing)),
        },
    )


@dataclasses.dataclass(frozen=True)
class KMeans(Protocol):
    """Agreement of k-means clusters of the features, one per label, with the labels.

    Attributes:
      restarts: number of k-means runs, of which the best is used.
    """

    restarts: int = 10

    def __post_init__(self) -> None:
        _check_above_0(restarts=self.restarts)

    @property
    def metrics(self) -> Sequence[str]:
        return ['kmeans_nmi']

    def measure(self, subject: Subject) -> Found:
        what, pictures = subject.shown
        if pictures.labels is None:
            raise Unmeasured('the data have no labels to compare clusters with')
        check_several(pictures)
        score = clustering_score(
            pictures.features, pictures.labels, seed=subject.seed, restarts=self.restarts
        )
        clusters = len(np.unique(pictures.labels))
        explained = (
            f'mutual information of {clusters:,} clusters of the {len(pictures):,} {what} pictures '
            'with their labels, 0 to 1'
        )
        return Found(
            {'kmeans_nmi': Metric(score, explained, '.3f')},
            {'pictures': len(pictures), 'of': what, 'clusters': clusters},
        )


@dataclasses.dataclass(frozen=True)
class Retrieval(Protocol):
    """Recall: does view 1 of a picture find its own view 2 among the views 2 of many pictures?

    Attributes:
      pool: number of pictures, at most; only one of pictures that belong together is used.
      ranks: the values of k of recall@k.
    """

    pool: int = 1000
    ranks: Sequence[int] = (1, 5)

    def __post_init__(self) -> None:
        _check_above_0(pool=self.pool, ranks=self.ranks)

    @property
    def metrics(self) -> Sequence[str]:
        return [f'recall_{k}' for k in self.ranks]

    def measure(self, subject: Subject) -> Found:
        what, _ = subject.shown
        view1, view2, bad = subject.at_hand.pairs(self.pool)
        pool = len(view1)
        if pool <= max(self.ranks):
            raise Unmeasured(f'a pool of {pool} pictures is too small')
        metrics = {}
        for k, found in recall(view1, view2, self.ranks).items():
            where = 'nearest' if k == 1 else f'among the {k} nearest'
            metrics[f'recall_{k}'] = _share(
                found,
                f'other view {where}, in a pool of {pool:,} {what} pictures; chance {k / pool:.1%}',
            )
        chance = {f'recall_{k}': k / pool for k in self.ranks}
        return Found(metrics, {'pool': pool, 'of': what, 'chance': chance}, bad=bad)


@dataclasses.dataclass(frozen=True)
class Spectrum(Protocol):
    """Std and effective rank (RankMe) of the gallery's features; needs no labels; see `monitors`.

    Attributes:
      rows: number of rows that RankMe uses at most, evenly spaced; 25,600 in the paper
        (arXiv:2210.02885, Appendix G).
    """

    rows: int = 25_600

    def __post_init__(self) -> None:
        _check_above_0(rows=self.rows)

    @property
    def metrics(self) -> Sequence[str]:
        return ['feature_std', 'rankme']

    def measure(self, subject: Subject) -> Found:
        features = subject.gallery.features
        count, size = features.shape
        rows = features
        if count > self.rows:
            rows = rows[np.linspace(0, count - 1, self.rows).astype(int)]
        spread = f'at unit length; at most {size**-0.5:.4f}, 0 is collapse'
        rank = f'directions in use, of at most {min(len(rows), size):,}'
        return Found(
            {
                'feature_std': Metric(unit_std(features), spread, '.4f'),
                'rankme': Metric(rank_me(rows), rank, '.1f'),
            },
            {
                'of': 'training',
                'pictures': count,
                'rankme_pictures': len(rows),
                'feature_size': size,
            },
        )


def _share(value: float, explained: str) -> Metric:
    return Metric(value, explained, '.1%')


PROTOCOLS = Registry(
    'protocol',
    'evaluate.protocols',
    {
        'spectrum': Spectrum,
        'knn': Knn,
        'kmeans': KMeans,
        'retrieval': Retrieval,
        'ridge': RidgeProbe,
        'probe': LogisticProbe,
        'linear': Linear,
    },
)


@dataclasses.dataclass(frozen=True)
class _Function(Protocol):
    """Wraps a function of the subject as a protocol."""

    function: Callable[[Subject], Found]

    def measure(self, subject: Subject) -> Found:
        return self.function(subject)


def build_protocols(options: Evaluate) -> dict[str, Protocol]:
    """Builds the protocols of a config, by name, in the order of the config.

    Args:
      options: the section `evaluate` of the settings. Its flat keys (`knn_k`, ...) are arguments of
        the built-in protocols; arguments given with a name in `protocols` override them.

    Raises:
      UserError: a protocol does not exist, does not take its arguments, or is named twice.
    """
    given = {
        name: {argument: getattr(options, key) for argument, key in keys.items()}
        for name, keys in PROTOCOL_KEYS.items()
    }
    protocols: dict[str, Protocol] = {}
    for name, kwargs in options.protocols:
        if name in protocols:
            raise UserError(f"evaluate.protocols names '{name}' twice.")
        protocols[name] = _built(name, {**given.get(name, {}), **kwargs})
    return protocols


def _built(name: str, kwargs: Mapping[str, Any]) -> Protocol:
    found = PROTOCOLS.find(name)
    if inspect.isfunction(found):
        first = next(iter(inspect.signature(found).parameters), '')
        PROTOCOLS.check_kwargs(name, found, kwargs, (first,))
        return _Function(functools.partial(found, **kwargs))
    made = PROTOCOLS.build(name, kwargs)
    if not isinstance(made, Protocol):
        raise UserError(
            f"evaluate.protocols: '{name}' is neither a subclass of "
            'byol_jax.evaluation.Protocol nor a function.'
        )
    return made


class Measured(NamedTuple):
    """The results of all protocols.

    Attributes:
      metrics: metrics by name.
      unmeasured: the reason why a metric or protocol could not be measured, by its name.
      protocols: `Found.details` by protocol, with 'seconds', the time it took.
      bad: files that could not be read.
    """

    metrics: dict[str, Metric]
    unmeasured: dict[str, str]
    protocols: dict[str, dict[str, Any]]
    bad: list[BadFile]


def measure_encoder(subject: Subject, protocols: Mapping[str, Protocol]) -> Measured:
    """Measures an encoder with every protocol that the data allow, in order.

    Args:
      subject: the encoder's features; its `say` gets a line after each protocol.
      protocols: protocols by name.

    Raises:
      UserError: the data allow none of the protocols, or one does not return a `Found`.
    """
    metrics: dict[str, Metric] = {}
    unmeasured: dict[str, str] = {}
    details: dict[str, dict[str, Any]] = {}
    bad = list(subject.pictures.bad) if subject.pictures else []
    for name, protocol in protocols.items():
        start = time.perf_counter()
        try:
            found = protocol.measure(subject)
        except Unmeasured as why:
            unmeasured |= dict.fromkeys(protocol.metrics or [name], str(why))
            continue
        took = time.perf_counter() - start
        if not isinstance(found, Found):
            raise UserError(
                f"evaluate.protocols: '{name}' returned a {type(found).__name__}, not a "
                'byol_jax.evaluation.Found.'
            )
        unmeasured |= found.unmeasured
        for word, value in found.metrics.items():
            # If two protocols have a metric of the same name, both are kept.
            key = f'{name}/{word}' if word in metrics else word
            metric = value if isinstance(value, Metric) else Metric(float(value))
            if math.isfinite(metric.value):
                metrics[key] = metric
            else:
                unmeasured[key] = f'its value is {metric.value}'
        details[name] = {**found.details, 'seconds': round(took, 3)}
        bad += found.bad
        subject.say(f'{name}: {took:.1f} s')
    if not metrics:
        some = '; '.join(f'{name}: {why}' for name, why in unmeasured.items())
        raise UserError(f'Nothing of evaluate.protocols can be measured. {some}.')
    return Measured(metrics, unmeasured, details, list(dict.fromkeys(bad)))
