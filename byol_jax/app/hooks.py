"""Hooks: objects whose methods a run calls at its start, at logged steps, checkpoints and its end.

Checkpoints, metrics, monitors, evaluation, report and bad files are hooks (listed in
`app/train.py`). `config.hooks` adds the user's own classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType

import jax
import numpy as np

from byol_jax.app.build import Run, online_encoder
from byol_jax.app.hosts import is_main
from byol_jax.app.left_out import tried
from byol_jax.app.progress import Stopwatch
from byol_jax.app.signals import Interrupted
from byol_jax.errors import UserError, did_you_mean
from byol_jax.interop.encoder import Encoder
from byol_jax.names import Named, Registry
from byol_jax.training.state import TrainState

# Empty: the built-in hooks always run, so no config names them.
HOOKS = Registry('hook', 'hooks', {})

# The methods of a `Hook` that a run calls.
_CALLED = ('start', 'measure', 'logged', 'checkpoint', 'finish', 'fail', 'close')


class Event:
    """A finished training step, as hooks see it. Use it only inside the call that received it.

    Attributes:
      run: the run: its config, data, plan, networks and workdir.
      step: number of optimizer steps made so far.
      last: whether this is the last step of the run.
      state: the state after the step, on the devices. The next step may reuse its memory, so keep
        copies of values, not the arrays.
      watch: measures the speed; call `watch.paused(seconds)` to leave out time that a hook took.
      reason: why a hook stops the run after this step; '' if none does.
      error: the error that ends the run after this step, once its state is saved; None if there is
        none.
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
          run: the run it belongs to.
          step: number of optimizer steps made so far.
          state: the state after the step.
          features: features that the monitored step returned, by name: arrays
            [devices, views, examples, size].
          watch: the run's stopwatch; None if no step has been measured.
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
        """Values by name (step, epoch, loss, ...). In `Hook.logged`: the line of metrics.jsonl."""
        return MappingProxyType(self._record)

    @functools.cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Network outputs for some examples of the batch: float32 [views, examples, size] by name.

        Names are those of the method, such as 'representation' and 'projection'. With several
        processes, each process gets the examples of its own devices.
        """
        return on_host(self._features)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The online encoder as it would be exported now: images uint8 [B, H, W, C] -> [B, D]."""
        # The copy on one device: it can be used without waiting for other processes.
        own = jax.tree.map(lambda x: x.addressable_data(0), self.state._replace(online_probe=None))
        return online_encoder(self.run.config, self.run.method, own)

    def add(self, values: Mapping[str, float]) -> None:
        """Adds values to the record."""
        self._record |= values

    def stop(self, reason: str = '', error: UserError | None = None) -> None:
        """Asks the run to end after this step. Call it from `Hook.measure` or `Hook.logged`.

        The state is saved. With a reason, the run ends as after its last step: the encoder is
        exported and the report written, and the same command continues the run. With an error, the
        run ends with that error. An error takes precedence over a reason, and the first reason over
        later ones. At the last step the call has no effect.

        Args:
          reason: one line for the log and the report.
          error: the error to end with. With several processes the error of process 0 counts; a hook
            with `everywhere` must give it in all of them.
        """
        if self.last or self.error:
            return
        if error:
            self.error, self.reason = error, ''
        else:
            words = ' '.join(str(reason).split()) or 'a hook asked for it'
            self.reason = self.reason or words


class Hook:
    """Base class of hooks; every method does nothing unless a subclass overrides it.

    `config.hooks` names the user's classes and the arguments they are made with. Built-in hooks are
    called first, then the user's in the order of the config. Hooks can read the state but not
    change it.

    Attributes:
      optional: if True, a hook that raises is dropped and the run continues without it. If False,
        its error ends the run.
      everywhere: if True, every process of a run calls the hook; otherwise only process 0 does.
        Needed only by hooks that exchange data between processes.
    """

    optional = True
    everywhere = False

    def start(self, run: Run, state: TrainState) -> None:
        """Called before the first step of this process; `state.step` steps were made before."""

    def measure(self, event: Event) -> Mapping[str, float]:
        """Returns values to add to the record of a step that is about to be logged.

        `event.record` has the step's metrics and the values that earlier hooks returned.

        Returns:
          Finite numbers by name; the names must not be in the record yet.
        """
        return {}

    def logged(self, event: Event) -> None:
        """Called at a log step when its record is complete."""

    def checkpoint(self, event: Event) -> None:
        """Called when a checkpoint is due. For the user's hooks it is already written."""

    def finish(self, event: Event) -> None:
        """Called after the last step, or after a hook stopped the run.

        The encoder and the last state are saved by then. For the user's hooks the report is written
        too.
        """

    def fail(self, error: BaseException) -> None:
        """Called when an error or a signal (`signals.Interrupted`) ends the run early."""

    def close(self) -> None:
        """Called last, however the run ended, to close files and threads.

        Not called if `start` raised.
        """


