"""Checkpoints of a run: a state is saved when it is due, and only if it is finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from byol_jax.app.build import Run
from byol_jax.app.checkpoints import Checkpoints
from byol_jax.app.hooks import Event, Hook
from byol_jax.app.hosts import is_main
from byol_jax.errors import UserError
from byol_jax.models.network import path_name
from byol_jax.training.state import TrainState


class NonFinite(UserError):
    """Something of a step is NaN or infinite.

    Attributes:
      step: whose.
      values: its metrics, and NaN for what else is not finite.
    """

    def __init__(self, step: int, values: Mapping[str, float], what: str = ''):
        """Says what to do.

        Args:
          step: whose.
          values: its metrics.
          what: is not finite, if the metrics are.
        """
        super().__init__(
            f'The loss of step {step} is {values["loss"]:.4g} (gradient norm '
            f'{values["gradient_norm"]:.3g}, learning rate {values["learning_rate"]:.3g})'
            f'{f", and {what} is not finite" if what else ""}. '
            'Training stopped, and nothing of this step is saved. Lower '
            'optimizer.base_learning_rate or lengthen the warm-up, in a new workdir.'
        )
        self.step, self.values = step, dict(values) | ({what: math.nan} if what else {})


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises NonFinite if a metric of a step is not finite."""
    if not all(map(math.isfinite, values.values())):
        raise NonFinite(step, values)


class Saving(Hook):
    """Writes checkpoints, and ends the run before it saves something that is not finite."""

    optional = False
    everywhere = True

    def __init__(self, checkpoints: Checkpoints):
        """Writes nothing yet.

        Args:
          checkpoints: of the run.
        """
        self._checkpoints = checkpoints

    def start(self, run: Run, state: TrainState) -> None:
        """Notes the initial state, whose infinite leaves (a mask may hold -inf) are allowed."""
        self._initial = run.training.initial

    def measure(self, event: Event) -> Mapping[str, float]:
        """Checks the features that the monitors measure.

        Raises:
          NonFinite: there is one among them.
        """
        if is_main():
            for name, rows in event.features.items():
                if not np.isfinite(rows).all():
                    raise NonFinite(event.step, event.record, f'the {name}')
        return {}

    def checkpoint(self, event: Event) -> None:
        """Checks the state and saves it: a broken one must not take the place of good ones.

        Raises:
          NonFinite: a leaf is not finite that was so at the start.
          UserError: the checkpoint cannot be written.
        """
        for (path, leaf), finite in zip(
            jax.tree.leaves_with_path(event.state), self._finite_at_start, strict=True
        ):
            if finite:
                own = np.asarray(leaf.addressable_data(0), np.float32)
                if not np.isfinite(own).all():
                    raise NonFinite(event.step, event.record, path_name(path))
        self._checkpoints.save(event.step, event.state)

    def close(self) -> None:
        # Closing waits for the other processes, which after an error may never come.
        if jax.process_count() == 1:
            self._checkpoints.close()

    @functools.cached_property
    def _finite_at_start(self) -> list[bool]:
        """Of each leaf of the state, whether it holds floats, all of them finite at the start."""
        return [
            bool(jnp.issubdtype(leaf.dtype, jnp.inexact) and np.isfinite(leaf).all())
            for leaf in jax.tree.leaves(self._initial)
        ]
