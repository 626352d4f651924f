"""A protocol: how often is the nearest class mean that of a picture's label?

python main.py --mode=evaluate --config=div2k:sample \
    --config.evaluate.protocols="('knn',('examples.own.protocol:ClassMeans',{'cosine':True}))"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from byol_jax.evaluation import Found, Metric, Protocol, Subject, Unmeasured


@dataclasses.dataclass(frozen=True)
class ClassMeans(Protocol):
    """Accuracy of the nearest class mean, the mean of a label's training features.

    Attributes:
      cosine: whether features are scaled to unit length first.
    """

    cosine: bool = False

    @property
    def metrics(self) -> Sequence[str]:
        return ['class_means']

    def measure(self, subject: Subject) -> Found:
        train, test = subject.labelled
        if len(train.labels) < 2 * subject.classes:
            raise Unmeasured('there are fewer than two training pictures a label')
        labels = np.unique(train.labels)
        means = np.stack([self._scaled(train.features)[train.labels == i].mean(0) for i in labels])
        # |x - m|^2 for features x and means m, without |x|^2, which is the same for all means.
        distances = np.sum(means**2, axis=1) - 2 * self._scaled(test.features) @ means.T
        accuracy = float(np.mean(labels[distances.argmin(axis=1)] == test.labels))
        explained = f'accuracy, nearest of {len(labels)} class means'
        return Found({'class_means': Metric(accuracy, explained, '.1%')}, {'cosine': self.cosine})

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        if not self.cosine:
            return features
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
