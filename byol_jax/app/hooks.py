"""Hooks: objects that are told how a run goes on.

Checkpoints, metrics, monitors, evaluation, report and bad files are hooks (`app/loop.py` lists
them), and so are the classes of the user's that `config.hooks` names.
"""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from byol_jax.app.build import Run, online_encoder
from byol_jax.app.hosts import is_main, say
from byol_jax.app.progress import Stopwatch
from byol_jax.errors import UserError, did_you_mean
from byol_jax.interop.encoder import Encoder
from byol_jax.names import Named, Registry
from byol_jax.training.state import TrainState

# None of ours needs a name: they are always there.
HOOKS = Registry('hook', 'hooks', {})

# The methods of a `Hook` that a run calls.
_CALLED = ('start', 'measure', 'logged', 'checkpoint', 'finish', 'fail', 'close')


class Event:
    """A step that was made, as hooks see it. Use it only during the call it was given to.

    Attributes:
      run: the run: its config, data, plan, networks and workdir.
      step: optimizer steps made.
      last: whether it is the last step of the run.
      state: what the step left, on the devices. The next step may take its memory: keep copies of
        values, not arrays.
      watch: `watch.paused(seconds)` leaves the time a hook took out of the measured speed.
      reason: why a hook stops the run here; '' if none does.
      error: the error that the run ends with after this step, its state saved; mostly None.
    """

    def __init__(
        self,
        run: Run,
        step: int,
        state: TrainState,
        features: Mapping[str, jax.Array] | None = None,
        watch: Stopwatch | None = None,
    ):
        """Describes a step.

        Args:
          run: see above.
          step: see above.
          state: see above.
          features: that the monitored step handed out, [devices, V, M, size] by name.
          watch: see above; None: no step was measured.
        """
        self.run, self.step, self.state = run, step, state
        self.last = step >= run.plan.total_steps
        self.watch = watch or Stopwatch(run.plan, step)
        self.reason = ''
        self.error: UserError | None = None
        self._features = features or {}
        self._record: dict[str, float] = {'step': step, 'epoch': run.plan.epoch(step)}

    @property
    def record(self) -> Mapping[str, float]:
        """Values by name: step, epoch, loss, ...; when `logged`, all that metrics.jsonl has."""
        return MappingProxyType(self._record)

    @functools.cached_property
    def features(self) -> dict[str, np.ndarray]:
        """The networks' outputs for some examples of the batch: float32 [views, examples, size].

        By name, such as 'representation' and 'projection'. Of several processes each gets its own
        devices' examples.
        """
        return on_host(self._features)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The online encoder as it would be exported now: images uint8 [B, H, W, C] -> [B, D]."""
        # One device's copy: using it must not wait for other processes.
        own = jax.tree.map(lambda x: x.addressable_data(0), self.state._replace(online_probe=None))
        return online_encoder(self.run.config, self.run.method, own)

    def add(self, values: Mapping[str, float]) -> None:
        """Adds values to the record."""
        self._record |= values

    def stop(self, reason: str = '', error: UserError | None = None) -> None:
        """Asks the run to end after this step; may be called by `Hook.measure` and `Hook.logged`.

        The state is saved. For a reason the run then ends as if this were its last step, with
        encoder and report; the same command goes on from there. The first reason counts, an error
        counts more, and at the last step nothing does.

        Args:
          reason: one line for the log and the report.
          error: end with this error instead. Of several processes that of process 0 counts; a hook
            that is called `everywhere` must give it in all of them.
        """
        if self.last or self.error:
            return
        if error:
            self.error, self.reason = error, ''
        else:
            words = ' '.join(str(reason).split()) or 'a hook asked for it'
            self.reason = self.reason or words


class Hook:
    """Watches a run; each method does nothing unless a subclass has its own.

    A class of the user's is named in `config.hooks` and made with the arguments given there. Hooks
    are called in the order in which they are listed, ours first. They may look at the state but
    have no way to change it.

    Attributes:
      optional: a hook that fails is left out from then on, and the run goes on without it. If
        False, its error ends the run.
      everywhere: of several processes each calls the hook, not only process 0. Only a hook that
        exchanges something between processes needs that.
    """

    optional = True
    everywhere = False

    def start(self, run: Run, state: TrainState) -> None:
        """Training begins, or goes on from `state.step`."""

    def measure(self, event: Event) -> Mapping[str, float]:
        """Values for the record of a step that is about to be logged, by names not yet in it.

        They must be finite. `event.record` has the step's metrics and what earlier hooks measured.
        """
        return {}

    def logged(self, event: Event) -> None:
        """A step's record is complete."""

    def checkpoint(self, event: Event) -> None:
        """A checkpoint of the step is due; for a hook of the user's, it is written."""

    def finish(self, event: Event) -> None:
        """All steps are made, or a hook has stopped the run; encoder and last state are saved.

        For a hook of the user's, the report is written too.
        """

    def fail(self, error: Exception) -> None:
        """The run ends early, by an error or by a signal (`signals.Interrupted`)."""

    def close(self) -> None:
        """The last call, whatever happened; for files and threads. Not if `start` has failed."""


