"""Config + data set size + devices -> frozen, checked, derived numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from byol_jax.errors import UserError, did_you_mean

# Paper, Appendix J: learning rates are given for a batch of 256 and scale linearly with the batch.
REFERENCE_BATCH = 256

# Examples of a batch that the monitors look at, at most (or one of every pass of every device).
MONITORED_EXAMPLES = 256

OPTIMIZERS = ('lars', 'adamw')
PRECISIONS = ('float32', 'bfloat16')
# Where the views are made.
PLACES = ('cpu', 'accelerator')
# What --mode=evaluate can measure (docs/evaluation.md).
PROTOCOLS = ('knn', 'linear', 'probe', 'ridge', 'kmeans', 'retrieval', 'spectrum')


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every number a run derives from its config, in the unit its name says.

    Attributes:
      examples: training examples in the data set.
      batch_size: global batch, in examples (pairs of views) per optimizer step.
      device_count: devices of all processes together.
      process_count: processes (hosts).
      process_batch_size: examples each process reads per optimizer step.
      device_batch_size: examples each device sees per optimizer step.
      accumulate_steps: forward/backward passes per optimizer step.
      total_steps: optimizer steps of the whole run, K in the paper.
      warmup_steps: optimizer steps of linear learning-rate warm-up.
      learning_rate: peak learning rate, base x batch_size / 256 (paper, Appendix J).
      checkpoint_steps: optimizer steps between two checkpoints.
      log_steps: optimizer steps between two log lines.
      evaluate_steps: optimizer steps between two evaluations during training; 0: there is none.
      freeze_steps: optimizer steps at the start that leave the encoder's parameters alone.
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
        """Examples that each pass of each device hands out for the monitors, at least 1."""
        passes = self.device_count * self.accumulate_steps
        share = self.device_batch_size // self.accumulate_steps
        return min(share, math.ceil(MONITORED_EXAMPLES / passes))

    @property
    def monitored_rows(self) -> int:
        """Rows of features that process 0 measures: both views of its devices' examples."""
        devices = self.device_count // self.process_count
        return 2 * self.monitored * self.accumulate_steps * devices

    def epoch(self, step: int) -> float:
        """Epochs of data seen after `step` optimizer steps; the data set is one endless stream."""
        return step * self.batch_size / self.examples


def unknown_optimizer(name: str) -> UserError:
    """The error for an optimizer that is none of OPTIMIZERS."""
    known = ', '.join(f"'{each}'" for each in OPTIMIZERS)
    return UserError(
        f"optimizer.name='{name}': there is no such optimizer.{did_you_mean(name, OPTIMIZERS)} "
        f'There are: {known}.'
    )


def make_plan(config: Any, examples: int, device_count: int, process_count: int = 1) -> Plan:
    """Derives the plan, or raises UserError naming the key that cannot be used.

    Args:
      config: a ConfigDict with the keys of configs/default.py.
      examples: training examples in the data set, at least 1.
      device_count: devices of all processes together.
      process_count: processes (hosts).
    """
    check_ranges(config)
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
    total = total_steps(config, examples)
    warmup = _steps(config, 'warmup', batch, examples)
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
        checkpoint_steps=max(1, _steps(config.checkpoint, 'every', batch, examples, 'checkpoint.')),
        log_steps=config.log.every_steps,
        evaluate_steps=max(1, int(evaluate_every)) if evaluate_every else 0,
        freeze_steps=freeze,
    )


def total_steps(config: Any, examples: int) -> int:
    """Optimizer steps of a whole run; of a config as JSON values too.

    Raises:
      UserError: not exactly one of total_epochs and total_steps is given.
    """
    return _steps(config, 'total', config['batch_size'], examples)


