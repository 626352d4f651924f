"""data.cache: the same pixels from disk, whatever happens to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from bad_pictures import counted, files
from conftest import ROOT, TINY
from pictures import write
from PIL import Image
from streams import assert_same, collect

from byol_jax.app.data import build_data
from byol_jax.app.workdir import check_workdir
from byol_jax.errors import UserError
from byol_jax.settings import Settings
from byol_jax.sources import cache as cache_module
from byol_jax.sources.cache import DiskCached
from byol_jax.sources.folder import Folder
from configs import default, div2k

COUNT, SIDE = 6, 48

# Fills the cache argv[2] for the folder argv[1], a line a picture; argv[3] is seconds for each.
BUILD = """
import sys, time
from byol_jax.sources.cache import DiskCached
from byol_jax.sources.folder import Folder
class Slow(Folder):
    def load(self, index, key):
        time.sleep(float(sys.argv[3]))
        print('decoded', self.name(index), flush=True)
        return super().load(index, key)
for filled in DiskCached(Slow(sys.argv[1]), sys.argv[2]).fill(('image',), 1):
    print('waiting' if filled.waiting else f'done {filled.done}/{filled.total}', flush=True)
"""


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE + 1 + number, 3), np.uint8)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of six PNGs of noise, of different widths."""
    for i in range(COUNT):
        write(tmp_path / 'pictures' / f'{i}.png', picture(i))
    return tmp_path / 'pictures'


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the pictures that `Folder` decodes, while it does."""
    names: list[str] = []
    load = Folder.load

    def noted(self, index, key):
        names.append(self.name(index))
        return load(self, index, key)

    monkeypatch.setattr(Folder, 'load', noted)
    return names


def cached(pictures: Path) -> DiskCached:
    return DiskCached(Folder(pictures), pictures.parent / 'cache')


def fill(source: DiskCached, workers: int = 2):
    return list(source.fill(('image',), workers))


def entries(pictures: Path) -> list[Path]:
    return sorted((pictures.parent / 'cache').glob('*/*.pixels'))


def check_pixels(source: DiskCached) -> None:
    for i in range(COUNT):
        np.testing.assert_array_equal(source.load(i, 'image'), picture(i))


def make_config(path: Path, **data):
    config = default.get_config()
    config.batch_size, config.views.image_size = 8, 16
    config.data.update({'source': 'folder', 'path': str(path), 'workers': 2} | data)
    return config.lock()


def build(pictures: Path, seconds: float = 0.0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-c', BUILD, pictures, pictures.parent / 'cache', str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# The results with and without the cache.


def test_pictures_are_decoded_once_for_all_runs(pictures, decoded):
    """`fill` decodes each picture once, later runs decode none, and all get the file's pixels."""
    steps = fill(cached(pictures))
    assert [(s.done, s.total) for s in steps] == [(i, COUNT) for i in range(1, COUNT + 1)]
    assert steps[-1].written == sum(4096 + picture(i).size for i in range(COUNT))
    assert steps[-1].written == sum(path.stat().st_size for path in entries(pictures))
    assert sorted(decoded) == [f'{i}.png' for i in range(COUNT)]
    again = cached(pictures)
    assert [s.total for s in fill(again)] == [0]
    check_pixels(again)
    assert len(decoded) == COUNT
    assert not again.load(0, 'image').flags.writeable


@pytest.mark.parametrize(
    'data',
    [{}, {'tile_size': 24, 'tile_stride': 12, 'tile_shift': True, 'held_out_fraction': 0.3}],
    ids=['whole', 'tiles'],
)
@pytest.mark.parametrize('filled', [True, False])
def test_batches_and_bad_files_are_those_without_the_cache(pictures, data, filled):
    """Batches, replacements and messages about bad files are the same without a cache, and with a
    filled or an empty one.
    """
    (pictures / '3.png').write_bytes((pictures / '3.png').read_bytes()[:3000])
    batches, bad = [], []
    for cache in ('', str(pictures.parent / 'cache')):
        config = make_config(pictures, cache=cache, max_bad_fraction=0.5, **data)
        built = build_data(config)
        if cache and filled:
            last = list(built.cache.fill(('image',), 2))[-1]
            assert (last.total, last.bad) == (COUNT, 1)
            assert len(entries(pictures)) == COUNT - 1
        bad.append(counted(built.train, config))
        batches.append(collect(built.train, config, 0, 8, bad_files=bad[-1]))
    assert_same(*batches)
    assert bad[0].since(0) == bad[1].since(0)
    assert files(bad[1]) == {str(pictures / '3.png')}


