"""Compares the time of a training step of configs/cifar10.py:cpu with that of lightly's BYOL.

    python benchmarks/cifar10_lightly.py --train=train.npz [--steps=20] [--rounds=3]

Both train the same network on the same pictures with batches of 128 pairs. They take turns, each in
its own process: lightly's projection and prediction heads, loss, target update and views, with
PyTorch's SGD and its DataLoader with two workers; and the pipeline and step of `python main.py
--config=configs/cifar10.py:cpu`. Prints the seconds of a step of both (medians over the rounds) and
the median of the rounds' ratios. It does not measure how well they learn.

    pip install torch torchvision lightly
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

# Must be imported before TensorFlow: after it, PyTorch's compiler (triton) crashes on import.
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import jax
import numpy as np
from PIL import Image

from byol_jax.app.build import build_run, step_of
from byol_jax.input.feed import open_feed
from byol_jax.training.step import pmap_feed, replicate, shard_batch
from configs import cifar10

Contender = Callable[[Path], AbstractContextManager[Callable[[], None]]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--train', type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--only', choices=CONTENDERS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.only:
        print(seconds_a_step(CONTENDERS[flags.only], flags.train, flags.steps))
        return
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(flags.rounds):
        for name, own in seconds.items():
            command = [sys.executable, *sys.argv, f'--only={name}']
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            own.append(float(done.stdout.split()[-1]))
    for name, own in seconds.items():
        print(f'{name:10} {statistics.median(own):.3f} s a step ({min(own):.3f} to {max(own):.3f})')
    ratio = statistics.median(
        a / b for a, b in zip(seconds['byol_jax'], seconds['lightly'], strict=True)
    )
    print(f'byol_jax / lightly: {ratio:.2f}')


def seconds_a_step(start: Contender, train: Path, steps: int) -> float:
    with start(train) as step:
        for _ in range(3):
            step()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begun) / steps


@contextmanager
def own_steps(train: Path) -> Iterator[Callable[[], None]]:
    config = cifar10.get_config('cpu')
    with config.unlocked():
        config.data.path = str(train)
    cv2.setNumThreads(0)
    run = build_run(config)
    train_step = step_of(run.config, run.plan, run.method, run.training)
    feed = open_feed(
        run.data.train,
        run.views,
        batch_size=run.plan.batch_size,
        seed=config.seed,
        stop_step=run.plan.total_steps,
        on=config.views.on,
    )
    compiled = pmap_feed(train_step, feed)
    state = replicate(run.training.initial)

    def step() -> None:
        nonlocal state
        batch = shard_batch(next(feed.batches), run.plan.device_count)
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)

    with closing(feed.batches):
        yield step


class Block(nn.Module):
    """A basic block with a projected shortcut, as in `byol_jax.models.resnet`."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, after, 3, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, train: Path):
        self._images = np.load(train)['images']
        views = {'input_size': 32, 'gaussian_blur': 0.0, 'min_scale': 0.2}
        self._transform = BYOLTransform(BYOLView1Transform(**views), BYOLView2Transform(**views))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return self._transform(Image.fromarray(self._images[index]))


@contextmanager
def lightly_steps(train: Path) -> Iterator[Callable[[], None]]:
    encoder = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32, 32),
        Block(32, 64),
        Block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    online = nn.Sequential(encoder, BYOLProjectionHead(128, 512, 128))
    predictor = BYOLPredictionHead(128, 512, 128)
    target = copy.deepcopy(online)
    deactivate_requires_grad(target)
    optimizer = torch.optim.SGD(
        [*online.parameters(), *predictor.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4
    )
    criterion = NegativeCosineSimilarity()
    loader = torch.utils.data.DataLoader(
        Pairs(train), 128, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def step() -> None:
        view1, view2 = next(batches)
        update_momentum(online, target, m=0.99)
        with torch.no_grad():
            targets = target(view1), target(view2)
        predictions = predictor(online(view1)), predictor(online(view2))
        loss = 0.5 * (criterion(predictions[0], targets[1]) + criterion(predictions[1], targets[0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    yield step


CONTENDERS: dict[str, Contender] = {'lightly': lightly_steps, 'byol_jax': own_steps}

if __name__ == '__main__':
    main()
