"""Measures the speed of tiles cut from 2K PNGs, with and without data.cache.

    python benchmarks/tiles.py [--pictures=24] [--rounds=5] [--seconds=10] [--folder=DIR]

Makes PNGs of DIV2K's usual size (2040x1356) from the embedded sample photographs, enlarged and
mirrored to fill it, with noise, so that decoding costs as much as for a photograph. Then measures
pairs of views a second (512-pixel tiles, 224-pixel views, as in configs/div2k.py). Each round runs
one process of each kind:

  no memory      data.cache_gib=0: decodes a picture for each tile
  half           data.cache_gib holds half of the pictures
  all            data.cache_gib holds all pictures
  data.cache     the decoded pictures are on disk

The measurement starts when each picture was loaded once and a few batches were made. Peak memory is
the process's peak resident set; with data.cache it includes pages of mapped files, which the system
may drop at any time. The PNGs and the cache are in the system's page cache, so the speed of a disk
is not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
from absl import app, flags

from byol_jax.app.data import build_data
from byol_jax.cores import usable_cores
from byol_jax.input.pipeline import view_batches
from byol_jax.settings import Settings
from byol_jax.sources.sample import SamplePhotographs
from byol_jax.views.recipes import config_views
from configs import div2k

_PICTURES = flags.DEFINE_integer('pictures', 24, 'PNGs to make.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each kind is measured.')
_SECONDS = flags.DEFINE_float('seconds', 10.0, 'Length of a measurement.')
_FOLDER = flags.DEFINE_string('folder', None, 'Where the pictures are made; by default in /tmp.')
_KIND = flags.DEFINE_string('kind', None, 'Used by the processes that measure.')

KINDS = ('no memory', 'half', 'all', 'data.cache')
HEIGHT, WIDTH, BATCH = 1356, 2040, 16
PICTURE_GIB = HEIGHT * WIDTH * 3 / 2**30


def make_pictures(folder: Path, count: int) -> None:
    """Writes the PNGs that do not exist yet."""
    hr = folder / 'DIV2K_train_HR'
    hr.mkdir(parents=True, exist_ok=True)
    photographs = SamplePhotographs()
    for number in range(1, count + 1):
        path = hr / f'{number:04}.png'
        if path.exists():
            continue
        rng = np.random.default_rng(number)
        picture = photographs.load(number % len(photographs), 'image')
        height, width = picture.shape[:2]
        # Enlarge by at most 2, since a smooth picture is cheaper to decode, then mirror.
        scale = min(2.0, max(HEIGHT / height, WIDTH / width))
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        down, across = (max(0, n - m) for n, m in zip((HEIGHT, WIDTH), picture.shape, strict=False))
        picture = np.pad(picture, ((0, down), (0, across), (0, 0)), 'symmetric')[:HEIGHT, :WIDTH]
        noisy = np.rint(picture + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(path), noisy[..., ::-1])


def make_config(folder: Path, kind: str) -> Any:
    """The config configs/div2k.py for these pictures, with one kind of cache."""
    config = div2k.get_config('')
    config.batch_size = BATCH
    config.data.path = str(folder)
    share = {'no memory': 0.0, 'half': 0.5, 'all': 1.01, 'data.cache': 0.0}[kind]
    config.data.cache_gib = share * _PICTURES.value * PICTURE_GIB
    config.data.cache = str(folder / 'cache') if kind == 'data.cache' else ''
    return config


def measure(folder: Path, kind: str) -> dict[str, float]:
    """Pairs a second and the peak resident set, MB, of this process."""
    config = make_config(folder, kind)
    data = build_data(config)
    if data.cache is not None:
        started = time.perf_counter()
        written = 0
        for filled in data.cache.fill(tuple(config.data.pair_keys), usable_cores()):
            written = filled.written
        if written:
            seconds = time.perf_counter() - started
            print(f'built: {written / 1e6:,.0f} MB in {seconds:.1f} s', file=sys.stderr)
    # Load each picture once, to measure the state after the first epoch.
    for index in np.unique(data.train.labels, return_index=True)[1]:
        data.train.load(int(index), 'hr')
    cv2.setNumThreads(0)
    made = view_batches(
        data.train,
        config_views(Settings.of(config).views, config.data.pair_keys),
        batch_size=config.batch_size,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )
    with closing(made) as stream:
        for _ in range(1 + config.data.prefetch):
            next(stream)
        started, pairs = time.perf_counter(), 0
        while time.perf_counter() < started + _SECONDS.value:
            pairs += len(next(stream)['view1'])
        seconds = time.perf_counter() - started
    return {'pairs_per_second': pairs / seconds, 'peak_mb': peak_megabytes()}


def peak_megabytes() -> float:
    """Peak resident set of this process, MB; getrusage would include that of its parent."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) * 1024 / 1e6


def measure_apart(folder: Path, kind: str) -> dict[str, float]:
    """Runs `measure` in its own process."""
    sizes = (f'--pictures={_PICTURES.value}', f'--seconds={_SECONDS.value}')
    result = subprocess.run(
        [sys.executable, __file__, f'--kind={kind}', f'--folder={folder}', *sizes],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1800,
    )
    return json.loads(result.stdout.splitlines()[-1])


def compare(folder: Path) -> None:
    make_pictures(folder, _PICTURES.value)
    pngs = list((folder / 'DIV2K_train_HR').glob('*.png'))
    megabytes = sum(path.stat().st_size for path in pngs) / 1e6
    print(f'{len(pngs)} PNGs of {WIDTH}x{HEIGHT}, {megabytes / len(pngs):.1f} MB each')
    measure_apart(folder, 'data.cache')  # fills the cache
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(_ROUNDS.value):
        # Alternate the order, so that a drift of the machine's speed affects all kinds equally.
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            found[kind].append(measure_apart(folder, kind))
            print(f'round {number + 1}: {kind}: {found[kind][-1]["pairs_per_second"]:.1f} pairs/s')
    plain = np.array([m['pairs_per_second'] for m in found['no memory']])
    print('\nkind | pairs/s: median (least to most) | times "no memory", by round | peak memory')
    for kind, measured in found.items():
        speed = np.array([m['pairs_per_second'] for m in measured])
        ratio = speed / plain
        print(
            f'{kind} | {np.median(speed):.1f} ({speed.min():.1f} to {speed.max():.1f}) | '
            f'{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) | '
            f'{np.median([m["peak_mb"] for m in measured]):,.0f} MB'
        )


def main(_: list[str]) -> None:
    if _KIND.value:
        print(json.dumps(measure(Path(_FOLDER.value).expanduser(), _KIND.value)))
        return
    if _FOLDER.value:
        compare(Path(_FOLDER.value).expanduser())
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder))


if __name__ == '__main__':
    app.run(main)
