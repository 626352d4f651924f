"""Fine-tunes a pretrained encoder on pictures in class folders, or trains a linear head on it.

    python examples/finetune.py --encoder=runs/div2k/encoder --train=DIR --test=DIR [--linear]

Both folders hold one folder of pictures for each class, with the same names. `finetune` is the part
to copy; the rest feeds it. It saves nothing: it returns `params` and `state`. To save the encoder:

    variables = {'params': params['encoder'], **state}
    byol_jax.save_encoder(dataclasses.replace(encoder, variables=variables), 'finetuned')

`Encoder.apply` is the same for Linen and NNX networks. For an NNX network, `encoder.module` is also
an `nnx.Module` with its variables, for `nnx.Optimizer`; it takes normalised pictures.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from byol_jax import Encoder, UserError, load_encoder
from byol_jax.cores import usable_cores
from byol_jax.evaluation.features import encode_source
from byol_jax.sources.bad_files import name_some
from byol_jax.sources.base import Cached, Source
from byol_jax.sources.folder import Folder
from byol_jax.training.optimizers import decay_mask
from byol_jax.views.colors import Flip
from byol_jax.views.crop import Crop
from byol_jax.views.view import View

# Ranges of the random crops' share of the picture's area, and of their width / height.
CROP_AREA, CROP_RATIO = (0.35, 1.0), (3 / 4, 4 / 3)
# The centre crop's share of the shorter side, for the test; 224 / 256 as in the paper.
CROP_FRACTION = 0.875
# Memory for the decoded pictures of each of the two folders.
CACHE_BYTES = 2**30


def finetune(
    encoder: Encoder,
    train: Source,
    test: Source,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    linear: bool,
    seed: int,
) -> tuple[Any, Any]:
    """Trains encoder and head, or only the head if `linear`, and prints the test accuracy.

    Args:
      encoder: the pretrained encoder, which is not changed.
      train: labelled pictures to train on.
      test: labelled pictures of the same classes to test on.
      epochs: number of passes over `train`.
      batch: number of pictures in a step.
      learning_rate: AdamW's peak; warmed up over a tenth of the steps, then a cosine to 0.
      linear: whether the encoder's parameters and batch statistics stay as they were pretrained.
      seed: seed of the order, the crops and flips, and dropout.

    Returns:
      (params, state): {'encoder': .., 'head': ..}, and the encoder's other collections.
    """
    features, classes = encoder.description['feature_size'], len(train.label_names)
    head = {'kernel': jnp.zeros((features, classes)), 'bias': jnp.zeros(classes)}
    params = {'encoder': encoder.variables['params'], 'head': head}
    state = {name: tree for name, tree in encoder.variables.items() if name != 'params'}

    batch = min(batch, len(train))
    steps = epochs * (len(train) // batch)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    # No weight decay for biases and norm parameters.
    optimizer = optax.adamw(schedule, weight_decay=1e-4, mask=decay_mask)
    if linear:
        parts = {'encoder': optax.set_to_zero(), 'head': optimizer}
        optimizer = optax.partition(parts, {part: part for part in parts})
    moments = optimizer.init(params)

    def classify(params: Any, state: Any, images: Any, train: bool, rng: Any) -> Any:
        variables = {'params': params['encoder'], **state}
        features, state = encoder.apply(variables, images, train=train, rng=rng)
        return features @ params['head']['kernel'] + params['head']['bias'], state

    def loss_of(params: Any, state: Any, images: Any, labels: Any, rng: Any) -> Any:
        # Training mode would change the batch statistics of a frozen encoder too.
        logits, state = classify(params, state, images, train=not linear, rng=rng)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    @jax.jit
    def train_step(params: Any, state: Any, moments: Any, *inputs: Any) -> Any:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, state), grads = gradient(params, state, *inputs)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), state, moments, loss

    @jax.jit
    def predict(params: Any, state: Any, images: Any) -> Any:
        return classify(params, state, images, train=False, rng=None)[0]

    # Resized as in pretraining; older exports do not say how.
    about, key = encoder.description, jax.random.key(seed)
    size, antialias = about['image_size'], about.get('antialias', True)

    def report(when: str) -> None:
        share = accuracy(functools.partial(predict, params, state), test, size, antialias, batch)
        print(f'{when}  test accuracy {100 * share:.1f} %', flush=True)

    report('before')
    for epoch in range(epochs):
        losses = []
        for images, labels in training_batches(train, size, antialias, batch, seed, epoch):
            key, rng = jax.random.split(key)
            params, state, moments, loss = train_step(params, state, moments, images, labels, rng)
            # Keep the array: converting it to a number would wait for the step.
            losses.append(loss)
        report(f'epoch {epoch + 1}/{epochs}  loss {np.mean(losses):.4f}')
    return params, state


def training_batches(
    source: Source, size: int, antialias: bool, batch: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields one epoch in random order: uint8 [B, size, size, 3] and int [B]; drops a remainder.

    Every random choice is a function of (seed, epoch, example), whichever thread makes it.
    """

    view = View([Crop(size, CROP_AREA, CROP_RATIO, antialias), Flip()])

    def cropped(index: int) -> np.ndarray:
        drawn = view.draw(seed, 1, np.array([epoch]), np.array([index]))
        return view.make(source.load(index, 'image'), view.steps(drawn)[0])

    # No example has the number len(source), so the order gets its own random numbers.
    order = np.random.default_rng([seed, epoch, len(source)]).permutation(len(source))
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            yield np.stack(list(pool.map(cropped, chosen))), source.labels[chosen]


