"""An array of pictures as a source: its content, its refusals, and how a run identifies it."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
from streams import batches

from byol_jax.app.data import build_data
from byol_jax.app.fingerprint import fingerprint
from byol_jax.app.workdir import claim_workdir
from byol_jax.errors import UserError
from byol_jax.settings import Settings
from byol_jax.sources.array import Array
from configs import default

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), np.uint8)
LABELS = np.arange(12) % 3


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def array_config(path, **more):
    config = default.get_config()
    config.data.source, config.data.path = 'array', path
    config.views.image_size, config.batch_size = 16, 4
    config.update_from_flattened_dict(more)
    return config


def test_gives_what_the_file_holds(tmp_path):
    """Pictures, labels and names are those of the file, compressed or not."""
    names = np.array([f'{i}.png' for i in range(12)])
    path = tmp_path / 'a.npz'
    np.savez_compressed(
        path,
        images=IMAGES,
        labels=LABELS.astype(np.uint8),
        label_names=['a', 'b', 'c'],
        names=names,
    )
    source = Array(path)
    assert len(source) == 12
    for i in range(12):
        np.testing.assert_array_equal(source.load(i, 'image'), IMAGES[i])
        assert source.name(i) == f'{i}.png'
    assert source.size(3, 'image') == (20, 24)
    np.testing.assert_array_equal(source.labels, LABELS)
    assert list(source.label_names) == ['a', 'b', 'c']


def test_needs_only_images(tmp_path):
    """Without labels there are none; without names, examples are numbered."""
    source = Array(save(tmp_path / 'a.npz', images=IMAGES))
    assert source.labels is None
    assert [source.name(i) for i in (0, 11)] == ['0', '11']
    named = Array(save(tmp_path / 'b.npz', images=IMAGES, labels=LABELS))
    assert list(named.label_names) == ['0', '1', '2']


def test_what_is_not_used_is_not_read(tmp_path):
    """Other arrays in the file are not read, whatever they are."""
    path = save(tmp_path / 'a.npz', images=IMAGES, extra=np.array([None], object))
    assert len(Array(path)) == 12


@pytest.mark.parametrize(
    ('arrays', 'words'),
    [
        ({'image': IMAGES}, r"no 'images' in it. Did you mean 'image'\? It holds 'image'"),
        ({}, "no 'images' in it. It holds nothing"),
        ({'images': IMAGES.astype(np.float32)}, r'float32 and must be uint8.*numpy.rint'),
        ({'images': IMAGES.astype(np.int64)}, 'int64 and must be uint8'),
        ({'images': IMAGES[..., 0]}, r'\[12, 20, 24\] and must have \[N, H, W, 3\].*grey'),
        ({'images': IMAGES[..., :1]}, 'grey'),
        ({'images': IMAGES.transpose(0, 3, 1, 2)}, r'channels come first.*transpose\(0, 2, 3, 1\)'),
        ({'images': IMAGES[:0]}, 'is empty'),
        ({'images': np.array([None, 1], object)}, 'pickled objects.*never loaded'),
        ({'images': IMAGES, 'labels': LABELS[:5]}, r'\[5\] and must have \[12\]'),
        ({'images': IMAGES, 'labels': LABELS / 2}, 'float64 and must be whole numbers'),
        ({'images': IMAGES, 'labels': LABELS - 1}, 'must not be negative; one is -1'),
        ({'images': IMAGES, 'labels': LABELS + 10}, 'goes up to 12 for 12 images'),
        ({'images': IMAGES, 'labels': LABELS, 'label_names': ['a']}, 'has 1 entries.*up to 2'),
        ({'images': IMAGES, 'label_names': ['a']}, "'label_names' but no 'labels'"),
        ({'images': IMAGES, 'names': ['a']}, 'has 1 entries for 12 images'),
        ({'images': IMAGES, 'names': LABELS}, r'int64 \[12\] and must be texts, \[N\]'),
    ],
)
def test_wrong_contents_are_named(tmp_path, arrays, words):
    """A wrong content is reported with the file's name and what the file must hold."""
    path = save(tmp_path / 'a.npz', **arrays)
    with pytest.raises(UserError, match=words) as error:
        Array(path)
    assert path in str(error.value)
    assert 'uint8 [N, H, W, 3]' in str(error.value)