def _steps(config: Any, prefix: str, batch: int, examples: int, where: str = '') -> int:
    """Resolves a duration given as exactly one of <prefix>_epochs and <prefix>_steps to steps."""
    epochs, steps = config[f'{prefix}_epochs'], config[f'{prefix}_steps']
    names = f'{where}{prefix}_epochs and {where}{prefix}_steps'
    if (epochs is None) == (steps is None):
        given = 'neither is' if epochs is None else f'both are ({epochs} and {steps})'
        raise UserError(f'Exactly one of {names} must be given; {given}.')
    if steps is not None:
        if steps < 0:
            raise UserError(f'{where}{prefix}_steps={steps} must not be negative.')
        return int(steps)
    if epochs < 0:
        raise UserError(f'{where}{prefix}_epochs={epochs} must not be negative.')
    # Whole steps over a stream of epochs, as in DeepMind's byol/configs/byol.py (max_steps).
    return int(epochs * examples // batch)


# key: smallest and largest value allowed.
_RANGES: dict[str, tuple[float, float]] = {
    'seed': (0, 2**31 - 1),
    'batch_size': (1, math.inf),
    'accumulate_steps': (1, math.inf),
    'target.base_ema': (0, 1),
    'data.tile_size': (0, math.inf),
    'data.tile_stride': (0, math.inf),
    'data.held_out_fraction': (0, 0.9),
    'data.held_out_seed': (0, 2**31 - 1),
    'data.cache_gib': (0, math.inf),
    'data.max_megapixels': (0.001, math.inf),
    'data.max_bad_fraction': (0, 1),
    'data.max_frame_gap': (0, 2**31 - 1),
    'data.workers': (0, 4096),
    'data.prefetch': (1, 4096),
    'views.image_size': (2, 8192),
    'encoder.freeze_steps': (0, math.inf),
    'projector.hidden_size': (1, math.inf),
    'projector.output_size': (1, math.inf),
    'predictor.hidden_size': (1, math.inf),
    'optimizer.base_learning_rate': (0, math.inf),
    'optimizer.weight_decay': (0, math.inf),
    'optimizer.momentum': (0, 1),
    'optimizer.trust_coefficient': (0, math.inf),
    'optimizer.b1': (0, 0.999999),
    'optimizer.b2': (0, 0.999999),
    'optimizer.epsilon': (0, 1),
    'checkpoint.keep': (1, math.inf),
    'log.every_steps': (1, math.inf),
    'log.lidar_every_steps': (0, math.inf),
    'evaluate.every_epochs': (0, math.inf),
    'evaluate.knn_temperature': (1e-6, math.inf),
    'evaluate.batch_size': (1, math.inf),
    'evaluate.max_gallery': (1, math.inf),
    'evaluate.max_queries': (1, math.inf),
    'evaluate.crop_fraction': (0.01, 1),
    'evaluate.linear_epochs': (1, math.inf),
    'evaluate.linear_batch_size': (1, math.inf),
    'evaluate.retrieval_pool': (1, math.inf),
}


def check_ranges(config: Any) -> None:
    """Raises UserError for the first value outside its range, before anything is opened."""
    for key, (low, high) in _RANGES.items():
        value = config
        for name in key.split('.'):
            value = value[name]
        if not low <= value <= high:
            limit = f'at least {low:g}' if high == math.inf else f'in [{low:g}, {high:g}]'
            raise UserError(f'{key}={value} must be {limit}.')
    if min(config.views.std) <= 0:
        raise UserError(f'views.std={tuple(config.views.std)} must be above 0.')
    if config.precision not in PRECISIONS:
        raise UserError(
            f"precision='{config.precision}' is not one of {', '.join(PRECISIONS)}."
            + did_you_mean(config.precision, PRECISIONS)
        )
    if config.views.on not in PLACES:
        raise UserError(
            f"views.on='{config.views.on}' is not one of {', '.join(PLACES)}."
            + did_you_mean(config.views.on, PLACES)
        )
    for name in ('view1', 'view2'):
        _check_view(config.views[name], f'views.{name}')
    _check_evaluate(config.evaluate)


def _check_evaluate(options: Any) -> None:
    if not options.protocols:
        raise UserError(
            f'evaluate.protocols=() measures nothing. There are: {", ".join(PROTOCOLS)}.'
        )
    for name in options.protocols:
        if name not in PROTOCOLS:
            raise UserError(
                f"evaluate.protocols={tuple(options.protocols)}: '{name}' is not one of "
                f'{", ".join(PROTOCOLS)}.{did_you_mean(str(name), PROTOCOLS)} Several are given '
                """as --config.evaluate.protocols="('knn','probe')"."""
            )
    for key, whole in (('knn_k', True), ('linear_learning_rates', False)):
        values = tuple(options[key])
        usable = all(
            isinstance(value, int if whole else (int, float)) and value > 0 for value in values
        )
        if not values or not usable or len(set(values)) < len(values):
            kind = 'whole numbers' if whole else 'numbers'
            raise UserError(f'evaluate.{key}={values} must be different {kind} above 0.')


def _check_view(view: Any, where: str) -> None:
    for key in ('flip', 'jitter', 'gray', 'blur', 'solarize'):
        if not 0 <= view[key] <= 1:
            raise UserError(f'{where}.{key}={view[key]} is a probability: it must lie in [0, 1].')
    for key, low in (('crop_area', 0.0), ('crop_ratio', 0.0), ('blur_sigma', 0.0)):
        pair = tuple(view[key])
        if len(pair) != 2 or not low < pair[0] <= pair[1]:
            raise UserError(f'{where}.{key}={pair} must be a range (low, high) above {low}.')
    if view.crop_area[1] > 1:
        raise UserError(f'{where}.crop_area={tuple(view.crop_area)} must not exceed 1.')
    if not 0 <= view.hue <= 0.5:
        raise UserError(f'{where}.hue={view.hue} must lie in [0, 0.5] turns of the colour circle.')
    for key in ('brightness', 'contrast', 'saturation'):
        if not 0 <= view[key] <= 1:
            raise UserError(f'{where}.{key}={view[key]} must lie in [0, 1].')