def test_both_pictures_of_a_pair_are_kept(tmp_path):
    """The used pictures of DIV2K's folders are kept, in low and high resolution."""
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write(tmp_path / 'DIV2K_train_HR/0001.png', big)
    write(tmp_path / 'DIV2K_train_LR_bicubic/X2/0001x2.png', big[::2, ::2])
    config = div2k.get_config('lr_hr')
    config.data.update(
        path=str(tmp_path), tile_size=32, tile_stride=16, cache=str(tmp_path / 'cache')
    )
    data = build_data(config)
    last = list(data.cache.fill(('lr', 'hr'), 1))[-1]
    assert last.written == 2 * 4096 + big.size + big[::2, ::2].size
    high, low = (data.train.load_in_epoch(3, 0, key) for key in ('hr', 'lr'))
    np.testing.assert_array_equal(high[::2, ::2], low)


def test_a_lower_limit_of_pixels_holds_for_kept_pictures_too(pictures):
    """A picture above data.max_megapixels is bad, even if an earlier run kept it."""
    fill(cached(pictures))
    folder, limit = str(pictures.parent / 'cache'), SIDE * (SIDE + 3) / 1e6
    below = build_data(make_config(pictures, cache=folder, max_megapixels=limit)).train
    for i in range(3):
        np.testing.assert_array_equal(below.load(i, 'image'), picture(i))
    with pytest.raises(UserError, match=r'3\.png declares 52x48 pixels'):
        below.load(3, 'image')


@pytest.mark.parametrize('source', ['sample', 'video'])
def test_sources_that_have_no_files_to_decode(source, pictures):
    """If nothing can be kept, data.cache is an error rather than ignored."""
    for name in ('0001.png', '0002.png'):
        write(pictures.parent / 'clips/a' / name, picture(0))
    config = make_config(pictures.parent / 'clips', source=source, cache=str(pictures / 'cache'))
    with pytest.raises(UserError, match=r'data\.cache=\S+ keeps .* Leave it out'):
        build_data(config)


# Invalid entries.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'\0')


def empty(path: Path) -> None:
    path.write_bytes(b'')


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def transpose(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:48] + data[52:56] + data[48:52] + data[56:])


def swap(path: Path) -> None:
    other = next(p for p in path.parent.parent.glob('*/*.pixels') if p != path)
    path.write_bytes(other.read_bytes())


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize('damage', [cut, lengthen, empty, garbage, transpose, swap, remove])
def test_damaged_entries_are_not_used_and_made_again(pictures, decoded, damage):
    """A cut, overlong, empty, overwritten or exchanged entry is ignored for the file's own pixels,
    and the next `fill` replaces that one and no other.
    """
    fill(cached(pictures))
    damage(entries(pictures)[2])
    check_pixels(cached(pictures))
    decoded.clear()
    assert [s.total for s in fill(cached(pictures))] == [1]
    assert len(decoded) == 1
    check_pixels(cached(pictures))
    assert len(decoded) == 1


@pytest.mark.parametrize(
    'change', ['pixels', 'time', PIL, cv2], ids=['pixels', 'time', 'Pillow', 'OpenCV']
)
def test_stale_entries_are_not_used_and_made_again(pictures, decoded, monkeypatch, change):
    """A changed file, even of the same size, is decoded again, and so are all files with another
    version of a decoder. The old entries are replaced.
    """
    fill(cached(pictures))
    decoded.clear()
    if change in (PIL, cv2):
        monkeypatch.setattr(change, '__version__', 'another')
    elif change == 'time':
        os.utime(pictures / '2.png', ns=(0, 1))
    else:
        write(pictures / '2.png', 255 - picture(2))
    source = cached(pictures)
    expected = np.asarray(Image.open(pictures / '2.png'))
    np.testing.assert_array_equal(source.load(2, 'image'), expected)
    assert decoded == ['2.png']
    assert fill(source)[-1].done == (COUNT if change in (PIL, cv2) else 1)
    decoded.clear()
    np.testing.assert_array_equal(cached(pictures).load(2, 'image'), expected)
    assert not decoded
    assert len(entries(pictures)) == COUNT


def test_a_file_that_breaks_or_is_lost_is_bad_though_it_was_kept(pictures):
    """The cache does not hide that a file can no longer be read."""
    source = cached(pictures)
    fill(source)
    (pictures / '1.png').write_bytes(b'')
    (pictures / '2.png').unlink()
    for i, reason in ((1, 'is empty'), (2, 'No such file')):
        with pytest.raises(UserError, match=reason):
            source.load(i, 'image')
    assert fill(source)[-1].bad == 2


# Kills, other processes, full disks.


