"""Measures the compiled training step of any config on any device.

    python benchmarks/step.py --config=configs/default.py --config.batch_size=256

Prints one JSON object:
  images_per_second     examples (pairs of views) a second on all devices, from the median step
  step_seconds          smallest, median and largest of the timed steps
  compile_seconds       lowering and compiling
  flops_per_pair        FLOPs of the step for a pair, by XLA's own count
  least_flops_per_pair  FLOPs of 8 forward passes: 2 online, 2 target, and the 2 backward passes as
                        2 forward passes each; XLA's count of a forward pass of encoder, projector
                        and predictor (the target has no predictor)
  flop_ratio            flops_per_pair over least_flops_per_pair; should be at most 1.05. It may be
                        below 1: the first layer needs no gradient of its input
  peak_bytes            peak memory of a device, from the allocator or, if it does not tell (CPU),
                        XLA's sum of arguments, outputs and temporaries

With --steps=0 nothing runs, but FLOPs and memory are counted, also of a step that is too large for
this machine. The data is random; the input pipeline is not measured.
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
# Examples in the imagined data set, as many as ImageNet's training images.
_EXAMPLES = 1_281_167


def forward_flops(byol: Any, config: Any, batch: int) -> tuple[float, float]:
    """XLA's FLOPs of a forward pass of the online and of the target network for `batch` images."""
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
    """The compiled step for a single microbatch, without accumulation."""
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
    """Peak memory of one device, bytes."""
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
    # XLA counts the body of the loop over microbatches once, so count a single microbatch.
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
