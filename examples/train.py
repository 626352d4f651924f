"""A whole training run with the library alone: pictures in, encoder out.

python examples/train.py --folder=DIR --output=encoder [--steps=500]
"""

from __future__ import annotations

import argparse

import cv2
import jax

import byol_jax
from byol_jax import AXIS, MLP, Byol
from byol_jax.sources import Folder
from byol_jax.views import paper_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train(folder: str, output: str, steps: int, size: int = 64, batch_size: int = 32) -> None:
    """Trains a small ResNet on the images below a folder and writes it to `output`."""
    # Many examples are prepared at once; OpenCV's own threads would compete with that.
    cv2.setNumThreads(0)
    network = {'stage_sizes': (1, 1, 1), 'width': 0.5}
    encoder = byol_jax.build_encoder('resnet', network, AXIS)
    method = Byol(
        byol_jax.tap(encoder, 'avgpool', image_size=size, axis_name=AXIS),
        projector=MLP(512, 128, AXIS),
        predictor=MLP(512, 128, AXIS),
        mean=MEAN,
        std=STD,
    )
    params, stats = method.init(jax.random.key(0), size)
    schedule = byol_jax.learning_rate_schedule(0.3, warmup_steps=steps // 10, total_steps=steps)
    optimizer = byol_jax.lars(schedule, weight_decay=1e-6, mask=byol_jax.decay_mask(params))
    step = byol_jax.pmap_step(
        byol_jax.make_train_step(method, optimizer, total_steps=steps, tau_base=0.97, seed=0)
    )
    state = byol_jax.replicate(byol_jax.init_state(method, optimizer, params, stats))
    devices = jax.local_device_count()
    batches = byol_jax.view_batches(
        Folder(folder), paper_views(size), batch_size=batch_size, seed=0, stop_step=steps
    )
    for number, batch in enumerate(batches, 1):
        state, metrics = step(state, byol_jax.shard_batch(batch, devices))
        # Reading a value waits for its step, so read only some of them.
        if number % 10 == 0 or number == steps:
            loss, std = float(metrics['loss']), float(metrics['feature_std'])
            print(f'step {number}/{steps}  loss {loss:.4f}  feature std {std:.4f}', flush=True)
    state = jax.device_get(state)
    byol_jax.save_encoder(
        byol_jax.make_encoder(
            name='resnet',
            kwargs=network,
            hidden_layer='avgpool',
            variables={'params': state.online_params['encoder'], **state.online_stats['encoder']},
            image_size=size,
            mean=MEAN,
            std=STD,
            step=steps,
        ),
        output,
    )
    print(f'encoder: {output}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--folder', required=True)
    parser.add_argument('--output', required=True)
    parser.add_argument('--steps', type=int, default=500)
    train(**vars(parser.parse_args()))
