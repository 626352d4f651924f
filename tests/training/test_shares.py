"""Every example exactly once in an epoch, and the same pairs at each step, on any hosts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from streams import batches, view_of, views_of

from byol_jax.sources.base import Source, Subset
from configs import default

EXAMPLES, BATCH, EPOCHS, SIZE = 37, 8, 3, 12
STEPS = -(-EPOCHS * EXAMPLES // BATCH)


class Marked(Source):
    """Example i: noise of its own, with i in every red value."""

    def __len__(self) -> int:
        return 3 * EXAMPLES

    def load(self, index: int, key: str) -> np.ndarray:
        picture = np.random.default_rng(index).integers(0, 256, (14, 18, 3), np.uint8)
        picture[..., 0] = index
        return picture

    def name(self, index: int) -> str:
        return f'{index}.jpg'


# Other examples than the first ones, in another order: places in the subset count.
CHOSEN = np.random.default_rng(0).permutation(3 * EXAMPLES)[:EXAMPLES]


def make_config(workers: int, neutral: bool = False):
    config = default.get_config()
    config.seed = 11
    config.batch_size = BATCH
    config.views.image_size = SIZE
    config.data.workers = workers
    if neutral:
        for view in (config.views.view1, config.views.view2):
            view.jitter = view.gray = view.blur = view.solarize = 0.0
    return config.lock()


def global_steps(config, hosts: int, start: int = 0) -> list[dict[str, np.ndarray]]:
    """Each step's views of all hosts, in the order of hosts: uint8 [BATCH, S, S, 3]."""
    source = Subset(Marked(), CHOSEN)
    shares = [
        list(
            batches(
                source,
                config,
                start_step=start,
                stop_step=STEPS,
                process_index=host,
                process_count=hosts,
            )
        )
        for host in range(hosts)
    ]
    assert [len(share) for share in shares] == [STEPS - start] * hosts
    assert all(batch['view1'].shape[0] == BATCH // hosts for share in shares for batch in share)
    return [
        {view: np.concatenate([batch[view] for batch in step]) for view in ('view1', 'view2')}
        for step in zip(*shares, strict=True)
    ]


@pytest.mark.parametrize('hosts', [1, 2, 4])
@pytest.mark.parametrize('workers', [1, 2, 5])
def test_every_example_exactly_once_an_epoch(hosts, workers):
    """All hosts together show each example once in each 37 places of the stream, in both views.

    Nothing is dropped: the batch in which an epoch ends continues with the next one.
    """
    steps = global_steps(make_config(workers, neutral=True), hosts)
    shown = {view: np.concatenate([step[view][..., 0] for step in steps]) for view in steps[0]}
    # The red value is the example, wherever the crop lies.
    assert all(np.all(red == red[:, :1, :1]) for red in shown.values())
    np.testing.assert_array_equal(shown['view1'], shown['view2'])
    examples = shown['view1'][:, 0, 0]
    epochs = examples[: EPOCHS * EXAMPLES].reshape(EPOCHS, EXAMPLES)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(CHOSEN))
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS


def digest(views: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(views['view1'].tobytes() + views['view2'].tobytes()).hexdigest()


@pytest.fixture(scope='module')
def expected() -> list[str]:
    """Each step's digest, made without the pipeline, from the permutations and `View`."""
    config, source = make_config(1), Subset(Marked(), CHOSEN)
    digests = []
    for step in range(STEPS):
        views: dict[str, list[np.ndarray]] = {'view1': [], 'view2': []}
        for position in range(step * BATCH, (step + 1) * BATCH):
            epoch, place = divmod(position, EXAMPLES)
            key, counter = [config.seed, 2], [0, 0, 0, epoch]
            rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
            example = int(rng.permutation(EXAMPLES)[place])
            for number, view in enumerate(views.values(), start=1):
                view.append(
                    view_of(
                        views_of(config)[f'view{number}'],
                        source.load(example, 'image'),
                        seed=config.seed,
                        epoch=epoch,
                        example=example,
                        number=number,
                    )
                )
        digests.append(digest({name: np.stack(view) for name, view in views.items()}))
    assert len(set(digests)) == STEPS
    return digests


@pytest.mark.parametrize('hosts', [1, 2, 4])
@pytest.mark.parametrize('workers', [1, 2, 5])
def test_each_step_has_one_digest(expected, hosts, workers):
    """A step's examples and draws depend on neither hosts nor workers, nor on the start.

    The digest of a step covers all its views, computed here from the draws.
    """
    config = make_config(workers)
    assert [digest(step) for step in global_steps(config, hosts)] == expected
    # From the batch that contains the end of an epoch.
    start = EXAMPLES // BATCH
    assert [digest(step) for step in global_steps(config, hosts, start)] == expected[start:]
