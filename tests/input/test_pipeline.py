"""The pipeline is a function of integers: order, resuming, shares of hosts, workers."""

from __future__ import annotations

import numpy as np
import pytest
from streams import (
    SIZE,
    Photographs,
    Plain,
    assert_same,
    batches,
    collect,
    make_config,
    stream_of,
    view_of,
    views_of,
)

from byol_jax.errors import UserError
from byol_jax.input import pipeline
from byol_jax.input.pipeline import view_batches
from byol_jax.input.stream import epoch_order
from byol_jax.views.crop import Crop
from byol_jax.views.recipes import paper_views
from byol_jax.views.view import View


def stream(count: int, batch_size: int, steps: int) -> list[int]:
    """The examples in order, read from the colours of the views."""
    made = collect(Plain(count), make_config(batch_size, neutral=True), 0, steps)
    np.testing.assert_array_equal(made['view1'], made['view2'])
    assert np.all(made['view1'] == made['view1'][..., :1, :1, :])
    return made['view1'][..., 0, 0, 0].ravel().tolist()


def test_batches_are_uint8_of_the_asked_shape():
    """A batch has two arrays uint8 [batch_size, S, S, 3], their boxes and mirror flags, and the
    indices of the examples; there are stop - start batches.
    """
    made = list(batches(Photographs(5), make_config(4), start_step=2, stop_step=5))
    assert len(made) == 3
    for batch in made:
        beside = {f'{view}/{what}' for view in ('view1', 'view2') for what in ('box', 'mirrored')}
        assert set(batch) == {'view1', 'view2', 'example', *beside}
        for view in (batch['view1'], batch['view2']):
            assert view.dtype == np.uint8
            assert view.shape == (4, SIZE, SIZE, 3)
        assert batch['example'].dtype == np.int32
    shown = np.concatenate([batch['example'] for batch in made])
    assert sorted(shown[2:7]) == list(range(5)), 'an epoch from position 10 on, each example once'


def test_batches_are_not_copied(monkeypatch):
    """TensorFlow passes both views on without copying them."""
    made = []
    aligned = pipeline._aligned
    monkeypatch.setattr(pipeline, '_aligned', lambda shape: made.append(aligned(shape)) or made[-1])
    for batch in batches(Photographs(8), make_config(), start_step=0, stop_step=2):
        for view in (batch['view1'], batch['view2']):
            assert sum(np.shares_memory(view, mine) for mine in made) == 1


def test_no_steps_no_batches():
    """A run that is at its end gets no batch."""
    assert list(batches(Photographs(5), make_config(), start_step=3, stop_step=3)) == []


def test_starting_late_gives_the_same_batches():
    """A start at step k gives exactly the batches from the k-th on of a run from step 0."""
    source, config = Photographs(10), make_config(4)
    whole = collect(source, config, 0, 8)
    for start in (1, 2, 5, 7):
        assert_same(
            collect(source, config, start, 8), {key: view[start:] for key, view in whole.items()}
        )


def test_starting_late_costs_nothing():
    """A start at step 10^9 loads only the pictures of its own batches."""
    loaded = []

    class Counting(Photographs):
        def load(self, index, key):
            loaded.append(index)
            return super().load(index, key)

    made = list(batches(Counting(10), make_config(4), start_step=10**9, stop_step=10**9 + 1))
    assert len(made) == 1
    assert len(loaded) == 4