def accuracy(predict: Any, source: Source, size: int, antialias: bool, batch: int) -> float:
    """The share of a source's pictures, in [0, 1], whose largest logit is that of the label."""
    encoded = encode_source(
        predict,
        source,
        'image',
        image_size=size,
        crop_fraction=CROP_FRACTION,
        antialias=antialias,
        batch_size=batch,
    )
    if encoded.bad:
        # An accuracy on only some of the given pictures would be misleading.
        raise UserError(f'{name_some(encoded.bad)}. Mend, convert or remove the file(s).')
    return float(np.mean(encoded.features.argmax(axis=1) == source.labels))


def open_folders(train: str, test: str) -> tuple[Source, Source]:
    """Opens the two folders as sources.

    Raises:
      UserError: a folder has no pictures or no class folders, or their classes differ.
    """
    one, other = (Path(path).expanduser().resolve() for path in (train, test))
    if one == other or one in other.parents or other in one.parents:
        raise UserError(
            f'--train={train} and --test={test} are the same folder, or one lies inside the other: '
            'the accuracy would be on pictures that were trained on. Give two folders.'
        )
    folders = {}
    for flag, path in (('--train', train), ('--test', test)):
        folders[flag] = folder = Folder(path, given_as=flag)
        if folder.labels is None:
            raise UserError(
                f'{flag}={path} has no class folders ({folder.unlabelled}): put every '
                f'picture into the folder of its class, as in {Path(path) / "cat" / "1.jpg"}; it '
                'takes at least two classes.'
            )
    classes = [set(folder.label_names) for folder in folders.values()]
    if classes[0] != classes[1]:
        differing = sorted(classes[0] ^ classes[1])
        shown = ', '.join(differing[:5]) + (', ..' if len(differing) > 5 else '')
        raise UserError(
            f'--train={train} and --test={test} must hold the same classes; only one of them has: '
            f'{shown}.'
        )
    return Cached(folders['--train'], CACHE_BYTES), Cached(folders['--test'], CACHE_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--encoder', required=True, help='folder of the exported encoder')
    parser.add_argument(
        '--allow',
        nargs='*',
        default=(),
        help='modules of your own whose class the encoder may be of, such as my_networks',
    )
    parser.add_argument('--train', required=True, help='folder of class folders to learn from')
    parser.add_argument('--test', required=True, help='the same classes, other pictures')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--batch', type=int, default=64, help='pictures in a step')
    parser.add_argument('--learning_rate', type=float, default=1e-3, help="AdamW's peak")
    parser.add_argument(
        '--linear',
        action='store_true',
        help='train only the head; use a higher learning rate, such as 1e-2',
    )
    parser.add_argument('--seed', type=int, default=0)
    options = vars(parser.parse_args())
    for name, least in (('epochs', 1), ('batch', 1), ('seed', 0)):
        if options[name] < least:
            parser.error(f'--{name}={options[name]} must be at least {least}')

    train, test = open_folders(options.pop('train'), options.pop('test'))
    encoder = load_encoder(options.pop('encoder'), options.pop('allow'))
    chance = np.bincount(test.labels).max() / len(test)
    print(
        f'{len(train):,} pictures of {len(train.label_names)} classes, {len(test):,} to test on; '
        f'the most frequent class is {100 * chance:.1f} % of them',
        flush=True,
    )
    finetune(encoder, train, test, **options)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
