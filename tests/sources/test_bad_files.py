"""Bad pictures: counted once, replaced without changing anything else, limited in number."""

from __future__ import annotations

import os

import numpy as np
import pytest
from bad_pictures import Damaged, counted, files
from pictures import Coordinates
from streams import (
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
from byol_jax.input.stream import MOST_REPLACEMENTS, NoPictureError, replacements
from byol_jax.sources.bad_files import BadFile, BadFiles, name_some, still_bad
from byol_jax.sources.base import Cached
from byol_jax.sources.tiles import Tiles

# The stream.


@pytest.mark.parametrize('keys', [('image',), ('hr', 'lr')])
@pytest.mark.parametrize('share', [0.05, 0.3, 0.9])
def test_other_positions_do_not_change(keys, share):
    """Whichever pictures are damaged, every other position equals the clean run's bit for bit, and
    a damaged one shows the replacement's pictures with its own draws.
    """
    pair = (keys[0], keys[-1])
    config = make_config(8, max_bad_fraction=1.0, pair_keys=pair)
    clean = collect(Photographs(20, keys), config, 0, 5)
    bad = set(np.random.default_rng(1).choice(20, int(20 * share), replace=False).tolist())
    source = Damaged(20, bad, keys)
    bad_files = counted(source, config)
    made = collect(source, config, 0, 5, bad_files=bad_files)
    assert files(bad_files) == {source.name(i) for i in bad}
    stream = stream_of(source, config)
    for position in range(40):
        step, row = divmod(position, 8)
        epoch, example = stream.example(position)
        if example not in bad:
            for key in ('view1', 'view2'):
                np.testing.assert_array_equal(made[key][step, row], clean[key][step, row])
            continue
        tried = [example, *replacements(0, epoch, example, 20)]
        other = next(i for i in tried if i not in bad)
        found = [b.file for b in stream.load(position).bad]
        assert found == [source.name(i) for i in tried[: tried.index(other)]]
        for number, key in enumerate(pair, start=1):
            picture = source.load(other, key)
            view = views_of(config)[f'view{number}']
            own = {'seed': 0, 'epoch': epoch, 'example': example, 'number': number}
            expected = view_of(view, picture, **own)
            np.testing.assert_array_equal(made[f'view{number}'][step, row], expected)


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('workers', [1, 2, 6])
def test_processes_and_workers_agree_on_damaged_pictures(processes, workers):
    """1, 2 or 4 processes with any number of workers make the same stream of damaged pictures."""
    source = Damaged(10, {2, 3, 7}, delay=0.002)
    whole = collect(source, make_config(8, max_bad_fraction=1.0, workers=2), 1, 4)
    config = make_config(8, max_bad_fraction=1.0, workers=workers)
    shares, found = [], set()
    for i in range(processes):
        bad_files = counted(source, config)
        where = {'process_index': i, 'process_count': processes, 'bad_files': bad_files}
        shares.append(collect(source, config, 1, 4, **where))
        found |= files(bad_files)
    assert_same({key: np.concatenate([s[key] for s in shares], axis=1) for key in whole}, whole)
    assert found == {source.name(i) for i in (2, 3, 7)}


@pytest.mark.parametrize('start', [1, 3, 4])
def test_starting_late_among_damaged_pictures(start):
    """A start at step k gives the batches from the k-th on of a run from step 0, damaged or not."""
    source, config = Damaged(10, {1, 5}), make_config(4, max_bad_fraction=0.5)
    whole = collect(source, config, 0, 6)
    late = collect(source, config, start, 6)
    assert_same(late, {key: view[start:] for key, view in whole.items()})


@pytest.mark.parametrize(('prefetch', 'workers'), [(1, 1), (5, 6)])
def test_bad_files_are_counted_with_their_batch(prefetch, workers):
    """When a batch is yielded, the bad files of it and of earlier batches are counted, however far
    ahead the pipeline works; so logs and the stop do not depend on its speed.
    """
    source = Damaged(40, {3, 9, 20, 33})
    config = make_config(4, max_bad_fraction=1.0, prefetch=prefetch, workers=workers)
    bad_files = counted(source, config)
    stream, expected = stream_of(source, config), set()
    made = batches(source, config, start_step=0, stop_step=12, bad_files=bad_files)
    for step, _ in enumerate(made):
        for position in range(4 * step, 4 * step + 4):
            expected |= {bad.file for bad in stream.load(position).bad}
        assert files(bad_files) == expected
    assert len(expected) == 4


def test_a_bad_file_is_tried_again():
    """No file is remembered as bad: once mended, it is read again in the next epoch."""
    source, config = Damaged(4, {2}), make_config(4, max_bad_fraction=1.0)
    clean = collect(Photographs(4), config, 0, 3)
    made = batches(source, config, start_step=0, stop_step=1)
    assert not np.array_equal(next(made)['view1'], clean['view1'][0])
    source.bad = set()
    assert_same(collect(source, config, 1, 3), {key: view[1:] for key, view in clean.items()})


def test_replacements():
    """They are others, each once, at most MOST_REPLACEMENTS; each argument changes the order."""
    for examples in (1, 2, 3, 33, 34, 100_000):
        for example in {0, examples // 2, examples - 1}:
            tried = list(replacements(0, 0, example, examples))
            assert len(tried) == len(set(tried)) == min(MOST_REPLACEMENTS, examples - 1)
            assert example not in tried
            assert all(0 <= other < examples for other in tried)
    arguments = [(0, 0, 5, 1000), (1, 0, 5, 1000), (0, 1, 5, 1000), (0, 0, 6, 1000)]
    assert len({tuple(replacements(*a)) for a in arguments}) == 4
    assert list(replacements(0, 0, 5, 1000)) == list(replacements(0, 0, 5, 1000))


def test_replacements_are_uniform():
    """Every other example is equally likely to replace a bad one."""
    firsts = np.bincount([next(replacements(0, epoch, 2, 5)) for epoch in range(2000)], minlength=5)
    assert firsts[2] == 0
    # Binomial(2000, 1/4): mean 500, standard deviation 19.
    assert np.all(np.abs(firsts[[0, 1, 3, 4]] - 500) < 4 * 19.4)


def test_nothing_left_to_read():
    """If nothing can be read from the disk, the run ends after a limited number of tries."""
    source = Damaged(1000, set(range(1000)))
    config = make_config(2, max_bad_fraction=1.0, workers=1)
    bad_files = counted(source, config)
    made = batches(source, config, start_step=0, stop_step=1, bad_files=bad_files)
    with pytest.raises(NoPictureError, match=r'nor can 32 others .*broken data; .* and 30 more'):
        next(made)
    assert sum(source.loads.values()) == 2 * (MOST_REPLACEMENTS + 1)
    assert len(bad_files) > MOST_REPLACEMENTS


def test_the_only_picture_is_bad():
    """In a data set of one picture, none can replace it."""
    made = batches(Damaged(1, {0}), make_config(2), start_step=0, stop_step=1)
    with pytest.raises(UserError, match=r'there is no other to take its place: photograph0\.jpg'):
        next(made)


# The limit.


@pytest.mark.parametrize(
    ('total', 'fraction', 'allowed'),
    [
        (1_000_000, 0.01, 10_000),
        (1000, 0.01, 10),
        (199, 0.01, 1),
        (50, 0.01, 1),
        (1, 0.01, 1),
        (50, 0.0, 0),
        (100, 0.29, 29),
        (10, 1.0, 10),
    ],
)
def test_allowed_number(total, fraction, allowed):
    """The fraction of all pictures, rounded down, but at least one unless the limit is 0."""
    bad_files = BadFiles(Plain(total), 'image', fraction)
    assert bad_files.allowed == allowed
    bad_files.add(BadFile(f'{i}.jpg', 'is empty') for i in range(allowed))
    bad_files.check()
    bad_files.add([BadFile('last.jpg', 'is empty')])
    with pytest.raises(UserError, match=f'{allowed + 1:,} of {total:,} training pictures cannot'):
        bad_files.check()


def test_error_names_the_first_few():
    """The error has three files with their reasons, the number of others, and the key."""
    bad_files = BadFiles(Plain(100), 'image', 0.04)
    bad_files.add(BadFile(f'{i}.jpg', 'is empty') for i in range(5))
    with pytest.raises(UserError) as caught:
        bad_files.check()
    for words in (
        '5 of 100 training pictures cannot be read',
        'data.max_bad_fraction=0.04 allows 4',
        '0.jpg is empty; 1.jpg is empty; 2.jpg is empty; and 2 more',
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(('prefetch', 'workers'), [(1, 1), (5, 6)])
def test_the_run_stops_at_the_batch_that_passes_the_limit(prefetch, workers):
    """The batch with one bad file too many is not yielded; those before it are."""
    source = Damaged(100, set(range(0, 100, 8)))
    config = make_config(4, max_bad_fraction=0.05, prefetch=prefetch, workers=workers)
    stream, found, steps = stream_of(source, config), set(), 0
    while len(found) <= 5:
        loaded = [stream.load(position) for position in range(4 * steps, 4 * steps + 4)]
        found |= {bad.file for one in loaded for bad in one.bad}
        steps += 1
    made = batches(source, config, start_step=0, stop_step=25)
    for _ in range(steps - 1):
        next(made)
    with pytest.raises(UserError, match='of 100 training pictures cannot be read'):
        next(made)


def test_other_processes_are_waited_for():
    """With several processes, one does not stop on its own except at a limit of 0."""
    source, where = Damaged(20, set(range(10))), {'process_index': 0, 'process_count': 2}
    config = make_config(4, max_bad_fraction=0.1)
    bad_files = counted(source, config)
    collect(source, config, 0, 5, bad_files=bad_files, **where)
    assert bad_files.too_many()
    with pytest.raises(UserError, match='allows 0'):
        collect(source, make_config(4, max_bad_fraction=0.0), 0, 5, **where)


def test_a_file_is_counted_once():
    """A file that is found again, for another reason, is the same file."""
    bad_files = BadFiles(Plain(100), 'image', 0.5)
    bad_files.add([BadFile('a', 'is empty'), BadFile('b', 'is empty')])
    bad_files.add([BadFile('a', 'is gone'), BadFile('c', 'is gone')])
    assert [tuple(bad) for bad in bad_files.since(1)] == [('b', 'is empty'), ('c', 'is gone')]
    assert len(bad_files) == 3


def test_still_bad():
    """Listed files are read again; those of other data are skipped."""
    source = Damaged(10, {1, 2, 3})
    listed = {f'photograph{i}.jpg' for i in (2, 3, 7)} | {'elsewhere.jpg'}
    found = {bad.file for bad in still_bad(source, ('image', 'image'), listed)}
    assert found == {'photograph2.jpg', 'photograph3.jpg'}
    assert set(source.loads) == {2, 3, 7}
    tiles = Tiles(Cached(Coordinates([(64, 64)] * 2), 10**6), 16)
    assert still_bad(tiles, ('hr', 'lr'), {'0001.png'}) == []


def test_names_are_shown_on_any_terminal():
    """A name that is not text, or has a line break, is shown escaped and on one line."""
    bad = [BadFile(os.fsdecode(b'caf\xe9\n.jpg'), 'is empty'), BadFile('näve.jpg', 'is empty')]
    assert name_some(bad) == r'caf\udce9\n.jpg is empty; näve.jpg is empty'
    assert name_some(bad, 1).endswith('is empty; and 1 more')
    name_some(bad).encode()