class Hooks:
    """Calls the hooks of a run and drops optional ones that raise.

    As a context manager it calls `fail` of each hook if an error ends the block, and then `close`.
    """

    def __init__(self, hooks: list[Hook]):
        """Keeps the hooks that this process calls; calls none yet.

        Args:
          hooks: all hooks of the run, in the order in which they are called.
        """
        self._waiting = [hook for hook in hooks if hook.everywhere or is_main()]
        self._started: list[Hook] = []
        self._ending = False

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What else fails now must not take the place of the reason for which the run ends.
        self._ending = error is not None
        try:
            if isinstance(error, Exception | Interrupted):
                self.fail(error)
        finally:
            self.close()

    def start(self, run: Run, state: TrainState) -> None:
        """Calls `Hook.start`. A hook whose start fails is not called again."""
        for hook in self._waiting:
            if self._try(hook, functools.partial(hook.start, run, state)):
                self._started.append(hook)

    def log(self, event: Event) -> None:
        """Calls `Hook.measure` of all hooks, adds the speed to the record, calls `Hook.logged`."""
        self._each(lambda hook: event.add(_measured(hook, event)))
        event.add(event.watch.lap(event.step))
        self._each(lambda hook: hook.logged(event))

    def checkpoint(self, event: Event) -> None:
        """Calls `Hook.checkpoint`."""
        self._each(lambda hook: hook.checkpoint(event))

    def finish(self, event: Event) -> None:
        """Calls `Hook.finish`."""
        self._each(lambda hook: hook.finish(event))

    def fail(self, error: BaseException) -> None:
        """Calls `Hook.fail`."""
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
        """Makes a call and says whether it succeeded; closes and drops an optional hook if not."""
        if not hook.optional and not self._ending:
            call()
            return True
        done = tried(f'hook {_name(hook)}', call, __file__)
        if not done and hook in self._started:
            self._started.remove(hook)
            self._try(hook, hook.close)
        return done


def own_hooks(named: tuple[Named, ...]) -> list[Hook]:
    """Makes the user's hooks.

    Args:
      named: the 'package.module:Class' and arguments of each, from config.hooks.

    Raises:
      UserError: a class cannot be found or made, is no `Hook`, or overrides no method of it.
    """
    hooks = []
    for name, kwargs in named:
        hook = HOOKS.build(name, kwargs)
        if not isinstance(hook, Hook):
            raise UserError(
                f"hooks: '{name}' makes a {type(hook).__name__}, not a byol_jax.Hook: "
                'make its class a subclass of that.'
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
    """Copies the features of a mapped step to the host and joins the devices' examples.

    With several processes, each gets the examples of its own devices.

    Args:
      features: arrays [devices, views, examples, size] by name.

    Returns:
      float32 [views, local devices * examples, size] by name.
    """
    found = {}
    for name, x in features.items():
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        rows = np.concatenate([np.asarray(shard.data, np.float32) for shard in shards])
        found[name] = np.moveaxis(rows, 0, 1).reshape(x.shape[1], -1, x.shape[-1])
    return found


def _measured(hook: Hook, event: Event) -> dict[str, float]:
    """Calls `Hook.measure` and checks what it returns.

    Raises:
      ValueError: it is no mapping, a name is in the record already, or a value is not finite.
    """
    measured = hook.measure(event)
    if not isinstance(measured, Mapping):
        kind = type(measured).__name__
        raise ValueError(f'measure must return a dict of numbers by name, not a {kind}')
    values = {str(name): float(value) for name, value in measured.items()}
    for name, value in values.items():
        if name in event.record:
            raise ValueError(f"'{name}' is in the record already")
        if not math.isfinite(value):
            raise ValueError(f"'{name}' is {value}")
    return values


def _name(hook: Hook) -> str:
    return f'{type(hook).__module__}:{type(hook).__qualname__}'