def test_a_kill_in_the_middle_loses_nothing(pictures):
    """After SIGKILL during filling, the next call decodes only the missing pictures; entries are
    complete, and the killed process's lock and temporary file do not matter.
    """
    process = build(pictures, 0.2)
    try:
        for line in process.stdout:
            if line.startswith('done 2/'):
                break
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    there = len(entries(pictures))
    assert 2 <= there < COUNT
    half = entries(pictures)[0].with_suffix('.pixels.partial')
    half.write_bytes(b'half')
    steps = fill(cached(pictures))
    assert [(s.done, s.total) for s in steps][-1] == (COUNT - there,) * 2
    assert not any(s.waiting for s in steps)
    check_pixels(cached(pictures))
    assert not half.exists()


def test_two_processes_share_the_work(pictures):
    """If several processes fill one cache, one works at a time, and no picture is decoded twice."""
    (pictures.parent / 'cache').mkdir()
    processes = []
    try:
        with (pictures.parent / 'cache/.lock').open('w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            processes = [build(pictures, 0.02) for _ in range(2)]
            # Both have found the cache empty by now.
            assert [process.stdout.readline() for process in processes] == ['waiting\n'] * 2
        said = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    lines = [line for out, _ in said for line in out.splitlines()]
    assert sorted(line for line in lines if line.startswith('decoded')) == [
        f'decoded {i}.png' for i in range(COUNT)
    ]
    check_pixels(cached(pictures))


def test_no_room_is_said_before_anything_is_decoded(pictures, decoded, monkeypatch):
    """A disk that is too small is an error at once, with the needed and the free space."""
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(cache_module.shutil, 'disk_usage', lambda _: usage(10**9, 0, 1000))
    with pytest.raises(UserError, match=r'needs 0\.1 MB .* 6 pictures .* 0\.0 MB free'):
        fill(cached(pictures))
    assert not decoded
    assert not entries(pictures)


def test_a_disk_that_fills_up(pictures, monkeypatch):
    """If the disk fills up, the error says so, no incomplete entry stays, and the next call
    continues.
    """
    write_all, count = os.fsync, []

    def full(file):
        count.append(file)
        if len(count) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(file)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, 'fsync', full)
        with pytest.raises(UserError, match=r'No space left on device.*goes on from there'):
            fill(cached(pictures), workers=1)
    there = [p for p in (pictures.parent / 'cache').rglob('*') if p.is_file()]
    kept = sorted(p for p in there if p.name != '.lock')
    assert kept == entries(pictures)
    assert len(kept) == 3
    assert fill(cached(pictures))[-1].total == 3
    check_pixels(cached(pictures))


def test_a_real_write_error(pictures):
    """A write that the system refuses (here: a limit on a file's size) is an error that names the
    cache, and no incomplete entry stays.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        with pytest.raises(UserError, match=r'data\.cache=\S+ cannot be written: .*File too large'):
            fill(cached(pictures))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in (pictures.parent / 'cache').rglob('*') if p.is_file()] == ['.lock']


def test_a_cache_that_is_a_file(pictures):
    """A cache folder that cannot be made is an error that names it."""
    (pictures.parent / 'cache').write_text('')
    with pytest.raises(UserError, match=r'data\.cache=\S+ cannot be written: .*File exists'):
        fill(cached(pictures))


def test_no_more_pictures_than_workers_are_under_way(pictures, monkeypatch):
    """While a cache is filled, at most `workers` pictures are decoded ahead."""
    loads = []
    load = Folder.load
    monkeypatch.setattr(Folder, 'load', lambda *a: (loads.append(a), load(*a))[1])
    for done in cached(pictures).fill(('image',), 2):
        time.sleep(0.05)
        assert len(loads) <= done.done + 2


def test_a_run_may_go_on_with_another_cache(pictures):
    """data.cache may change on resuming a run; data.tile_shift, which changes batches, may not."""
    run = pictures.parent / 'run'
    run.mkdir()
    tiles = {'tile_size': 16}
    (run / 'config.json').write_text(json.dumps(Settings.of(make_config(pictures, **tiles)).plain))
    check_workdir(run, make_config(pictures, cache='elsewhere', **tiles))
    with pytest.raises(UserError, match=r'data\.tile_shift: False there, True now'):
        check_workdir(run, make_config(pictures, tile_shift=True, **tiles))


@pytest.mark.slow
def test_a_run_with_a_cache_is_the_run_without(main_py, pictures):
    """Training with data.cache gives the same weights, and says that it fills the cache."""
    digests = []
    for name, more in (('plain', ()), ('cached', (f'--config.data.cache={pictures.parent}/c',))):
        result = main_py(
            '--config=configs/div2k.py:sample',
            *TINY,
            '--config.data.source=folder',
            f'--config.data.path={pictures}',
            '--config.data.tile_size=16',
            f'--workdir={pictures.parent / name}',
            *more,
        )
        assert result.returncode == 0, result.stderr
        assert ('decoded pictures are read from ' in result.stdout) == (name == 'cached')
        digests.append(result.stdout.split('weights sha256 ')[1].split(')')[0])
    assert digests[0] == digests[1]