class Trap:
    """What a pickle would run when it is loaded."""

    def __reduce__(self):
        return (open, ('trapped', 'w'))


def test_wrong_files_are_named(tmp_path, monkeypatch):
    """Other or damaged files are refused, and nothing in them is run."""
    monkeypatch.chdir(tmp_path)
    whole = (tmp_path / save(tmp_path / 'whole.npz', images=IMAGES)).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    np.save(tmp_path / 'single.npy', IMAGES)
    files = {
        'text.npz': b'hello',
        'empty.npz': b'',
        'pickle.npz': pickle.dumps(Trap()),
        'cut.npz': whole[:-200],
        'damaged.npz': bytes(damaged),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, 'single.npy', 'missing.npz', '.'):
        with pytest.raises(UserError, match=re.escape(f'data.path={name}')):
            Array(name)
    assert not (tmp_path / 'trapped').exists()


def test_an_array_in_memory_has_another_constructor():
    """Given an array in place of a path, the error names `Array.of`."""
    with pytest.raises(UserError, match=r'Array\.of\(images\)'):
        Array(IMAGES)
    assert len(Array.of(IMAGES)) == 12


def test_config_needs_a_path():
    """data.source='array' without data.path says what to give."""
    with pytest.raises(UserError, match=r'--config.data.path=FILE.npz'):
        build_data(array_config(None))


def test_feeds_the_ordinary_pipeline(tmp_path):
    """With views.on='cpu', an array goes through tf.data like any source, tiles included."""
    path = save(tmp_path / 'a.npz', images=IMAGES, labels=LABELS)
    config = array_config(path, **{'data.held_out_fraction': 0.25})
    data = build_data(config)
    assert (len(data.train), len(data.held_out)) == (9, 3)
    (batch,) = batches(data.train, config, start_step=0, stop_step=1)
    assert {name: batch[name].shape for name in ('view1', 'view2', 'example')} == {
        'view1': (4, 16, 16, 3),
        'view2': (4, 16, 16, 3),
        'example': (4,),
    }
    tiled = build_data(array_config(path, **{'data.tile_size': 10}))
    # Two rows of three, the last of which ends at the border.
    assert len(tiled.train) == 12 * 6


def test_a_run_knows_its_pictures(tmp_path):
    """Other pictures with the same names are refused, which names alone could not tell."""
    path = save(tmp_path / 'a.npz', images=IMAGES)
    config = array_config(path)
    claim_workdir(tmp_path / 'w', config, fingerprint(build_data(config)))
    changed = IMAGES.copy()
    changed[7, 3, 3, 0] ^= 1
    save(path, images=changed)
    with pytest.raises(UserError, match='the array holds other pictures'):
        claim_workdir(tmp_path / 'w', config, fingerprint(build_data(config)))
    save(path, images=IMAGES.reshape(12, 24, 20, 3))
    other = fingerprint(build_data(config))
    assert other['names_sha256'] == fingerprint(build_data(array_config(path)))['names_sha256']
    with pytest.raises(UserError, match='the array holds other pictures'):
        claim_workdir(tmp_path / 'w', config, other)


def test_where_views_are_made_is_checked():
    """views.on takes 'cpu' and 'accelerator'; for anything else, the nearest is suggested."""
    config = default.get_config()
    assert config.views.on == 'cpu'
    for place in ('cpu', 'accelerator'):
        config.views.on = place
        Settings.of(config)
    config.views.on = 'acelerator'
    with pytest.raises(UserError, match=r"views.on='acelerator'.*Did you mean 'accelerator'\?"):
        Settings.of(config)
