"""Lists of files: they equal os.walk's, take little memory, and come from an index if valid."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import write_frames
from conftest import ROOT, process_environment

from byol_jax.app.data import build_data
from byol_jax.app.fingerprint import fingerprint, names_of
from byol_jax.app.workdir import check_workdir
from byol_jax.errors import UserError
from byol_jax.settings import Settings
from byol_jax.sources import file_list
from byol_jax.sources.bad_files import BadFile, BadFiles
from byol_jax.sources.base import Source, Subset
from byol_jax.sources.data import Data
from byol_jax.sources.decode import EXTENSIONS
from byol_jax.sources.file_list import Names, list_tree, listed
from byol_jax.sources.folder import Folder, ImageFiles, class_labels, list_files
from configs import default

# A time long ago, in 2020, nanoseconds.
PAST = 1_577_836_800 * 10**9


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def age(root: Path) -> Path:
    """Sets old times for all folders: one that has just changed gets no index."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(PAST, PAST))
    return root


def reference(root: Path) -> list[str]:
    """The result that `list_files` promises, written with os.walk and one sort."""
    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        files += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith('.')
        ]
    return sorted(files)


def reference_labels(files: list[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    tops = [file.split('/')[0] if '/' in file else None for file in files]
    classes = sorted({top for top in tops if top is not None})
    if len(classes) < 2 or None in tops:
        return None, ()
    return [classes.index(top) for top in tops], tuple(classes)


def assert_lists(source: Folder, root: Path) -> None:
    """Names, labels and label names equal the reference's."""
    files = reference(root)
    assert [source.name(i) for i in range(len(source))] == files
    labels, names = reference_labels(files)
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.label_names == names


@pytest.fixture
def animals(tmp_path):
    """A folder of pictures in class folders that have not changed for years."""
    root = tmp_path / 'animals'
    touch(root, 'cat/1.jpg', 'cat/2.jpg', 'cat/young/3.png', 'dog/1.jpg', 'dog/2.JPEG')
    touch(root, 'dog/notes.txt', 'cat/.hidden.jpg', '.trash/9.jpg')
    return age(root)


@pytest.fixture
def kept(animals, tmp_path, messages):
    """(folder, its index file); a first start has written it without a message."""
    file = tmp_path / 'animals.index'
    Folder(animals, index=str(file))
    assert file.exists()
    assert not messages()
    return animals, file


@pytest.fixture
def messages():
    """Returns and clears what the sources have logged."""
    logger, handler = logging.getLogger('byol_jax.sources'), logging.StreamHandler(io.StringIO())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def read() -> str:
        text = handler.stream.getvalue()
        handler.setStream(io.StringIO())
        return text

    yield read
    logger.removeHandler(handler)
    logger.setLevel(level)


def forbid_listing(monkeypatch) -> None:
    def scandir(path):
        raise AssertionError(f'{path} was listed')

    monkeypatch.setattr(os, 'scandir', scandir)


# Names.


def test_names_come_back_as_they_were():
    """Any string, also of bytes that are not text, is returned by index, slice and iteration."""
    strings = ['', 'a', 'ä/ö.png', '\udc80\udcff.jpg', '\udcc3\udca9', '𝄞', 'x' * 3000, 'a\nb']
    strings += [f'{i}.jpg' for i in range(10_000)]
    names = Names.of(iter(strings))
    assert len(names) == len(strings)
    assert list(names) == strings
    assert [names[np.int64(i)] for i in range(len(strings))] == strings
    assert names[-1] == '9999.jpg'
    assert names[2:9:3] == strings[2:9:3]
    assert list(names.take([5, 5, 0])) == ['𝄞', '𝄞', '']
    for place in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            names[place]
    assert list(Names.of([])) == []


def test_names_take_the_room_of_their_bytes():
    """A name takes its bytes and 8 more."""
    names = Names.of(f'n{i:08}/x.jpg' for i in range(1000))
    assert len(names.block) + names.starts.nbytes == 1000 * (15 + 8) + 8


# Lists.


@pytest.mark.parametrize('seed', range(12))
def test_random_trees_are_listed_as_by_walk_and_sort(tmp_path, seed):
    """Names that begin alike, links, loops and hidden files: list and labels are the reference's.

    'a.b' sorts before 'a/' but after 'a', and of two links to one folder, the one searched first
    counts: here an order by folders could differ from one by paths.
    """
    rng = np.random.default_rng(seed)
    stems = ['a', 'a.b', 'a-b', 'a0', 'A', 'ab', 'ä', '.h', 'a.png', '\udcfe', '\ue000', '𝄞']
    outside = tmp_path / 'outside'
    touch(outside, 'x/1.png', 'y/2.png', 'y/a/3.png')
    root = tmp_path / 'root'
    folders = [root]
    root.mkdir()
    for _ in range(40):
        parent = folders[rng.integers(len(folders))]
        name = stems[rng.integers(len(stems))]
        path = parent / name
        if path.exists() or path.is_symlink():
            continue
        kind = rng.integers(6)
        if kind < 2:
            path.mkdir()
            folders.append(path)
        elif kind == 2:
            targets = [*folders, outside / 'x', outside / 'y', tmp_path / 'nowhere']
            path.symlink_to(targets[rng.integers(len(targets))])
        elif not (parent / f'{name}.jpg').exists():
            (parent / f'{name}.jpg').touch()
            (parent / f'{name}.txt').touch()
    touch(root, 'z.png')
    assert_lists(Folder(root), root)
    age(root)
    age(outside)
    for _ in range(2):
        assert_lists(Folder(root, index=str(tmp_path / 'i')), root)
    assert (tmp_path / 'i').exists()


def test_thousands_of_files(tmp_path, monkeypatch):
    """For thousands of files in 40 folders, list and labels are the reference's, with an index too.

    With the index, no folder is listed.
    """
    root = tmp_path / 'root'
    for folder in range(40):
        touch(root, *(f'n{folder:04}/{file * 7919 % 10007}.jpg' for file in range(80)))
    age(root)
    first = Folder(root, index=str(tmp_path / 'i'))
    assert len(first) == 3200
    assert_lists(first, root)
    expected = [first.name(i) for i in range(3200)]
    forbid_listing(monkeypatch)
    second = Folder(root, index=str(tmp_path / 'i'))
    assert [second.name(i) for i in range(3200)] == expected
    np.testing.assert_array_equal(second.labels, first.labels)
    assert second.label_names == first.label_names


@pytest.mark.parametrize('seed', range(20))
def test_class_labels_of_random_names(seed):
    """Labels are numbered by the sorted names of the folders, with any number of files each."""
    rng = np.random.default_rng(seed)
    tops = ['a', 'a.b', 'a0', 'b', 'a-', 'ä', '\udc80'][: rng.integers(1, 8)]
    files = {f'{tops[rng.integers(len(tops))]}/{i}' for i in range(rng.integers(1, 200))}
    if seed % 5 == 0:
        files.add('a!')
    labels, names = class_labels(sorted(files))
    expected = reference_labels(sorted(files))
    assert (None if labels is None else labels.tolist(), names) == expected


def test_a_folder_for_each_file(tmp_path):
    """As many classes as files."""
    files = [f'{i:04}/x.png' for i in range(2000)]
    labels, names = class_labels(files)
    assert labels.tolist() == list(range(2000))
    assert len(names) == 2000


# The index file.


def add(root):
    touch(root, 'cat/0.jpg')


def remove(root):
    (root / 'dog/1.jpg').unlink()


def rename(root):
    (root / 'dog/1.jpg').rename(root / 'dog/7.jpg')


def rename_deep(root):
    (root / 'cat/young/3.png').rename(root / 'cat/young/4.png')


def new_class(root):
    touch(root, 'ant/1.jpg')


def rename_class(root):
    (root / 'cat').rename(root / 'zebra')


def remove_class(root):
    for file in ('1.jpg', '2.JPEG', 'notes.txt'):
        (root / 'dog' / file).unlink()
    (root / 'dog').rmdir()


def swap_classes(root):
    (root / 'cat').rename(root / 'x')
    (root / 'dog').rename(root / 'cat')
    (root / 'x').rename(root / 'dog')


def stray(root):
    touch(root, 'stray.jpg')


@pytest.mark.parametrize(
    'change',
    [
        add,
        remove,
        rename,
        rename_deep,
        new_class,
        rename_class,
        remove_class,
        swap_classes,
        stray,
    ],
)
@pytest.mark.parametrize('hidden', [False, True], ids=['', 'times set back'])
def test_what_changes_is_listed_anew(kept, messages, monkeypatch, change, hidden):
    """No change of names is missed, also if a copying program resets the folders' times.

    The index is out of date once: the next start uses the new one.
    """
    root, file = kept
    change(root)
    if hidden:
        age(root)
    source = Folder(root, index=str(file))
    assert_lists(source, root)
    assert f'the index {file} is out of date ({root}' in messages()
    age(root)
    Folder(root, index=str(file))
    messages()
    expected = list_files(root, 'data.path')
    forbid_listing(monkeypatch)
    found = list_files(root, 'data.path', index=str(file))
    assert (list(found[0]), found[1]) == (list(expected[0]), expected[1])
    assert f'{len(expected[0])} files of {root}, as listed in {file}' in messages()


def test_other_contents_are_no_change(kept, monkeypatch):
    """A picture whose content is replaced leaves the index valid."""
    root, file = kept
    (root / 'cat/1.jpg').write_bytes(b'other')
    forbid_listing(monkeypatch)
    assert len(Folder(root, index=str(file))) == 5


@pytest.mark.parametrize('change', ['elsewhere', 'appears', 'goes', 'out of a loop'])
def test_links_are_followed_anew(tmp_path, messages, change):
    """The target of a link outside the folder may change without a change of its folders."""
    root = touch(tmp_path / 'root', '1.jpg')
    touch(tmp_path / 'disk1', 'a.jpg')
    touch(tmp_path / 'disk2', 'b.jpg')
    middle = tmp_path / 'middle'
    if change != 'appears':
        middle.symlink_to(root if change == 'out of a loop' else tmp_path / 'disk1')
    (root / 'disk').symlink_to(middle)
    age(tmp_path)
    file = tmp_path / 'i'
    beyond = change in ('elsewhere', 'goes')
    assert len(Folder(root, index=str(file))) == 1 + beyond
    assert file.exists()
    if change != 'appears':
        middle.unlink()
    if change != 'goes':
        middle.symlink_to(tmp_path / 'disk2')
    assert_lists(Folder(root, index=str(file)), root)
    assert 'disk has changed' in messages()


def damaged_contents(content: bytes) -> list[bytes]:
    """Cut off anywhere, or with one flipped bit anywhere."""
    places = sorted({*range(0, len(content), 37), *range(0, 120, 5), len(content) - 1})
    cut = [content[:place] for place in places]
    flipped = []
    for place in places:
        other = bytearray(content)
        other[place] ^= 1 << (place % 8)
        flipped.append(bytes(other))
    return cut + flipped


def test_a_damaged_index_is_made_anew(kept, messages, monkeypatch):
    """If the index in the user's cache is cut off or changed, a message says so; it is replaced."""
    root, _ = kept
    monkeypatch.setenv('XDG_CACHE_HOME', str(root.parent / 'cache'))
    monkeypatch.setattr(file_list, 'KEPT_FROM', 1)
    Folder(root, index='auto')
    (file,) = (root.parent / 'cache/byol_jax').iterdir()
    good = file.read_bytes()
    contents = damaged_contents(good)
    assert len(contents) > 60
    for content in contents:
        file.write_bytes(content)
        assert_lists(Folder(root, index='auto'), root)
        said = messages()
        assert f'the index {file} is ' in said
        assert 'listed anew' in said
        assert file.read_bytes() == good


@pytest.mark.parametrize('cut', [0, 10, 40, -1])
def test_a_damaged_index_of_ones_own_is_made_anew(kept, messages, cut):
    """A damaged file named in data.index that begins like an index is replaced too."""
    root, file = kept
    good = file.read_bytes()
    file.write_bytes(good[:cut])
    assert_lists(Folder(root, index=str(file)), root)
    assert 'is damaged' in messages()
    assert file.read_bytes() == good


def test_a_forged_index_is_made_anew(kept, messages):
    """An index whose digest is right, but which holds 200,000 brackets, is replaced."""
    root, file = kept
    good = file.read_bytes()
    header = b'[' * 200_000
    body = len(header).to_bytes(8, 'little') + header
    file.write_bytes(file_list._MAGIC + hashlib.sha256(body).digest() + body)
    assert_lists(Folder(root, index=str(file)), root)
    assert 'is damaged' in messages()
    assert file.read_bytes() == good


def test_another_version_is_made_anew(kept, messages):
    """An index of another format version is named as such and replaced."""
    root, file = kept
    good = file.read_bytes()
    file.write_bytes(good.replace(b'version 2\n', b'version 9\n', 1))
    assert_lists(Folder(root, index=str(file)), root)
    assert 'is of another version' in messages()
    assert file.read_bytes() == good


def test_the_index_of_another_folder_is_not_used(kept, messages):
    """With two folders and one data.index, each folder is listed correctly."""
    root, file = kept
    other = age(touch(root.parent / 'other', 'x.jpg'))
    assert_lists(Folder(other, index=str(file)), other)
    assert f'is of other files, in {root}' in messages()
    assert_lists(Folder(root, index=str(file)), root)


def test_other_extensions_have_another_index(kept, messages):
    """An index of the images is not one of the videos and images."""
    root, file = kept
    names, _ = list_files(root, 'data.path', ('.txt',), 'text', str(file))
    assert list(names) == ['dog/notes.txt']
    assert 'is of other files' in messages()


def test_a_file_that_is_no_index_stays(kept, messages):
    """With data.index=holiday.jpg by mistake, the photograph is kept, and the run continues."""
    root, _ = kept
    photograph = root.parent / 'holiday.jpg'
    photograph.write_bytes(b'\xff\xd8 a photograph')
    assert_lists(Folder(root, index=str(photograph)), root)
    assert f'{photograph} is damaged or something else' in (said := messages())
    assert 'stays as it is' in said
    assert photograph.read_bytes() == b'\xff\xd8 a photograph'


def test_an_index_in_its_own_folder_is_refused(kept):
    """Writing it would change the folder, so it is never valid; a hidden folder may hold it."""
    root, _ = kept
    for place in (root / 'x.index', root / 'cat/x.index', root / 'new/x.index'):
        with pytest.raises(UserError, match=r'x\.index lies in .*animals.* elsewhere'):
            Folder(root, index=str(place))
    assert len(Folder(root, index=str(root / '.trash/x.index'))) == 5


def test_a_folder_that_changed_just_now_gets_no_index(tmp_path, messages):
    """Its time might not show a change that comes right after; a message says so."""
    root = touch(tmp_path / 'new', 'cat/1.jpg')
    assert len(Folder(root, index=str(tmp_path / 'i'))) == 1
    assert f'no index of {root} is kept this time' in messages()
    assert not (tmp_path / 'i').exists()


def test_folders_without_times_get_no_index(animals, tmp_path, messages):
    """A file system that gives every folder the same time would never show a change."""
    os.utime(animals / 'cat', ns=(0, 0))
    assert_lists(Folder(animals, index=str(tmp_path / 'i')), animals)
    assert 'its file system keeps no times of folders' in messages()
    assert not (tmp_path / 'i').exists()


def test_a_full_disk_costs_the_index_alone(animals, tmp_path, messages):
    """The files are listed, a message has the reason, and no incomplete file is left."""
    file = tmp_path / 'i'
    partial = tmp_path / f'i.{os.uname().nodename}.{os.getpid()}.partial'
    partial.symlink_to('/dev/full')
    assert_lists(Folder(animals, index=str(file)), animals)
    said = messages()
    assert f'the index {file} of {animals} cannot be written (No space left on device)' in said
    assert not file.exists()
    assert not partial.is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_place_without_permission_costs_the_index_alone(animals, tmp_path, messages):
    """If the index cannot be written, the files are listed, and a message says what to do."""
    closed = tmp_path / 'closed'
    closed.mkdir(mode=0o500)
    assert_lists(Folder(animals, index=str(closed / 'i')), animals)
    said = messages()
    assert '(Permission denied): every start lists the files anew. data.index=FILE' in said


def test_an_index_that_cannot_be_read_costs_the_index_alone(animals, tmp_path, messages):
    """If an index path leads through a file, a message is logged, and the files are listed."""
    (tmp_path / 'file').touch()
    assert_lists(Folder(animals, index=str(tmp_path / 'file' / 'i')), animals)
    assert 'cannot be read (Not a directory)' in messages()


def test_auto_is_a_file_in_the_cache_for_large_folders(animals, tmp_path, monkeypatch):
    """'auto' keeps a file for each large folder in the user's cache, and none for small ones."""
    cache = tmp_path / 'cache'
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
    Folder(animals, index='auto')
    assert not cache.exists()
    monkeypatch.setattr(file_list, 'KEPT_FROM', 5)
    other = age(touch(tmp_path / 'other', *(f'{i}.jpg' for i in range(6))))
    for root in (animals, other, animals):
        assert_lists(Folder(root, index='auto'), root)
    assert len(list((cache / 'byol_jax').glob('*.index'))) == 2
    forbid_listing(monkeypatch)
    assert len(Folder(other, index='auto')) == 6


@pytest.mark.parametrize('home', ['/dev/null', ''])
def test_auto_without_a_home(animals, monkeypatch, messages, home):
    """Without a writable home folder, the files are listed each time.

    For a small folder, which needs no index, there is no message.
    """
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', home)
    assert_lists(Folder(animals, index='auto'), animals)
    assert not messages()
    monkeypatch.setattr(file_list, 'KEPT_FROM', 1)
    for _ in range(2):
        assert_lists(Folder(animals, index='auto'), animals)
        assert ('cannot be written (Not a directory)' in messages()) == bool(home)


def test_a_folder_that_holds_the_cache(tmp_path, monkeypatch, messages):
    """A cache among the pictures gets no index; ~/.cache below ~ is hidden, and does."""
    root = age(touch(tmp_path / 'home', 'a/1.jpg'))
    monkeypatch.setattr(file_list, 'KEPT_FROM', 1)
    monkeypatch.setenv('XDG_CACHE_HOME', str(root / 'a' / 'cache'))
    assert len(Folder(root, index='auto')) == 1
    assert not (root / 'a/cache').exists()
    monkeypatch.setenv('XDG_CACHE_HOME', str(root / '.cache'))
    assert len(Folder(root, index='auto')) == 1
    assert len(list((root / '.cache/byol_jax').iterdir())) == 1


# What follows the list.


def make_config(root: Path, **data):
    config = default.get_config()
    config.data.path = str(root)
    config.data.update(data)
    return config.lock()


@pytest.mark.parametrize(
    'data',
    [
        pytest.param({}, id='folder'),
        pytest.param({'pair_keys': ('left_*', 'right_*')}, id='pairs'),
        pytest.param({'source': 'video'}, id='video'),
    ],
)
def test_every_source_of_files_uses_the_index(tmp_path, monkeypatch, data):
    """data.index works for folders, pairs and clips; with '' no file is written."""
    root = tmp_path / 'root'
    write_frames(root, [f'{side}_{i}.png' for i in range(3) for side in ('left', 'right')])
    age(root)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(file_list, 'KEPT_FROM', 1)
    expected = build_data(make_config(root, index='', **data)).train
    assert not (tmp_path / 'cache').exists()
    file = tmp_path / 'i'
    build_data(make_config(root, index=str(file), **data))
    forbid_listing(monkeypatch)
    found = build_data(make_config(root, index=str(file), **data)).train
    names = [[s.name(i) for i in range(len(s))] for s in (expected, found)]
    assert names[0] == names[1]
    np.testing.assert_array_equal(found.load(1, found.keys[0]), expected.load(1, found.keys[0]))


def test_a_run_goes_on_with_another_index(tmp_path):
    """The place of the list does not change a run."""
    config = default.get_config()
    (tmp_path / 'config.json').write_text(json.dumps(Settings.of(config).plain))
    config.data.index = '/elsewhere/x.index'
    check_workdir(tmp_path, config)
    config.data.max_megapixels = 5.0
    with pytest.raises(UserError, match=r'data\.max_megapixels'):
        check_workdir(tmp_path, config)


WORKDIRS = {
    'a run': ['config.json', '.lock', 'views.png'],
    'an older run': ['config.json', 'checkpoints/4/x', 'views.png', 'encoder/x.png'],
    'views': ['.byol_jax', 'views.png'],
}


@pytest.mark.parametrize('kind', WORKDIRS)
@pytest.mark.parametrize('place', ['run', 'cat/deep/run'])
def test_workdirs_are_never_data(animals, tmp_path, kind, place):
    """A workdir anywhere below the folder is left out, with all in it, also by the index."""
    before = list(file_list.list_tree(animals, ('.jpg', '.png')).files)
    touch(animals / place, *WORKDIRS[kind])
    age(animals)
    index = str(tmp_path / 'i')
    for _ in range(2):
        found = file_list.listed(animals, ('.jpg', '.png'), index)
        assert list(found.files) == before
        assert found.left_out['workdirs of runs'].examples == [place]
    with pytest.raises(UserError, match=r'whose pictures .* are never data'):
        file_list.list_tree(animals / place, ('.jpg', '.png'))


def test_a_config_alone_is_no_workdir(animals):
    """A folder of pictures with a config.json of somebody else's is data."""
    before = len(file_list.list_tree(animals, ('.jpg',)).files)
    touch(animals / 'fox', 'config.json', 'data.json', '1.jpg')
    assert len(file_list.list_tree(animals, ('.jpg',)).files) == before + 1


def test_the_fingerprint_is_that_of_the_names(animals, tmp_path):
    """It is the sha256 of all names, one a line, training first, as in every older run."""
    touch(animals, *(f'cat/{i}.jpg' for i in range(9000)))
    data = build_data(make_config(animals, held_out_fraction=0.3))
    parts = [[part.name(i) for i in range(len(part))] for part in (data.train, data.held_out)]
    assert [len(part) for part in parts] == [6303, 2700]
    lines = ''.join(f'{name}\n' for part in parts for name in part)
    assert names_of(data) == {
        'examples': 6303,
        'held_out': 2700,
        'names_sha256': hashlib.sha256(lines.encode()).hexdigest(),
    }


def test_a_cache_keeps_the_fingerprint_and_its_speed(animals, tmp_path, monkeypatch):
    """With data.cache the fingerprint is the same, and names are still read all at once."""
    expected = fingerprint(build_data(make_config(animals)))
    monkeypatch.delattr(ImageFiles, 'name')
    monkeypatch.setattr(Folder, '__abstractmethods__', frozenset())
    data = build_data(make_config(animals, cache=str(tmp_path / 'cache')))
    assert data.cache is not None
    assert fingerprint(data) == expected


def test_names_that_are_no_text_have_a_fingerprint(tmp_path):
    """A file's name may be any bytes: the run starts, and another such name is other data."""
    digests = set()
    for name in (b'a\xff.jpg', b'a\xfe.jpg'):
        root = tmp_path / name.hex()
        root.mkdir()
        (root / os.fsdecode(name)).touch()
        digests.add(fingerprint(Data(Folder(root), Subset(Folder(root), [])))['names_sha256'])
    assert len(digests) == 2


def test_the_held_out_part_is_drawn_label_by_label(tmp_path):
    """It is the one of earlier runs: a permutation of each label's examples in turn."""
    files = [f'{top}/{i}.jpg' for top, n in (('a.b', 7), ('a', 30), ('c', 1)) for i in range(n)]
    root = touch(tmp_path / 'root', *files)
    source = Folder(root)
    rng = np.random.Generator(np.random.Philox(key=[5, 1]))
    expected = []
    for label in range(3):
        members = rng.permutation(np.flatnonzero(source.labels == label))
        expected += members[: int(len(members) * 0.4)].tolist()
    held_out = build_data(make_config(root, held_out_fraction=0.4, held_out_seed=5)).held_out
    assert sorted(expected) == held_out.indices.tolist()
    assert len(expected) == 14


def test_files_are_counted_once_however_many_examples_they_hold():
    """The share of bad files counts files, each of which may hold many tiles."""

    class Tiled(Source):
        def __len__(self):
            return 12

        def load(self, index, key):
            raise NotImplementedError

        def name(self, index):
            return f'{index}'

        def file(self, index, key):
            return f'{index % 5}.jpg'

    counted = BadFiles(Tiled(), 'image', 0.5, [BadFile('x', 'is bad'), BadFile('y', 'is bad')])
    assert counted.total == 5 + 2


MILLION = 1_000_000


# Seconds.
LIMITS = {
    ('cold', 'list'): 30,
    ('index', 'list'): 2,
    # The index file is read once more; labels; the held-out part.
    ('index', 'build_data'): 2,
    # The names of all files, and the sizes of 200,000; 2.8 s measured.
    ('index', 'fingerprint'): 8,
    ('start', 'start'): 1,
}


def measure(*arguments: str, timeout: float) -> dict[str, dict[str, float]]:
    """The lines of benchmarks/scale.py by what they measure."""
    ran = subprocess.run(
        [sys.executable, 'benchmarks/scale.py', *arguments],
        cwd=ROOT,
        env=process_environment(1),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    return {line.pop('what'): line for line in lines}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_files(tmp_path):
    """Listed in 30 s without an index file and 2 s with it, in 500 MB; a start takes 1 s.

    Memory is the peak of whole processes that have imported what the folder source needs. Times are
    the best of up to three, since other jobs may run.
    """
    folder = tmp_path / 'million'
    best: dict[tuple[str, str], float] = dict.fromkeys(LIMITS, math.inf)
    try:
        for _ in range(3):
            found = measure(f'--folder={folder}', timeout=290)
            for what in ('cold', 'index', 'pairs'):
                assert found[what]['files'] == MILLION
                assert found[what]['resident'] < 500, what
            assert found['index']['examples'] == MILLION
            assert found['pairs']['examples'] == MILLION / 2
            best = {(what, part): min(s, found[what][part]) for (what, part), s in best.items()}
            if all(best[which] < LIMITS[which] for which in LIMITS):
                break
    finally:
        # pytest keeps the folders of three runs.
        shutil.rmtree(folder)
    for which, limit in LIMITS.items():
        assert best[which] < limit, which


@pytest.mark.slow
def test_the_benchmark_on_a_few_files(tmp_path):
    """It measures folders of any size."""
    found = measure(f'--folder={tmp_path / "few"}', '--files=1000', '--folders=7', timeout=200)
    assert found['cold']['files'] == found['index']['examples'] == 1000


def test_files_that_are_not_used_are_counted(tmp_path):
    """By extension, with examples, in the list and in its index alike; hidden ones apart."""
    root = touch(tmp_path / 'scans', '1.png', 'sub/2.JPG', 'a.tif', 'b.TIF', 'sub/c.tif', 'd.tif')
    touch(root, 'e.avif', 'noext', 'log.0001', '.DS_Store', '.hidden.png')
    age(root)
    file = tmp_path / 'scans.index'
    for _ in range(2):
        listing = listed(root, EXTENSIONS, str(file))
        assert list(listing.files) == ['1.png', 'sub/2.JPG']
        assert {kind: found.number for kind, found in listing.others.items()} == {
            '.tif': 4,
            '.avif': 1,
            '': 2,
        }
        assert len(listing.others['.tif'].examples) == 3
        assert listing.others['.avif'].examples == ['e.avif']
        assert sorted(listing.left_out['hidden files'].examples) == ['.DS_Store', '.hidden.png']


def test_kinds_that_are_counted_have_a_limit(tmp_path):
    """A folder in which every file has an extension of its own takes no more memory."""
    names = [f'x.{first}{second}' for first in 'abcdefghijkl' for second in 'abcdefghijkl']
    listing = list_tree(touch(tmp_path / 'odd', *names), EXTENSIONS)
    assert len(listing.others) == 101
    assert sum(found.number for found in listing.others.values()) == 144


@pytest.mark.parametrize('name', ['lost+found', '@eaDir', '#recycle', '$RECYCLE.BIN', '__MACOSX'])
@pytest.mark.parametrize('where', ['', 'cat/'])
def test_folders_of_the_system_are_left_out(tmp_path, name, where):
    """At any depth, in any case, and also if they cannot be read, as lost+found cannot."""
    root = touch(tmp_path / 'animals', 'cat/1.png', 'dog/1.png', f'{where}{name}/t.png')
    (root / where / name).chmod(0)
    for cased in (name, name.upper()):
        listing = list_tree(root, EXTENSIONS)
        assert list(listing.files) == ['cat/1.png', 'dog/1.png']
        assert listing.left_out['folders of the system'].examples == [f'{where}{name}']
        (root / where / name).rename(root / where / cased)
        name = cased
    (root / where / name).chmod(0o700)


ANIMALS = 'cat/1.png cat/1_mask.png cat/old/2.png dog/1.png dog/old/3.png stray.png'


@pytest.mark.parametrize(
    ('patterns', 'left'),
    [
        ((), ANIMALS),
        (('*_mask.png',), 'cat/1.png cat/old/2.png dog/1.png dog/old/3.png stray.png'),
        (('old',), 'cat/1.png cat/1_mask.png dog/1.png stray.png'),
        (('old/',), 'cat/1.png cat/1_mask.png dog/1.png stray.png'),
        (('dog/old',), 'cat/1.png cat/1_mask.png cat/old/2.png dog/1.png stray.png'),
        (('cat/*', 'stray.*'), 'dog/1.png dog/old/3.png'),
        (('[cs]*',), 'dog/1.png dog/old/3.png'),
        (('OLD', '.png'), ANIMALS),
    ],
)
def test_patterns_leave_files_and_folders_out(tmp_path, patterns, left):
    """data.exclude: a name anywhere, or with '/' a path; what is left out is counted and named."""
    root = age(touch(tmp_path / 'animals', *ANIMALS.split()))
    listing = list_tree(root, EXTENSIONS, exclude=patterns)
    assert list(listing.files) == left.split()
    used = [pattern for pattern in patterns if f"data.exclude='{pattern}'" in listing.left_out]
    assert bool(used) == (len(left.split()) < 6)
    # An index of other patterns is not taken for this one.
    file = str(tmp_path / 'index')
    listed(root, EXTENSIONS, file)
    assert list(listed(root, EXTENSIONS, file, exclude=patterns).files) == left.split()
