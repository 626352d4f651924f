"""Measures how many pairs of views a CPU core makes in a second, beside other libraries.

    python benchmarks/input.py --folder=DIR [--workers=1,2] [--rounds=5] [--pairs=1280]

Fills DIR, if it does not exist, with 200 JPEGs of 500x375 pixels, cut from the photographs of the
embedded sample. Then makes both views of the paper from them, at 224 pixels:

- pipeline: ours, as in training: from files to batches, by tf.data with one worker.
- views: ours without tf.data: decodes a file and makes two views.
- decode, decode PIL, decode TF: only decodes a file.
- torchvision, lightly, albumentations: their transforms with the paper's settings, on the input
  that each takes (PIL images, PIL images, arrays from OpenCV). Those that are not installed are
  left out: pip install torch torchvision lightly albumentations.

The contenders take turns in one process bound to one core. The CPU time of all threads is measured,
which other jobs on the machine affect little; it includes the start of tf.data, 0.05 s. Results are
medians over the rounds. `ratio` is the median of the rounds' ratios to albumentations or, without
it, to `decode PIL`.

With --workers, the pipeline then also runs with these numbers of workers, each on as many cores.
"""

from __future__ import annotations

import os

for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(_name, '1')

import argparse  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import closing  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

# Must be imported before TensorFlow: after it, PyTorch's compiler (triton) crashes on import.
for _name in ('torch', 'triton'):
    if importlib.util.find_spec(_name):
        importlib.import_module(_name)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from byol_jax.input.pipeline import view_batches  # noqa: E402
from byol_jax.input.stream import Stream  # noqa: E402
from byol_jax.sources.decode import read_file  # noqa: E402
from byol_jax.sources.folder import Folder  # noqa: E402
from byol_jax.sources.quiet_tensorflow import tf  # noqa: E402
from byol_jax.sources.sample import PHOTOGRAPHS, SamplePhotographs  # noqa: E402
from byol_jax.views.recipes import paper_views  # noqa: E402

SIZE = 224
# ImageNet's pictures have about 400x350 pixels and 110 kB on average.
WIDTH, HEIGHT, QUALITY = 500, 375, 92
FILES = 200
BATCH = 32
# Those of configs/imagenet.py.
VIEWS = paper_views(SIZE, antialias=False)


def fill(folder: Path) -> None:
    """Writes the JPEGs, parts of the photographs at several scales; always the same ones."""
    source = SamplePhotographs()
    rng = np.random.default_rng(0)
    (folder / 'all').mkdir(parents=True)
    for number in range(FILES):
        picture = source.load(number % len(PHOTOGRAPHS), 'image')
        height, width = picture.shape[:2]
        w = int(rng.uniform(0.5, 1) * min(width, height * WIDTH / HEIGHT))
        h = int(w * HEIGHT / WIDTH)
        left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
        part = Image.fromarray(picture[top : top + h, left : left + w])
        part.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(
            folder / 'all' / f'{number:04d}.jpg', quality=QUALITY
        )


def our_batches(source: Folder, steps: int, workers: int) -> Any:
    return view_batches(source, VIEWS, batch_size=BATCH, stop_step=steps, workers=workers)


def contenders(folder: Path) -> dict[str, Callable[[int], None]]:
    """Functions by name; each makes the given number of pairs, one after the other."""
    source = Folder(folder)
    files = sorted(str(path) for path in folder.glob('*/*.jpg'))
    stream = Stream(source, VIEWS)

    def each(make: Callable[[str], Any]) -> Callable[[int], None]:
        def run(pairs: int) -> None:
            for number in range(pairs):
                make(files[number % len(files)])

        return run

    def pipeline(pairs: int) -> None:
        steps = pairs // BATCH
        with closing(our_batches(source, steps, workers=1)) as made:
            for _ in made:
                pass

    def views(pairs: int) -> None:
        for first in range(0, pairs, BATCH):
            positions = range(first, first + BATCH)
            drawn = stream.draw(positions)
            steps = zip(*(view.steps(drawn[name]) for name, view in VIEWS.items()), strict=True)
            for position, own in zip(positions, steps, strict=True):
                loaded = stream.load(position).pictures
                for view, picture, each in zip(VIEWS.values(), loaded, own, strict=True):
                    view.make(picture, each)

    found = {
        'pipeline': pipeline,
        'views': views,
        'decode': each(lambda file: read_file(Path(file), 100)),
        'decode PIL': each(lambda file: np.asarray(Image.open(file).convert('RGB'))),
        'decode TF': each(lambda file: tf.io.decode_jpeg(tf.io.read_file(file), 3).numpy()),
    }
    for name, make in (
        ('torchvision', torchvision_pair),
        ('lightly', lightly_pair),
        ('albumentations', albumentations_pair),
    ):
        if importlib.util.find_spec(name):
            found[name] = each(make())
    return found


