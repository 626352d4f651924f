"""A hook: ends the run when RankMe of the representation has not risen for some epochs.

python main.py --config=div2k:sample --config.hooks="(('examples.own.hook:Patience',{'epochs':1}),)"
"""

from __future__ import annotations

from byol_jax import Event, Hook


class Patience(Hook):
    """Stops a run whose RankMe no longer rises; a run that goes on counts anew."""

    def __init__(self, epochs: float = 10.0, metric: str = 'rankme_representation'):
        """Args:
        epochs: to wait for a new highest value.
        metric: of metrics.jsonl.
        """
        self.epochs, self.metric = epochs, metric
        self.best, self.since = float('-inf'), 0.0

    def logged(self, event: Event) -> None:
        value, epoch = event.record[self.metric], event.record['epoch']
        if value > self.best:
            self.best, self.since = value, epoch
        elif epoch - self.since >= self.epochs:
            event.stop(
                f'{self.metric} has not risen above {self.best:.2f} for {epoch - self.since:.1f} '
                'epochs'
            )