@pytest.mark.parametrize(
    ('count', 'batch_size'),
    [
        pytest.param(12, 4, id='batch divides'),
        pytest.param(10, 4, id='batch does not divide'),
        pytest.param(3, 8, id='fewer examples than a batch'),
        pytest.param(1, 4, id='one example'),
    ],
)
def test_every_example_once_an_epoch(count, batch_size):
    """Every N positions of the stream from a multiple of N show each example once."""
    epochs = 4
    examples = stream(count, batch_size, steps=-(-epochs * count // batch_size))
    for epoch in range(epochs):
        part = examples[epoch * count : (epoch + 1) * count]
        assert sorted(part) == list(range(count))


def test_epochs_and_seeds_reorder():
    """No two epochs and no two seeds have the same order, and none has the order on disk."""
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(50)) not in orders
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_first_examples_of_epochs_are_uniform():
    """Over many epochs, each example comes first about equally often."""
    firsts = np.bincount([epoch_order(0, epoch, 4)[0] for epoch in range(2000)], minlength=4)
    # Binomial(2000, 1/4): mean 500, standard deviation 19.
    assert np.all(np.abs(firsts - 500) < 4 * 19.4)


@pytest.mark.parametrize('processes', [2, 4])
def test_shares_of_processes_make_up_the_batch(processes):
    """The shares of 2 or 4 processes, joined in order, are the batch of one process."""
    source, config = Photographs(10), make_config(8)
    shares = [
        collect(source, config, 1, 4, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    assert shares[0]['view1'].shape[1] == 8 // processes
    joined = {key: np.concatenate([s[key] for s in shares], axis=1) for key in shares[0]}
    assert_same(joined, collect(source, config, 1, 4))


def test_workers_do_not_change_the_batches():
    """One worker, and six that finish out of order, make the same batches."""
    alone = collect(Photographs(7), make_config(4, workers=1), 0, 6)
    many = collect(Photographs(7, delay=0.01), make_config(4, workers=6), 0, 6)
    assert_same(alone, many)


def test_prefetch_does_not_change_the_batches():
    """Preparing batches ahead changes when they are made, not their content."""
    made = [collect(Photographs(7), make_config(4, prefetch=p), 0, 4) for p in (1, 5)]
    assert_same(*made)


def test_views_are_those_of_seed_epoch_and_example():
    """A row is the view that is drawn for its epoch, example and view number."""
    source, config = Photographs(6), make_config(4)
    made = collect(source, config, 0, 4)
    rows = {key: view.reshape(-1, SIZE, SIZE, 3) for key, view in made.items()}
    own, views = stream_of(source, config), views_of(config)
    for position in range(16):
        epoch, example = own.example(position)
        assert epoch == position // 6
        assert example == epoch_order(config.seed, epoch, 6)[position % 6]
        picture = source.load(example, 'image')
        for number in (1, 2):
            name = f'view{number}'
            given = {'seed': config.seed, 'epoch': epoch, 'example': example, 'number': number}
            expected = view_of(views[name], picture, **given)
            np.testing.assert_array_equal(rows[name][position], expected)


class Places(Photographs):
    """Pictures of 250x200 pixels whose red and green values encode each pixel's place."""

    def load(self, index: int, key: str) -> np.ndarray:
        y, x = np.mgrid[:250, :200]
        return np.stack([y, x, 0 * y], axis=-1).astype(np.uint8)


def test_boxes_and_mirrors_say_what_is_shown():
    """A view's box and mirror flag say where its pixels come from."""
    found = set()
    for batch in batches(Places(8), make_config(8, neutral=True), start_step=0, stop_step=4):
        for name in ('view1', 'view2'):
            view, boxes, mirrored = (batch[name + part] for part in ('', '/box', '/mirrored'))
            assert boxes.dtype == np.float32
            assert mirrored.dtype == bool
            found |= set(mirrored.tolist())
            for image, (top, left, height, width), flipped in zip(
                view.astype(int), boxes, mirrored, strict=True
            ):
                y, x = (image[:, SIZE // 2, 0], image[SIZE // 2, :, 1])
                x = x[::-1] if flipped else x
                # The centres of the first and last pixel, half a pixel of the view inside the box.
                half = np.array([0.5, SIZE - 0.5]) / SIZE
                np.testing.assert_allclose(y[[0, -1]], 250 * (top + half * height) - 0.5, atol=4)
                np.testing.assert_allclose(x[[0, -1]], 200 * (left + half * width) - 0.5, atol=4)
    assert found == {False, True}


def test_any_number_of_views_of_any_size():
    """Views have names and sizes of their own; each is the same as without the others."""
    small = View([Crop(8)])
    views = {**paper_views(SIZE), 'small': small}
    source = Photographs(5)
    (batch,) = view_batches(source, views, batch_size=4, seed=3, stop_step=1)
    assert batch['small'].shape == (4, 8, 8, 3)
    for row, example in enumerate(batch['example']):
        picture = source.load(int(example), 'image')
        expected = view_of(small, picture, seed=3, epoch=0, example=int(example), number=3)
        np.testing.assert_array_equal(batch['small'][row], expected)


def test_batches_without_an_end():
    """Without stop_step batches never end, and closing stops them."""
    made = view_batches(Photographs(3), paper_views(SIZE), batch_size=2, start_step=10**9)
    assert [len(next(made)['example']) for _ in range(3)] == [2, 2, 2]
    made.close()


def test_two_views_of_an_example_differ():
    """The two views of an example differ, even if both have the same distribution."""
    made = collect(Photographs(6), make_config(6, neutral=True), 0, 2)
    same = [np.array_equal(a, b) for a, b in zip(*(v[0] for v in made.values()), strict=True)]
    assert not any(same)


def test_views_of_an_example_differ_between_epochs_and_seeds():
    """Every epoch and every seed augments an example differently."""
    source, config = Photographs(1), make_config(4)
    made = collect(source, config, 0, 1)['view1'][0]
    assert len({row.tobytes() for row in made}) == 4
    with config.unlocked():
        config.seed = 1
    other = collect(source, config, 0, 1)['view1'][0]
    assert not {row.tobytes() for row in made} & {row.tobytes() for row in other}


@pytest.mark.parametrize('pair_keys', [('lr', 'hr'), ('hr', 'lr'), ('hr', 'hr')])
def test_pair_keys_choose_the_picture_of_each_view(pair_keys):
    """View 1 comes from the first of pair_keys and view 2 from the second, of one example."""
    source = Plain(5, keys=('hr', 'lr'))
    made = collect(source, make_config(5, neutral=True, pair_keys=pair_keys), 0, 1)
    for view, key in zip(('view1', 'view2'), pair_keys, strict=True):
        assert np.all(made[view][..., 2] == 100 * source.keys.index(key))
    np.testing.assert_array_equal(made['view1'][..., 0], made['view2'][..., 0])


def test_pictures_of_a_pair_may_have_different_sizes():
    """A low-resolution picture is cropped by its own size, not by its partner's."""

    class TwoSizes(Plain):
        def load(self, index, key):
            picture = super().load(index, key)
            return picture[::4, ::4] if key == 'lr' else picture

    source = TwoSizes(5, keys=('hr', 'lr'))
    made = collect(source, make_config(5, neutral=True, pair_keys=('lr', 'hr')), 0, 3)
    assert np.all(made['view1'][..., 2] == 100)
    assert np.all(made['view2'][..., 2] == 0)


class Broken(Photographs):
    """Loading photograph 3 fails as for a damaged file."""

    def load(self, index: int, key: str) -> np.ndarray:
        if index == 3:
            raise UserError(f'{self.name(index)} cannot be decoded: broken data.')
        return super().load(index, key)


def test_a_picture_that_cannot_be_read_stops_the_run():
    """A failing load is not skipped: the consumer gets the error, with the file name."""
    made = batches(Broken(6), make_config(6), start_step=0, stop_step=3)
    with pytest.raises(Exception, match=r'photograph3\.jpg cannot be decoded: broken data'):
        list(made)


def test_a_picture_that_cannot_be_read_is_the_users_error():
    """A damaged picture ends training with a UserError, which is shown without a traceback."""
    made = batches(Broken(6), make_config(6), start_step=0, stop_step=3)
    with pytest.raises(UserError, match=r'photograph3\.jpg cannot be decoded: broken data'):
        list(made)


def test_batches_before_a_bad_picture_are_right():
    """A failing example does not change the batches before it."""
    config = make_config(2)
    bad = int(np.flatnonzero(epoch_order(config.seed, 0, 12) == 3)[0]) // 2
    assert bad > 0
    made = batches(Broken(12), config, start_step=0, stop_step=6)
    good = batches(Photographs(12), config, start_step=0, stop_step=bad)
    for expected in good:
        assert_same(next(made), expected)
    with pytest.raises(Exception, match='photograph3'):
        next(made)
