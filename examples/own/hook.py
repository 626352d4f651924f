"""A hook that ends the run if the representation's RankMe has not risen for some epochs.

python main.py --config=div2k:sample --config.hooks="(('examples.own.hook:Patience',{'epochs':1}),)"
"""

from __future__ import annotations

from collections.abc import Mapping

from byol_jax import Event, Hook, TrainState
from byol_jax.app.build import Run
from byol_jax.app.records import read_metrics


class Patience(Hook):
    """Stops a run whose RankMe no longer rises."""

    def __init__(self, epochs: float = 10.0, metric: str = 'rankme_representation'):
        """Reads nothing yet.

        Args:
          epochs: how many epochs to wait for a new highest value.
          metric: name of a metric in metrics.jsonl.
        """
        self.epochs, self.metric = epochs, metric
        self.best, self.since = float('-inf'), 0.0

    def start(self, run: Run, state: TrainState) -> None:
        # A resumed run has records already.
        for record in read_metrics(run.workdir):
            self._look(record)

    def logged(self, event: Event) -> None:
        waited = self._look(event.record)
        if waited >= self.epochs:
            event.stop(f'{self.metric} has not risen above {self.best:.2f} for {waited:.1f} epochs')

    def _look(self, record: Mapping[str, float]) -> float:
        """Takes a record into account, and returns the epochs since the highest value."""
        value, epoch = record[self.metric], record['epoch']
        if value > self.best:
            self.best, self.since = value, epoch
        return epoch - self.since
