"""Measures how far training on 1, 2, 4 and 8 devices agrees at the same global batch.

    python benchmarks/devices.py [--base_learning_rate=0.2]

Runs 20 float32 steps of a small ResNet with synchronised batch normalisation on 8 simulated CPU
devices. Prints, for each number of devices, the relative difference of all online weights from
those of one device (norm of the difference over the norm) after 2, 5, 10 and 20 steps. Only the
order of float32 sums differs. This is 1e-8 a step, until rounding switches a ReLU or a maximum.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import app, flags

from byol_jax.app.build import build_training, method_of, step_of
from byol_jax.app.plan import make_plan
from byol_jax.methods.base import Method
from byol_jax.settings import Settings
from byol_jax.training.step import AXIS, shard_batch
from configs import default

_RATE = flags.DEFINE_float('base_learning_rate', 0.2, "The default is the paper's for 1000 epochs.")
COUNTS, MARKS, BATCH, SIZE = (1, 2, 4, 8), (2, 5, 10, 20), 32, 32


def small_config(base_learning_rate: float) -> Settings:
    """A config of a small network, for 40 steps."""
    config = default.get_config()
    config.batch_size = BATCH
    config.total_epochs, config.total_steps = None, 40
    config.warmup_epochs, config.warmup_steps = None, 4
    config.optimizer.base_learning_rate = base_learning_rate
    config.views.image_size = SIZE
    config.encoder.name = 'resnet'
    config.encoder.kwargs = {'stage_sizes': (1, 1), 'width': 0.25}
    config.projector.hidden_size = config.predictor.hidden_size = 32
    config.projector.output_size = 16
    return Settings.of(config)


def weights_after(byol: Method, config: Settings, devices: int) -> dict[int, np.ndarray]:
    """All online weights as one float64 vector, after each number of steps in MARKS."""
    plan = make_plan(config, examples=1000, device_count=devices)
    training = build_training(config, plan, byol)
    step = jax.pmap(
        step_of(config, plan, byol, training),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=jax.devices()[:devices],
    )
    state, found = training.initial, {}
    for k in range(1, MARKS[-1] + 1):
        views = np.random.default_rng(k).integers(0, 256, (2, BATCH, SIZE, SIZE, 3), np.uint8)
        batch = {'view1': views[0], 'view2': views[1]}
        state, metrics = step(state, shard_batch(batch, devices))
        jax.block_until_ready(metrics)
        if k in MARKS:
            leaves = jax.tree.leaves(jax.device_get(state.online_params))
            found[k] = np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])
    return found


def main(_: list[str]) -> None:
    config = small_config(_RATE.value)
    byol = method_of(config)
    one, *others = (weights_after(byol, config, n) for n in COUNTS)
    result = {
        f'{n} devices': {
            f'after {k} steps': float(np.linalg.norm(w[k] - one[k]) / np.linalg.norm(one[k]))
            for k in MARKS
        }
        for n, w in zip(COUNTS[1:], others, strict=True)
    }
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    app.run(main)
