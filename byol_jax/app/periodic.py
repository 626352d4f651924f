"""Hooks that evaluate the online encoder: every few epochs, and at the end of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import numpy as np

from byol_jax.app.bad_files import BadFilesLog
from byol_jax.app.build import online_encoder
from byol_jax.app.hooks import Event, Hook
from byol_jax.app.hosts import say
from byol_jax.app.plan import Plan
from byol_jax.app.progress import duration
from byol_jax.app.progress_bars import progress_shown
from byol_jax.app.report.illustrations import show_evaluations
from byol_jax.app.report.run_report import RunReport, finish_report
from byol_jax.app.reporting import Metrics
from byol_jax.errors import UserError
from byol_jax.evaluation.features import Encode
from byol_jax.evaluation.neighbours import recall
from byol_jax.evaluation.table import Evaluation, evaluate
from byol_jax.evaluation.views import encode_pairs
from byol_jax.input.stream import Stream
from byol_jax.settings import Settings
from byol_jax.sources.data import Data
from byol_jax.views.recipes import config_views

# Number of pictures, at most, among which the other view of a picture is searched. Recall by chance
# depends on it, so it does not grow with the data set.
POOL = 1000
# The ranks k of recall@k.
RECALL_AT = (1, 5)


class Periodic(Hook):
    """Evaluates the online encoder every evaluate.every_epochs and adds the result to the report.

    The protocol is that of the before/after table (`BeforeAfter`). The result depends on the state
    only, so a resumed run gets the same.
    """

    def __init__(self, report: RunReport, metrics: Metrics):
        """Measures nothing yet.

        Args:
          report: the report of the run.
          metrics: the hook whose log gets the pictures.
        """
        self._report, self._metrics = report, metrics
        self._found: Evaluation | None = None

    def measure(self, event: Event) -> Mapping[str, float]:
        """Returns 'knn_K' and 'recall_K' (`accuracy_of`, `other_views`) if they are due.

        Prints how long it took, and leaves that time out of the measured speed. If pictures cannot
        be read, it prints why a figure is missing and the run continues.
        """
        if not due(event.run.plan, event.step):
            return {}
        began = time.perf_counter()
        encoder, data, config = event.encoder, event.run.data, event.run.config
        variables = jax.device_put(encoder.variables, jax.local_devices()[0])

        def encode(images: np.ndarray) -> np.ndarray:
            return np.asarray(encoder.compiled(variables, images))

        found: dict[str, float] = {}
        said: list[str] = []
        # Separately, so that one of them is measured even if the other fails.
        try:
            self._found = neighbours_of(encode, data, config)
            found |= accuracy_of(self._found, config)
        except UserError as error:
            said.append(f'no neighbours. {error}')
        try:
            found |= other_views(encode, data, config)
        except UserError as error:
            said.append(f'no views. {error}')
        figures = '  '.join(f'{name} {value:.3f}' for name, value in found.items())
        seconds = time.perf_counter() - began
        event.watch.paused(seconds)
        words = '; '.join(filter(None, [figures, *said]))
        say(f'evaluated at step {event.step} in {duration(seconds)}: {words or "too few pictures"}')
        return found

    def logged(self, event: Event) -> None:
        """Adds the result to the report, except at the last step, where `BeforeAfter` does."""
        found, self._found = self._found, None
        if found is None or event.last:
            return
        began = time.perf_counter()
        name = f'step {event.step:,}'
        self._report.show(
            show_evaluations(
                {name: found}, event.run, self._metrics.log, event.step, with_umap=False
            )
        )
        event.watch.paused(time.perf_counter() - began)


class BeforeAfter(Hook):
    """Compares the encoder before and after training, and writes the final report."""

    optional = False

    def __init__(self, report: RunReport, metrics: Metrics, bad_files: BadFilesLog):
        """Measures nothing yet.

        Args:
          report: the report of the run.
          metrics: the hook whose log gets the pictures.
          bad_files: the hook that gets the bad files found by the evaluation.
        """
        self._report, self._metrics, self._bad_files = report, metrics, bad_files

    def finish(self, event: Event) -> None:
        """Prints the table and writes results.json and report.html.

        Raises:
          UserError: the encoder cannot be evaluated.
        """
        run = event.run
        say('comparing the encoder before and after training ...')
        try:
            before = None
            if run.training.known:
                initial = online_encoder(run.config, run.method, run.training.initial)
                before = neighbours_of(initial, run.data, run.config)
            after = neighbours_of(event.encoder, run.data, run.config)
            self._bad_files.add([*(before.bad if before else ()), *after.bad])
            bad = len(self._bad_files.bad_files)
            text = finish_report(event, self._report, self._metrics.log, before, after, bad)
        except UserError as error:
            raise UserError(
                f'Training is done and the encoder is in {run.workdir / "encoder"}, but it could '
                f'not be evaluated: {error} Then give the same command again for the report.'
            ) from error
        say(f'\n{text}\n')


def neighbours_of(encode: Encode, data: Data, config: Settings) -> Evaluation:
    """Runs the protocol of the before/after table on an encoder, with a progress bar.

    Args:
      encode: maps uint8 [B, S, S, 3] to features [B, D].
      data: data of the run.
      config: the run's settings.
    """
    first = config_views(config.views, config.data.pair_keys)['view1']
    with progress_shown() as progress:
        return evaluate(
            encode,
            data,
            config.evaluate,
            key=config.data.pair_keys[0],
            image_size=config.views.image_size,
            antialias=first.antialias,
            progress=progress,
        )


def due(plan: Plan, step: int) -> bool:
    """Whether this is the first logged step at or after a multiple of `plan.evaluate_steps`."""
    if not plan.evaluate_steps:
        return False
    logged_before = (step - 1) // plan.log_steps * plan.log_steps
    return step // plan.evaluate_steps > logged_before // plan.evaluate_steps


def accuracy_of(found: Evaluation, config: Settings) -> dict[str, float]:
    """{'knn_K': accuracy, 0 to 1}; empty without labels or without held-out pictures."""
    return {} if found.accuracy is None else {f'knn_{config.evaluate.knn_k[0]}': found.accuracy}


def other_views(encode: Encode, data: Data, config: Settings) -> dict[str, float]:
    """How often view 1 of a picture finds its own view 2 among the views 2 of up to POOL pictures.

    Held-out pictures are used if there are any, otherwise training pictures.

    Args:
      encode: maps uint8 [B, S, S, 3] to features [B, D].
      data: data of the run.
      config: the run's settings.

    Returns:
      'recall_1' and 'recall_5', 0 to 1; empty if there are so few pictures that recall would
      always be 1.

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
