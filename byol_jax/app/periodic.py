"""The online encoder measured during training: nearest neighbours, and views found again."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from byol_jax.app.build import Run, online_encoder
from byol_jax.app.hosts import is_main, say
from byol_jax.app.plan import Plan
from byol_jax.app.progress import Stopwatch, duration
from byol_jax.errors import UserError
from byol_jax.evaluation.features import Encode
from byol_jax.evaluation.neighbours import recall
from byol_jax.evaluation.table import Evaluation, evaluate
from byol_jax.evaluation.views import encode_pairs
from byol_jax.input.stream import Stream
from byol_jax.sources.data import Data
from byol_jax.training.state import TrainState
from byol_jax.views.recipes import config_views

# Pictures among whose views the other view of each is sought, at most. It sets the level of
# chance, so it is the same for data sets of any size.
POOL = 1000
# Ranks at which the other view may be found.
RECALL_AT = (1, 5)


class Periodic:
    """Measures the online encoder every evaluate.every_epochs; process 0 alone does.

    What it finds is a function of the state, so a run that goes on finds the same. The protocol is
    that of the table at the end, by the code that an exported encoder runs.
    """

    def __init__(self, run: Run):
        self._run = run
        # The neighbours of the last time, for who shows them: may be taken away.
        self.found: Evaluation | None = None

    def __call__(self, step: int, state: TrainState, watch: Stopwatch) -> dict[str, float]:
        """'knn_K' and 'recall_K' (`knn`, `other_views`) after a logged step, if they are due.

        The time it takes is said and not counted as the steps'. Pictures that cannot be read do
        not stop a run here: it is said that there is no figure, and why.

        Args:
          step: made. state: it left. watch: of the run.
        """
        if not is_main() or not due(self._run.plan, step):
            return {}
        began = time.perf_counter()
        # One device's copy: nothing here may wait for other processes.
        own = jax.tree.map(lambda x: x.addressable_data(0), state._replace(online_probe=None))
        encoder = online_encoder(self._run.config, self._run.method, own)
        variables = jax.device_put(encoder.variables, jax.local_devices()[0])

        def encode(images: np.ndarray) -> np.ndarray:
            return np.asarray(encoder.compiled(variables, images))

        data, config = self._run.data, self._run.config
        found: dict[str, float] = {}
        said: list[str] = []
        # One of them must not take the other with it.
        try:
            self.found = neighbours_of(encode, data, config)
            found |= accuracy_of(self.found, config)
        except UserError as error:
            said.append(f'no neighbours. {error}')
        try:
            found |= other_views(encode, data, config)
        except UserError as error:
            said.append(f'no views. {error}')
        figures = '  '.join(f'{name} {value:.3f}' for name, value in found.items())
        seconds = time.perf_counter() - began
        watch.paused(seconds)
        words = '; '.join(filter(None, [figures, *said]))
        say(f'evaluated at step {step} in {duration(seconds)}: {words or "too few pictures"}')
        return found


def neighbours_of(encode: Encode, data: Data, config: Any) -> Evaluation:
    """The protocol of the table at the end, with the options of a config."""
    return evaluate(
        encode,
        data,
        config.evaluate,
        key=config.data.pair_keys[0],
        image_size=config.views.image_size,
    )


def due(plan: Plan, step: int) -> bool:
    """Whether this logged step is the first one at or after a multiple of `evaluate_steps`."""
    if not plan.evaluate_steps:
        return False
    logged_before = (step - 1) // plan.log_steps * plan.log_steps
    return step // plan.evaluate_steps > logged_before // plan.evaluate_steps


def accuracy_of(found: Evaluation, config: Any) -> dict[str, float]:
    """{'knn_K': accuracy of the table at the end}; nothing where there is none."""
    return {} if found.accuracy is None else {f'knn_{config.evaluate.knn_k[0]}': found.accuracy}


def other_views(encode: Encode, data: Data, config: Any) -> dict[str, float]:
    """{'recall_1', 'recall_5'}: how often view 1 of a picture finds its view 2 among up to POOL.

    The pictures are held-out ones where there are any, else training ones. Nothing of a pool too
    small for it to say anything.

    Raises:
      UserError: no picture can be read.
    """
    source = data.held_out if len(data.held_out) else data.train
    views = config_views(config.views, config.data.pair_keys)
    stream = Stream(source, views, config.seed)
    view1, view2, _ = encode_pairs(encode, stream, POOL, config.evaluate.batch_size)
    if len(view1) <= max(RECALL_AT):
        return {}
    return {f'recall_{k}': share for k, share in recall(view1, view2, RECALL_AT).items()}