class Hooks:
    """Calls the hooks of a run, and goes on without optional ones that fail.

    As a context it tells them of an error that ends it, and closes them.
    """

    def __init__(self, hooks: list[Hook]):
        """Calls none yet.

        Args:
          hooks: in the order in which they are called.
        """
        self._waiting = [hook for hook in hooks if hook.everywhere or is_main()]
        self._started: list[Hook] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, Exception):
                self.fail(error)
        finally:
            self.close()

    def start(self, run: Run, state: TrainState) -> None:
        """See `Hook.start`; what follows is told only to the hooks that have started."""
        for hook in self._waiting:
            if self._try(hook, functools.partial(hook.start, run, state)):
                self._started.append(hook)

    def log(self, event: Event) -> None:
        """Has a step measured, then tells all of its complete record."""
        self._each(lambda hook: event.add(_measured(hook, event)))
        event.add(event.watch.lap(event.step))
        self._each(lambda hook: hook.logged(event))

    def checkpoint(self, event: Event) -> None:
        """See `Hook.checkpoint`."""
        self._each(lambda hook: hook.checkpoint(event))

    def finish(self, event: Event) -> None:
        """See `Hook.finish`."""
        self._each(lambda hook: hook.finish(event))

    def fail(self, error: Exception) -> None:
        """See `Hook.fail`."""
        self._each(lambda hook: hook.fail(error))

    def close(self) -> None:
        """See `Hook.close`; all are closed, even if one cannot be."""
        closing, self._started = self._started, []
        with ExitStack() as stack:
            for hook in reversed(closing):
                stack.callback(self._try, hook, hook.close)

    def _each(self, call: Callable[[Hook], None]) -> None:
        for hook in self._started.copy():
            self._try(hook, functools.partial(call, hook))

    def _try(self, hook: Hook, call: Callable[[], None]) -> bool:
        """Whether a call succeeded; an optional hook whose call does not is closed and left out."""
        try:
            call()
        # A hook may be somebody else's program: anything may come of it.
        except Exception as error:
            if not hook.optional:
                raise
            say(f'hook {_name(hook)} failed and is left out from now on: {_described(error)}')
            if hook in self._started:
                self._started.remove(hook)
                self._try(hook, hook.close)
            return False
        return True


def own_hooks(named: tuple[Named, ...]) -> list[Hook]:
    """The hooks of the user's.

    Args:
      named: 'package.module:Class' and arguments of each (config.hooks).

    Raises:
      UserError: one cannot be found or made, or is no `Hook`.
    """
    hooks = []
    for name, kwargs in named:
        hook = HOOKS.build(name, kwargs)
        if not isinstance(hook, Hook):
            raise UserError(
                f"hooks: '{name}' makes a {type(hook).__name__}, not a byol_jax.Hook: "
                'derive its class from that.'
            )
        if all(getattr(type(hook), method) is getattr(Hook, method) for method in _CALLED):
            own = [each for each in vars(type(hook)) if not each.startswith('_')]
            near = ''.join(did_you_mean(each, _CALLED) for each in own[:1])
            raise UserError(
                f"hooks: '{name}' would do nothing: it has none of the methods that are called, "
                f'{", ".join(_CALLED)}.{near}'
            )
        hooks.append(hook)
    return hooks


def on_host(features: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """What a mapped step handed out, [devices, V, M, size] -> float32 [V, devices M, size].

    Of several processes each gets its own devices' examples.
    """
    found = {}
    for name, x in features.items():
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        rows = np.concatenate([np.asarray(shard.data, np.float32) for shard in shards])
        found[name] = np.moveaxis(rows, 0, 1).reshape(x.shape[1], -1, x.shape[-1])
    return found


def _measured(hook: Hook, event: Event) -> dict[str, float]:
    """What a hook measures, checked.

    Raises:
      ValueError: it is no mapping, a name is taken, or a value is not finite.
    """
    measured = hook.measure(event)
    if not isinstance(measured, Mapping):
        kind = type(measured).__name__
        raise ValueError(f'measure gave a {kind}, and must give numbers by name: a dict')
    values = {str(name): float(value) for name, value in measured.items()}
    for name, value in values.items():
        if name in event.record:
            raise ValueError(f"'{name}' is in the record already")
        if not math.isfinite(value):
            raise ValueError(f"'{name}' is {value}")
    return values


def _name(hook: Hook) -> str:
    return f'{type(hook).__module__}:{type(hook).__qualname__}'


def _described(error: Exception) -> str:
    """An error in one line, with the place in the hook's method that led to it."""
    what = ' '.join(str(error).split())
    words = f'{type(error).__name__}: {what}' if what else type(error).__name__
    # The first frame is `_try`'s, the next ones of this file too.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f'{words} ({Path(frames[0].filename).name}:{frames[0].lineno})' if frames else words
