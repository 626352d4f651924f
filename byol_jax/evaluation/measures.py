"""The protocols of --mode=evaluate, each as a function of the features they share."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from byol_jax.evaluation.clustering import clustering_score
from byol_jax.evaluation.features import Labelled
from byol_jax.evaluation.linear import Epoch, linear_evaluation
from byol_jax.evaluation.monitors import rank_me, unit_std
from byol_jax.evaluation.neighbours import Neighbours, nearest, recall
from byol_jax.evaluation.probes import ProbeResult, logistic_probe, ridge_probe
from byol_jax.evaluation.protocol import compared, knn_accuracy
from byol_jax.evaluation.subject import Found, Say, Subject, Unmeasured, check_several
from byol_jax.evaluation.views import augmented, encode_pairs
from byol_jax.sources.base import Subset

# Ranks at which the other view may be found.
RECALL_AT = (1, 5)
# Rows of RankMe at most: the paper's number (arXiv:2210.02885, Appendix G).
RANKME_ROWS = 25_600


def _knn(subject: Subject) -> Found:
    train, test = subject.labelled
    gallery, queries, *_ = subject.parts
    ks, count = subject.config.evaluate.knn_k, len(train.labels)
    possible = [k for k in ks if k <= count]
    metrics = {}
    if possible:
        found = nearest(train.features, test.features, max(possible))
        for k in possible:
            first = Neighbours(found.indices[:, :k], found.cosines[:, :k])
            metrics[f'knn_{k}'] = knn_accuracy(first, gallery, queries, subject.config)
    return Found(
        metrics,
        {'temperature': subject.config.evaluate.knn_temperature, 'k': list(possible)},
        {
            f'knn_{k}': f'there are only {count:,} training pictures, fewer than {k:,}'
            for k in ks
            if k > count
        },
    )


def _linear(subject: Subject) -> Found:
    train, test = subject.labelled
    options, held = subject.config.evaluate, subject.choosing
    examples = int(np.sum(~held))
    epochs, batch_size = options.linear_epochs, options.linear_batch_size
    steps = epochs * examples // batch_size
    if not steps:
        raise Unmeasured(
            f'{epochs} epochs of {examples:,} training pictures are less than one batch of '
            f'{batch_size:,}; lower evaluate.linear_batch_size'
        )
    source = Subset(subject.parts.gallery, np.flatnonzero(~held))
    epoch = augmented(subject.encode, source, train.labels[~held], subject.config)
    result = linear_evaluation(
        _timed(epoch, epochs, examples, subject.say),
        examples,
        Labelled(train.features[held], train.labels[held]),
        test,
        classes=subject.classes,
        learning_rates=options.linear_learning_rates,
        epochs=epochs,
        batch_size=batch_size,
        seed=subject.config.seed,
    )
    return _of_probe(
        subject,
        'linear',
        'learning_rate',
        result,
        epochs=epochs,
        batch_size=batch_size,
        steps=steps,
        trained_on=examples,
    )


def _timed(epoch: Epoch, epochs: int, examples: int, say: Say) -> Epoch:
    """An epoch that says, once two are over, how long all will take."""
    starts: list[float] = []

    def timed(number: int) -> Any:
        starts.append(time.perf_counter())
        # The first is not counted: it compiles too.
        if number == 2:
            minutes = (starts[2] - starts[1]) * epochs / 60
            say(
                f'linear: {epochs} epochs of new crops of {examples:,} pictures, about '
                f'{minutes:.1f} min in all; evaluate.protocols can leave it out'
            )
        return epoch(number)

    return timed


def _fitted(name: str, fit: Callable[..., ProbeResult], subject: Subject) -> Found:
    train, test = subject.labelled
    seed = subject.config.seed
    result = fit(train, test, classes=subject.classes, held_out=subject.choosing, seed=seed)
    return _of_probe(subject, name, 'penalty', result)


def _of_probe(
    subject: Subject, name: str, tuned: str, result: ProbeResult, **details: Any
) -> Found:
    metrics = {name: result.top1}
    # With five classes or fewer it is 1 whatever the features are.
    if subject.classes > 5:
        metrics[f'{name}_top5'] = result.top5
    return Found(
        metrics,
        {
            **details,
            tuned: result.chosen,
            'held_out_accuracy': {f'{value:g}': x for value, x in result.held_out.items()},
            'chosen_on': int(np.sum(subject.choosing)),
        },
    )


def _kmeans(subject: Subject) -> Found:
    what, source, features = subject.shown
    if source.labels is None:
        raise Unmeasured('the data have no labels to compare clusters with')
    check_several(source)
    score = clustering_score(features, source.labels, seed=subject.config.seed)
    clusters = len(np.unique(source.labels))
    return Found({'kmeans_nmi': score}, {'pictures': len(source), 'of': what, 'clusters': clusters})


def _retrieval(subject: Subject) -> Found:
    what, _, _ = subject.shown
    # All of them, not those encoded already: of a clip another frame may be wanted.
    gallery, queries = compared(subject.data)
    source = queries if len(queries) else gallery
    most = subject.config.evaluate.retrieval_pool
    view1, view2, bad = encode_pairs(subject.encode, source, most, subject.config)
    if len(view1) <= max(RECALL_AT):
        raise Unmeasured(f'a pool of {len(view1)} pictures says nothing')
    found = recall(view1, view2, RECALL_AT)
    return Found(
        {f'recall_{k}': share for k, share in found.items()},
        {
            'pool': len(view1),
            'of': what,
            'chance': {f'recall_{k}': k / len(view1) for k in RECALL_AT},
            'bad': bad,
        },
    )


def _spectrum(subject: Subject) -> Found:
    features = subject.parts.searched
    rows = features
    if len(rows) > RANKME_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, RANKME_ROWS).astype(int)]
    return Found(
        {'feature_std': unit_std(features), 'rankme': rank_me(rows)},
        {
            'of': 'training',
            'pictures': len(features),
            'rankme_pictures': len(rows),
            'feature_size': features.shape[1],
        },
    )


def _named(*metrics: str) -> Callable[[Any], list[str]]:
    return lambda config: list(metrics)


# What runs, in this order, and the names of its metrics under a config.
MEASURES: dict[str, tuple[Callable[[Subject], Found], Callable[[Any], list[str]]]] = {
    'spectrum': (_spectrum, _named('feature_std', 'rankme')),
    'knn': (_knn, lambda config: [f'knn_{k}' for k in config.evaluate.knn_k]),
    'kmeans': (_kmeans, _named('kmeans_nmi')),
    'retrieval': (_retrieval, _named(*(f'recall_{k}' for k in RECALL_AT))),
    'ridge': (partial(_fitted, 'ridge', ridge_probe), _named('ridge')),
    'probe': (partial(_fitted, 'probe', logistic_probe), _named('probe')),
    # Last, because it takes longest.
    'linear': (_linear, _named('linear')),
}