def torchvision_pair() -> Callable[[str], Any]:
    import torch
    from torchvision import transforms as T

    torch.set_num_threads(1)

    def view(blur: float, solarize: float) -> Any:
        return T.Compose(
            [
                T.RandomResizedCrop(SIZE, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                T.RandomGrayscale(0.2),
                T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], blur),
                T.RandomSolarize(128, solarize),
                T.PILToTensor(),
            ]
        )

    first, second = view(1.0, 0.0), view(0.1, 0.2)

    def pair(file: str) -> Any:
        image = Image.open(file).convert('RGB')
        return first(image), second(image)

    return pair


def lightly_pair() -> Callable[[str], Any]:
    import torch
    from lightly.transforms import BYOLTransform

    torch.set_num_threads(1)
    transform = BYOLTransform()
    return lambda file: transform(Image.open(file).convert('RGB'))


def albumentations_pair() -> Callable[[str], Any]:
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
    import albumentations as A

    def view(blur: float, solarize: float) -> Any:
        return A.Compose(
            [
                A.RandomResizedCrop((SIZE, SIZE), (0.08, 1.0), interpolation=cv2.INTER_CUBIC),
                A.HorizontalFlip(p=0.5),
                A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur((23, 23), (0.1, 2.0), p=blur),
                A.Solarize((0.5, 0.5), p=solarize),
            ]
        )

    first, second = view(1.0, 0.0), view(0.1, 0.2)

    def pair(file: str) -> Any:
        image = cv2.imread(file, cv2.IMREAD_COLOR_RGB)
        return first(image=image)['image'], second(image=image)['image']

    return pair


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--folder', type=lambda path: Path(path).expanduser(), required=True)
    parser.add_argument('--workers', default='')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--pairs', type=int, default=1280)
    flags = parser.parse_args()
    if not flags.folder.exists():
        fill(flags.folder)
    size = sum(path.stat().st_size for path in flags.folder.glob('*/*.jpg')) / FILES
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    cv2.setNumThreads(0)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    made = contenders(flags.folder)
    for run in made.values():
        run(BATCH)
    speeds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(flags.rounds):
        for name, run in made.items():
            begun = time.process_time()
            run(flags.pairs)
            speeds[name].append(flags.pairs / (time.process_time() - begun))
    base = 'albumentations' if 'albumentations' in made else 'decode PIL'
    print(f'{FILES} JPEGs of {WIDTH}x{HEIGHT}, {size / 1000:.0f} kB; {SIZE} pixels; per CPU second')
    print(f'{"":16}{"pairs/s":>8}{"lowest":>8}{"highest":>8}  ratio to {base}')
    for name, own in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(own, speeds[base], strict=True))
        print(f'{name:16}{statistics.median(own):8.0f}{min(own):8.0f}{max(own):8.0f}{ratio:8.2f}')
    for workers in map(int, filter(None, flags.workers.split(','))):
        os.sched_setaffinity(0, cores[:workers])
        source = Folder(flags.folder)
        own = []
        for _ in range(flags.rounds):
            steps = max(flags.pairs * workers // BATCH, 1)
            with closing(our_batches(source, steps, workers)) as stream:
                next(stream)
                begun = time.perf_counter()
                for _batch in stream:
                    pass
            own.append((steps - 1) * BATCH / (time.perf_counter() - begun))
        print(
            f'pipeline, {workers} workers on {workers} cores: {statistics.median(own):.0f} pairs/s'
        )


if __name__ == '__main__':
    main()
