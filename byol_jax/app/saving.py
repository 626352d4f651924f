"""The hook that saves checkpoints, and refuses states that are not finite."""

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
    """A metric, feature or parameter of a step is NaN or infinite.

    Attributes:
      step: number of the step.
      values: metrics of the step by name; a feature or parameter that is not finite is added by
        its name, with the value NaN.
    """

    def __init__(
        self, step: int, values: Mapping[str, float], what: str = '', since: int | None = None
    ):
        """Makes the message.

        Args:
          step: number of the step.
          values: metrics of the step by name.
          what: name of the feature or parameter that is not finite; '' if a metric is the cause.
          since: the last step at which it is known to have been finite; None if that is the step
            before.
        """
        when = '' if since in (None, step - 1) else f' since a step after {since:,}'
        super().__init__(
            f'The loss of step {step} is {values["loss"]:.4g} (gradient norm '
            f'{values["gradient_norm"]:.3g}, learning rate {values["learning_rate"]:.3g})'
            f'{f", and {what} is not finite{when}" if what else ""}. '
            'Training stopped, and nothing of this step is saved. Lower '
            'optimizer.base_learning_rate or lengthen the warm-up, in a new workdir.'
        )
        self.step, self.values = step, dict(values) | ({what: math.nan} if what else {})


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises NonFinite if a metric of a step is not finite."""
    if not all(map(math.isfinite, values.values())):
        raise NonFinite(step, values)


class Saving(Hook):
    """Writes checkpoints, and ends the run instead of saving values that are not finite."""

    optional = False
    everywhere = True

    def __init__(self, checkpoints: Checkpoints):
        """Writes nothing yet.

        Args:
          checkpoints: the checkpoints of the run.
        """
        self._checkpoints = checkpoints

    def start(self, run: Run, state: TrainState) -> None:
        """Keeps the initial state: leaves that are infinite there (such as masks) may stay so."""
        self._initial = run.training.initial
        self._saved = int(state.step)

    def measure(self, event: Event) -> Mapping[str, float]:
        """Checks the features that the monitors measure, and measures nothing itself.

        Raises:
          NonFinite: a feature is not finite.
        """
        if is_main():
            for name, rows in event.features.items():
                if not np.isfinite(rows).all():
                    raise NonFinite(event.step, event.record, f'the {name}')
        return {}

    def checkpoint(self, event: Event) -> None:
        """Checks the state and saves it, so that a broken state never replaces a good checkpoint.

        Raises:
          NonFinite: a leaf that was finite at the start no longer is.
          UserError: the checkpoint cannot be written.
        """
        for (path, leaf), finite in zip(
            jax.tree.leaves_with_path(event.state), self._finite_at_start, strict=True
        ):
            if finite:
                own = np.asarray(leaf.addressable_data(0), np.float32)
                if not np.isfinite(own).all():
                    raise NonFinite(event.step, event.record, path_name(path), self._saved)
        self._checkpoints.save(event.step, event.state)
        self._saved = event.step

    def close(self) -> None:
        # Closing waits for the other processes, and after an error they may be gone.
        if jax.process_count() == 1:
            self._checkpoints.close()

    @functools.cached_property
    def _finite_at_start(self) -> list[bool]:
        """For each leaf of the state: whether it holds floats that were all finite at the start."""
        return [
            bool(jnp.issubdtype(leaf.dtype, jnp.inexact) and np.isfinite(leaf).all())
            for leaf in jax.tree.leaves(self._initial)
        ]
