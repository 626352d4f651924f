"""Measures the compiled training step of any config on any device.

    python benchmarks/step.py --config=configs/default.py --config.batch_size=256

Prints one JSON object:
  images_per_second     examples (pairs of views) a second over all devices, by the median step
  step_seconds          smallest, median and largest of the timed steps
  compile_seconds       lowering and compiling
  flops_per_pair        of the step, by XLA's own count
  least_flops_per_pair  of 8 forward passes: 2 online, their backward passes at twice a forward pass
                        each, 2 target; by XLA's count of an encoder + projector + predictor forward
                        pass (the target's has no predictor)
  flop_ratio            the first over the second; the aim is at most 1.05. Below 1 is no error: the
                        first layer needs no gradient of its input
  peak_bytes            a device's peak memory: the allocator's figure, or XLA's own sum of
                        arguments, outputs and temporaries where there is none (CPU)

With --steps=0 nothing runs: FLOPs and memory of a step too large for this machine are still
counted. Data is random; the input pipeline is not measured here.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from byol_jax.app.build import Training, build_training, method_of, step_of
from byol_jax.app.cli import checked_flags, load_config
from byol_jax.app.plan import Plan, make_plan
from byol_jax.errors import UserError
from byol_jax.training.step import AXIS, pmap_step, replicate, shard_batch

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file with an optional :ARG.')
_STEPS = flags.DEFINE_integer('steps', 10, 'Timed steps; 0 to count only.', lower_bound=0)
_WARMUP = flags.DEFINE_integer('warmup', 2, 'Steps before the timed ones.', lower_bound=1)
# Examples in the imagined data set: ImageNet's training images.
_EXAMPLES = 1_281_167


def forward_flops(byol: Any, config: Any, batch: int) -> tuple[float, float]:
    """XLA's FLOPs of one forward pass of the online and of the target network, for `batch`."""
    size = config.views.image_size
    params, stats = jax.eval_shape(lambda: byol.init(jax.random.key(0), size))
    images = jax.ShapeDtypeStruct((1, batch, size, size, 3), jnp.uint8)

    def count(forward: Any) -> float:
        mapped = jax.pmap(
            lambda *arguments: forward(*arguments, jax.random.key(0))[0],
            axis_name=AXIS,
            in_axes=(None, None, 0),
            devices=jax.local_devices()[:1],
        )
        return mapped.lower(params, stats, images).compile().cost_analysis()['flops']

    return count(byol.online), count(byol.target)


def one_pass(byol: Any, config: Any, plan: Plan, training: Training) -> Any:
    """The compiled step over the pictures of a single pass, without accumulation."""
    batch_size = plan.batch_size // plan.accumulate_steps
    single = dataclasses.replace(
        plan,
        batch_size=batch_size,
        device_batch_size=batch_size // plan.device_count,
        accumulate_steps=1,
    )
    step = step_of(config, single, byol, training)
    size = config.views.image_size
    shape = (jax.local_device_count(), single.device_batch_size, size, size, 3)
    view = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return pmap_step(step).lower(training.initial, {'view1': view, 'view2': view}).compile()


def peak_bytes(compiled: Any) -> int:
    """Peak memory of one device in bytes."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and 'peak_bytes_in_use' in stats:
        return stats['peak_bytes_in_use']
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = load_config(_CONFIG)
    plan = make_plan(config, _EXAMPLES, jax.device_count())
    byol = method_of(config)
    training = build_training(config, plan, byol)
    step = pmap_step(step_of(config, plan, byol, training))
    size, rng = config.views.image_size, np.random.default_rng(0)
    batch = shard_batch(
        {
            view: rng.integers(0, 256, (plan.batch_size, size, size, 3), np.uint8)
            for view in ('view1', 'view2')
        },
        plan.device_count,
    )
    state = replicate(training.initial)
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin
    seconds: list[float] = []
    for i in range(_WARMUP.value + _STEPS.value if _STEPS.value else 0):
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        if i >= _WARMUP.value:
            seconds.append(time.perf_counter() - begin)
    # XLA counts the body of the loop over passes once, so the passes are counted one by one.
    pairs = plan.device_batch_size // plan.accumulate_steps
    single = compiled
    if plan.accumulate_steps > 1:
        single = one_pass(byol, config, plan, training)
    flops = single.cost_analysis()['flops'] / pairs
    online, target = (f / pairs for f in forward_flops(byol, config, pairs))
    least = 2 * 3 * online + 2 * target
    timing = {}
    if seconds:
        median = statistics.median(seconds)
        timing = {
            'images_per_second': round(plan.batch_size / median, 1),
            'step_seconds': [round(s, 4) for s in (min(seconds), median, max(seconds))],
        }
    result = {
        'config': sys.argv[1:],
        'device': f'{plan.device_count} x {jax.devices()[0].device_kind}',
        'jax': jax.__version__,
        'precision': config.precision,
        'batch_size': plan.batch_size,
        **timing,
        'compile_seconds': round(compile_seconds, 1),
        'flops_per_pair': flops,
        'least_flops_per_pair': least,
        'flop_ratio': round(flops / least, 4),
        'peak_bytes': peak_bytes(compiled),
    }
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    try:
        app.run(main, flags_parser=checked_flags)
    except UserError as error:
        sys.exit(f'error: {error}')
