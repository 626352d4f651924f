"""Measures the time and the memory that a folder of a million files takes.

    python benchmarks/scale.py --folder=DIR [--files=1000000] [--folders=1000] [--tensorflow]

Fills DIR, which must not exist or be from an earlier call, with hard links to tiny JPEGs in class
folders. Each line is measured in its own process, in seconds:

- cold: without an index file. The kernel still has the folders in memory, since its caches are not
  dropped; with a cold disk or a network this takes longer.
- index: with the index file that `cold` has written.
- pairs: the same folder as pairs by pattern, with the index file.
- start: from the call of `view_batches` to the first batch, in an epoch of 1.28 M examples.

`list` lists the files. `build_data`, which follows and so always has the index file, does all up to
the training and the held-out part. `fingerprint` is the digest that a resumed run compares.
`before` and `resident` are the peak resident memory (VmHWM), MB, after all imports and at the end;
with --tensorflow the imports include all that training imports.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# ext4 allows 65,000 links to a file.
LINKS = 50_000
# Training images of ImageNet, rounded.
EPOCH = 1_280_000


def fill(folder: Path, files: int, folders: int) -> None:
    """Makes `folders` class folders with `files` files in total, half of them '_left'."""
    done = folder / '.done'
    if done.exists():
        made = json.loads(done.read_text())
        if made != [files, folders]:
            sys.exit(f'{folder} holds {made[0]:,} files in {made[1]:,} folders: give another one')
        return
    if folder.exists():
        sys.exit(f'{folder} exists and was not made by this benchmark: give another one')
    folder.mkdir(parents=True)
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(stream, 'JPEG')
    target = folder
    # An even number, so that both files of a pair are in one folder.
    each = 2 * -(-files // (2 * folders))
    for number in range(files):
        if number % LINKS == 0:
            target = folder / f'.picture{number // LINKS}'
            target.write_bytes(stream.getvalue())
        place, within = divmod(number, each)
        if within == 0:
            (folder / f'n{place:08}').mkdir()
        side = ('left', 'right')[within % 2]
        os.link(target, f'{folder}/n{place:08}/ILSVRC_{within // 2:08}_{side}.JPEG')
    done.write_text(json.dumps([files, folders]))


def resident() -> float:
    """The peak resident memory of this process, MB."""
    line = next(x for x in Path('/proc/self/status').read_text().splitlines() if 'VmHWM' in x)
    return int(line.split()[1]) * 1024 / 1e6


def measure(what: str, folder: str, index: str) -> dict[str, Any]:
    """Measures one line; called in a new process.

    Args:
      what: 'cold', 'index', 'pairs' or 'start'.
      folder: the folder of files.
      index: path of the index file.

    Returns:
      The seconds of each part, and 'before' and 'resident', MB.
    """
    if what == 'start':
        return _measure_start()
    from byol_jax.app.data import build_data
    from byol_jax.app.fingerprint import fingerprint
    from byol_jax.sources.folder import list_files
    from configs import default

    config = default.get_config()
    config.data.path, config.data.index = folder, index
    config.data.held_out_fraction = 0.05
    if what == 'pairs':
        config.data.pair_keys = ('*_left', '*_right')
    before = resident()
    times = [time.perf_counter()]
    listed = len(list_files(Path(folder), 'data.path', index=index)[0])
    times.append(time.perf_counter())
    data = build_data(config)
    times.append(time.perf_counter())
    found = fingerprint(data)
    times.append(time.perf_counter())
    listing, building, digest = np.diff(times).tolist()
    return {
        'files': listed,
        'examples': found['examples'] + found['held_out'],
        'list': listing,
        'build_data': building,
        'fingerprint': digest,
        'before': before,
        'resident': resident(),
    }


def _measure_start() -> dict[str, Any]:
    from byol_jax.input.pipeline import view_batches
    from byol_jax.sources.base import Source, Subset
    from byol_jax.views.recipes import paper_views

    class Plain(Source):
        """Tiny pictures from memory."""

        def __len__(self) -> int:
            return EPOCH

        def load(self, index: int, key: str) -> np.ndarray:
            return np.full((8, 8, 3), index % 256, np.uint8)

        def name(self, index: int) -> str:
            return str(index)

    source = Subset(Plain(), np.arange(EPOCH))
    before = resident()
    started = time.perf_counter()
    stream = view_batches(source, paper_views(8), batch_size=64, start_step=123_456)
    next(stream)
    seconds = time.perf_counter() - started
    stream.close()
    return {'start': seconds, 'before': before, 'resident': resident()}


def measured(what: str, folder: Path, index: str, tensorflow: bool = False) -> dict[str, Any]:
    """Runs `measure` in its own process."""
    code = (
        f'import json, sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n'
        + ('import byol_jax.app.train\n' if tensorflow else '')
        + f'import scale; print(json.dumps(scale.measure({what!r}, {str(folder)!r}, {index!r})))'
    )
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    ran = subprocess.run(
        [sys.executable, '-c', code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    sys.stderr.write(ran.stderr)
    if ran.returncode:
        sys.exit(f'{what}: exit status {ran.returncode}')
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--folder', type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument('--files', type=int, default=1_000_000)
    parser.add_argument('--folders', type=int, default=1000)
    parser.add_argument('--tensorflow', action='store_true')
    given = parser.parse_args()
    if given.files % 2:
        sys.exit(f'--files={given.files} leaves one without a partner: give an even number')
    fill(given.folder, given.files, given.folders)
    # A folder that changed less than 2 seconds ago gets no index.
    time.sleep(3)
    with tempfile.TemporaryDirectory() as scratch:
        for what in ('cold', 'index', 'pairs', 'start'):
            figures = measured(what, given.folder, f'{scratch}/files.index', given.tensorflow)
            rounded = {name: round(figure, 3) for name, figure in figures.items()}
            print(json.dumps({'what': what, **rounded}), flush=True)


if __name__ == '__main__':
    main()
