"""The plan of a run: all numbers derived from the config, the data set's size and the devices."""

from __future__ import annotations

import dataclasses
import math

from byol_jax.errors import UserError
from byol_jax.settings import Settings

# Paper, Appendix J: learning rates are given for a batch of 256 and scale linearly with the batch.
REFERENCE_BATCH = 256

# Examples of a batch that the monitors measure, at most (but at least one a device and microbatch).
MONITORED_EXAMPLES = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers that a run derives from its config, in the units that their names give.

    Attributes:
      examples: training examples in the data set.
      batch_size: global batch, in examples (pairs of views) per optimizer step.
      device_count: devices of all processes together.
      process_count: processes (hosts).
      process_batch_size: examples that each process reads per optimizer step.
      device_batch_size: examples that each device gets per optimizer step.
      accumulate_steps: microbatches (forward/backward passes) per optimizer step.
      total_steps: optimizer steps of the whole run, K in the paper.
      warmup_steps: optimizer steps of linear learning-rate warm-up.
      learning_rate: peak learning rate, base x batch_size / 256 (paper, Appendix J).
      checkpoint_steps: optimizer steps between two checkpoints; 0: only the last one is saved.
      log_steps: optimizer steps between two log lines.
      evaluate_steps: optimizer steps between two evaluations during training; 0 for none.
      freeze_steps: optimizer steps at the start during which the encoder's parameters are frozen.
    """

    examples: int
    batch_size: int
    device_count: int
    process_count: int
    process_batch_size: int
    device_batch_size: int
    accumulate_steps: int
    total_steps: int
    warmup_steps: int
    learning_rate: float
    checkpoint_steps: int
    log_steps: int
    evaluate_steps: int
    freeze_steps: int

    @property
    def monitored(self) -> int:
        """Examples per microbatch and device whose features the step returns, at least 1."""
        passes = self.device_count * self.accumulate_steps
        share = self.device_batch_size // self.accumulate_steps
        return min(share, math.ceil(MONITORED_EXAMPLES / passes))

    @property
    def monitored_rows(self) -> int:
        """Rows of features that process 0 measures: two views of its devices' examples."""
        devices = self.device_count // self.process_count
        return 2 * self.monitored * self.accumulate_steps * devices

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due at a step; the last one is saved in any case."""
        due = self.checkpoint_steps and step % self.checkpoint_steps == 0
        return bool(due) or step >= self.total_steps

    @property
    def checkpoints(self) -> int:
        """How many checkpoints a whole run writes."""
        each = self.checkpoint_steps
        return math.ceil(self.total_steps / each) if each else 1

    def epoch(self, step: int) -> float:
        """Epochs of data seen after `step` optimizer steps, as a fraction."""
        return step * self.batch_size / self.examples


def make_plan(config: Settings, examples: int, device_count: int, process_count: int = 1) -> Plan:
    """Derives the plan of a run.

    Args:
      config: the run's settings.
      examples: training examples in the data set, at least 1.
      device_count: devices of all processes together.
      process_count: processes (hosts).

    Raises:
      UserError: a value of the config cannot be used; the message names its key.
    """
    batch = config.batch_size
    accumulate = config.accumulate_steps
    if batch % (device_count * accumulate):
        smaller = batch - batch % (device_count * accumulate)
        near = [n for n in (smaller, smaller + device_count * accumulate) if n > 0]
        raise UserError(
            f'batch_size={batch} cannot be divided evenly over {device_count} device(s) x '
            f'accumulate_steps={accumulate}. Use {" or ".join(map(str, near))}, or change '
            'accumulate_steps.'
        )
    device_batch = batch // device_count
    if device_count * device_batch // accumulate < 2:
        raise UserError(
            f'batch_size={batch} with accumulate_steps={accumulate} leaves one image a forward '
            'pass: batch normalisation needs at least 2. Use a larger batch_size.'
        )
    total = total_steps(config.total_epochs, config.total_steps, batch, examples)
    warmup = _steps('warmup', config.warmup_epochs, config.warmup_steps, batch, examples)
    if config.total_steps is not None and total < 1:
        raise UserError(f'total_steps={total} leaves nothing to train: it must be at least 1.')
    if total < 1:
        raise UserError(
            f'total_epochs={config.total_epochs} over {examples} examples is less than one batch '
            f'of {batch}: there is no step to train. Use more epochs or a smaller batch_size.'
        )
    if warmup >= total:
        raise UserError(
            f'The warm-up ({warmup} steps) must be shorter than the run ({total} steps): lower '
            'warmup_epochs/warmup_steps (--config.warmup_steps=0 for none) or raise '
            'total_epochs/total_steps.'
        )
    freeze = config.encoder.freeze_steps
    if freeze >= total:
        raise UserError(
            f'encoder.freeze_steps={freeze} leaves no step to train the encoder in: the run has '
            f'{total}. Lower it, or raise total_epochs/total_steps.'
        )
    saved = config.checkpoint
    save_every = _steps('checkpoint.every', saved.every_epochs, saved.every_steps, batch, examples)
    evaluate_every = config.evaluate.every_epochs * examples / batch
    return Plan(
        examples=examples,
        batch_size=batch,
        device_count=device_count,
        process_count=process_count,
        process_batch_size=batch // process_count,
        device_batch_size=device_batch,
        accumulate_steps=accumulate,
        total_steps=total,
        warmup_steps=warmup,
        learning_rate=config.optimizer.base_learning_rate * batch / REFERENCE_BATCH,
        # Less than one step means every step; 0 means never, as elsewhere.
        checkpoint_steps=max(1, save_every) if saved.every_epochs or saved.every_steps else 0,
        log_steps=config.log.every_steps,
        evaluate_steps=max(1, int(evaluate_every)) if evaluate_every else 0,
        freeze_steps=freeze,
    )


def total_steps(epochs: float | None, steps: int | None, batch: int, examples: int) -> int:
    """Optimizer steps of the whole run.

    Args:
      epochs: the config's total_epochs, or None.
      steps: the config's total_steps, or None.
      batch: examples per optimizer step.
      examples: training examples in the data set.

    Raises:
      UserError: not exactly one of epochs and steps is given.
    """
    return _steps('total', epochs, steps, batch, examples)


def _steps(key: str, epochs: float | None, steps: int | None, batch: int, examples: int) -> int:
    """Converts a duration, given as exactly one of <key>_epochs and <key>_steps, to steps."""
    if (epochs is None) == (steps is None):
        given = 'neither is' if epochs is None else f'both are ({epochs} and {steps})'
        raise UserError(f'Exactly one of {key}_epochs and {key}_steps must be given; {given}.')
    if epochs is None:
        assert steps is not None
        return steps
    # Rounded down once for the whole duration, as DeepMind's byol/configs/byol.py (max_steps) does;
    # an epoch need not be a whole number of steps.
    return int(epochs * examples // batch)
