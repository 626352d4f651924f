"""What a long run keeps: memory, threads and open files over many tiny steps.

    python benchmarks/memory.py --workdir=DIR [--steps=20000] [--every=1000] [--trace]
        [--config.key=value ...]

Trains as main.py does, with a network so small that the steps cost next to nothing: 20 pairs of
8 pixels, a line logged every 20 steps, a checkpoint every 100, TensorBoard on. Prints a row every
`--every` steps and leaves them in DIR/memory.jsonl:

- resident: memory of the process, MB; `anonymous` without what is mapped from files.
- heap: what malloc has handed out of its arenas, MB, and `free` what it keeps there unused.
- mapped: large blocks that malloc has given a mapping of their own, MB.
- objects: that Python's garbage collector tracks; `arrays` of them are JAX's, on a device.
- threads and open files of the process.

With --trace, also the places in Python that hold more than they did at the row before, by
tracemalloc, which slows the run about three times.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from byol_jax import Event, Hook

COLUMNS = (
    'step',
    'resident',
    'anonymous',
    'heap',
    'free',
    'mapped',
    'objects',
    'arrays',
    'threads',
    'files',
)


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            'arena',
            'ordblks',
            'smblks',
            'hblks',
            'hblkhd',
            'usmblks',
            'fsmblks',
            'uordblks',
            'fordblks',
            'keepcost',
        )
    )


def measure() -> dict[str, Any]:
    """What this process holds now, after a garbage collection."""
    import jax

    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    info = libc.mallinfo2()
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return {
        'resident': round(pages * os.sysconf('SC_PAGE_SIZE') / 1e6, 1),
        'anonymous': round(int(status['RssAnon'].split()[0]) * 1024 / 1e6, 1),
        'heap': round(info.uordblks / 1e6, 1),
        'free': round(info.fordblks / 1e6, 1),
        'mapped': round(info.hblkhd / 1e6, 1),
        'objects': len(gc.get_objects()),
        'arrays': len(jax.live_arrays()),
        'threads': int(status['Threads']),
        'files': len(os.listdir('/proc/self/fd')),
    }


class Watch(Hook):
    """Measures every so many steps."""

    optional = False

    def __init__(self, every: int = 1000, trace: bool = False):
        """Measures nothing yet.

        Args:
          every: steps between two rows.
          trace: print which places in Python hold more than before.
        """
        self._every, self._trace = every, trace
        self._before: tracemalloc.Snapshot | None = None

    def start(self, run: Any, state: Any) -> None:
        self._path = run.workdir / 'memory.jsonl'
        if self._trace:
            tracemalloc.start(12)

    def logged(self, event: Event) -> None:
        if event.step % self._every:
            return
        row = {'step': event.step, **measure()}
        with self._path.open('a') as file:
            file.write(json.dumps(row) + '\n')
        print('| ' + ' | '.join(str(row[name]) for name in COLUMNS) + ' |', flush=True)
        if self._trace:
            now = tracemalloc.take_snapshot()
            if self._before is not None:
                for stat in now.compare_to(self._before, 'traceback')[:8]:
                    print(f'{stat.size_diff / 1e3:+.1f} kB in {stat.count_diff:+} blocks:')
                    print('\n'.join(stat.traceback.format(12)))
            self._before = now


def main() -> None:
    """Trains and measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--steps', type=int, default=20_000)
    parser.add_argument('--every', type=int, default=1000)
    parser.add_argument('--trace', action='store_true')
    arguments, more = parser.parse_known_args()
    changes = {}
    for word in more:
        key, _, value = word.removeprefix('--config.').partition('=')
        changes[key] = json.loads(value)

    from byol_jax.app.train import train
    from byol_jax.settings import changed, plain
    from byol_jax.sources.array import Array
    from byol_jax.sources.data import GIVEN
    from configs import default

    config = changed(
        plain(default.get_config()),
        {
            'name': 'memory',
            'total_steps': arguments.steps,
            'warmup_steps': 10,
            'batch_size': 20,
            'data.source': GIVEN,
            'views.image_size': 8,
            'encoder.name': 'resnet',
            'encoder.kwargs': {'stage_sizes': [1], 'width': 0.125, 'small_images': True},
            'projector.hidden_size': 16,
            'projector.output_size': 8,
            'predictor.hidden_size': 16,
            'checkpoint.every_steps': 100,
            'log.every_steps': 20,
            'evaluate.every_epochs': 0.0,
            'hooks': [['memory:Watch', {'every': arguments.every, 'trace': arguments.trace}]],
        }
        | changes,
    )
    pictures = np.random.default_rng(0).integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)
    print('| ' + ' | '.join(COLUMNS) + ' |\n|' + '---|' * len(COLUMNS))
    own = config['data']['source'] == GIVEN
    train(config, arguments.workdir, source=Array.of(pictures) if own else None)


if __name__ == '__main__':
    main()
