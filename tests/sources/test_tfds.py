"""TFDS data sets: random access gives what TFDS reads, in every file format."""

from __future__ import annotations

import io
import os
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
import urllib3

from byol_jax.app import data as build
from byol_jax.errors import BadPicture, UserError
from byol_jax.evaluation.subject import compared
from byol_jax.sources.cache import DiskCached
from byol_jax.sources.tfds import Tfds
from byol_jax.sources.tiles import Tiles
from configs import default

FORMATS = ('tfrecord', 'array_record', 'parquet')
COUNTS = {'train': 23, 'test': 5}
SHARDS = 4


def picture(index: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """Noise of a different size for every index."""
    rng = np.random.default_rng(index)
    high = np.iinfo(dtype).max
    return rng.integers(0, high, (4 + index, 6, channels), dtype, endpoint=True)


class ByolTestPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures of every kind that TFDS stores."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        image = tfds.features.Image
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    'image': image(shape=(None, None, 3)),
                    'grey': image(shape=(None, None, 1)),
                    'deep': image(shape=(None, None, 3), dtype=np.uint16, encoding_format='png'),
                    'alpha': image(shape=(None, None, 4)),
                    'number': np.int64,
                    'label': tfds.features.ClassLabel(names=['ant', 'cat', 'dog']),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in COUNTS}

    def _generate_examples(self, split):
        first = 0 if split == 'train' else 100
        for i in range(first, first + COUNTS[split]):
            yield (
                i,
                {
                    'image': picture(i),
                    'grey': picture(i, 1),
                    'deep': picture(i, 3, np.uint16),
                    'alpha': picture(i, 4),
                    'number': i,
                    'label': i % 3,
                },
            )


class ByolTestPlain(tfds.core.GeneratorBasedBuilder):
    """Unlabelled pictures in two configs."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [  # noqa: RUF012  (TFDS reads a list here)
        tfds.core.BuilderConfig(name='small'),
        tfds.core.BuilderConfig(name='large'),
    ]

    def _info(self):
        features = {'picture': tfds.features.Image(shape=(None, None, 3))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {'picture': picture(i)}


class ByolTestRemote(ByolTestPlain):
    """Pictures that must be downloaded."""

    def _split_generators(self, dl_manager):
        dl_manager.download('https://pictures.invalid/all.zip')
        return super()._split_generators(dl_manager)


class ByolTestManual(ByolTestPlain):
    """Pictures that the user must download."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = 'Register at pictures.invalid.'

    def _split_generators(self, dl_manager):
        assert dl_manager.manual_dir
        return super()._split_generators(dl_manager)


NAME = 'byol_test_pictures'


def prepare(builder_class, folder: Path, file_format: str, shards: int = SHARDS):
    builder = builder_class(data_dir=folder, file_format=file_format)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=shards, try_download_gcs=False)
    )
    return builder


@pytest.fixture(scope='module', params=FORMATS)
def prepared(request, tmp_path_factory):
    """(builder, data_dir) of the prepared data set, in each file format."""
    folder = tmp_path_factory.mktemp(request.param)
    builder = prepare(ByolTestPictures, folder, request.param)
    assert len(builder.info.splits['train'].filenames) == SHARDS
    assert all(request.param in name for name in builder.info.splits['train'].filenames)
    return builder, str(folder)


def read_by_tfds(builder, split: str) -> list[dict[str, np.ndarray]]:
    """The split as TFDS reads it, in the order on disk."""
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return list(builder.as_data_source(split))
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    return list(builder.as_dataset(split=split, read_config=in_order).as_numpy_iterator())


@pytest.mark.parametrize(
    'split',
    [
        'train',
        'test',
        'train[2:5]',
        'train[:50%]',
        'train[50%:]',
        'train[-3:]',
        'train[5:6]',
        'train+test',
        'test[1:]+train[:7]',
        'all',
    ],
)
def test_split_is_what_tfds_reads(prepared, split):
    """Any split or slice has TFDS's examples, order and labels."""
    builder, folder = prepared
    source, expected = Tfds(NAME, split, folder), read_by_tfds(builder, split)
    assert len(source) == len(expected)
    for i, example in enumerate(expected):
        np.testing.assert_array_equal(source.load(i, 'image'), example['image'])
        assert source.load(i, 'image').dtype == np.uint8
    assert source.labels.tolist() == [example['label'] for example in expected]
    assert list(source.label_names) == ['ant', 'cat', 'dog']
    assert source.keys == ('image',)


def test_split_is_what_was_written(prepared):
    """Every written example is there once, with its own picture and label."""
    source = Tfds(NAME, 'train', prepared[1])
    # A picture of index i is 4 + i pixels high.
    indices = [source.size(i, 'image')[0] - 4 for i in range(len(source))]
    assert sorted(indices) == list(range(23))
    for place, index in enumerate(indices):
        np.testing.assert_array_equal(source.load(place, 'image'), picture(index))
        assert source.labels[place] == index % 3


def test_slices_make_up_the_split(prepared):
    """Adjacent slices, across the borders of shards, make up the split in order."""
    whole = Tfds(NAME, 'train', prepared[1])
    for border in (1, 5, 6, 7, 22):
        parts = [Tfds(NAME, f'train[{s}]', prepared[1]) for s in (f':{border}', f'{border}:')]
        assert [len(part) for part in parts] == [border, 23 - border]
        pictures = [part.load(i, 'image') for part in parts for i in range(len(part))]
        for i, loaded in enumerate(pictures):
            np.testing.assert_array_equal(loaded, whole.load(i, 'image'))


@pytest.mark.parametrize('split', ['train[:0]', 'train[23:]', 'train[5:2]'])
def test_a_slice_without_examples_is_the_users_error(prepared, split):
    """It contains nothing to train on, in any format."""
    with pytest.raises(UserError, match='holds no example') as caught:
        Tfds(NAME, split, prepared[1])
    assert f"data.split='{split}'" in str(caught.value)


def test_all_formats_give_the_same_pictures(tmp_path):
    """A data set has the same examples in the same order in every format."""
    sources = []
    for file_format in FORMATS:
        prepare(ByolTestPictures, tmp_path / file_format, file_format)
        sources.append(Tfds(NAME, 'train', str(tmp_path / file_format)))
    for i in range(23):
        first, *others = (source.load(i, 'image') for source in sources)
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_other_kinds_of_pictures_become_rgb(prepared):
    """Grey is repeated, and 16 bits are scaled to 8."""
    builder, folder = prepared
    source = Tfds(NAME, 'test', folder, ('grey', 'deep'))
    for i, example in enumerate(read_by_tfds(builder, 'test')):
        grey, deep = source.load(i, 'grey'), source.load(i, 'deep')
        assert grey.dtype == deep.dtype == np.uint8
        np.testing.assert_array_equal(grey, np.repeat(example['grey'], 3, axis=-1))
        np.testing.assert_array_equal(deep, np.rint(example['deep'] / 257))


def test_alpha_is_laid_over_black(prepared):
    """A picture with alpha becomes colour x alpha, as for a file."""
    builder, folder = prepared
    source = Tfds(NAME, 'test', folder, ('alpha',))
    for i, example in enumerate(read_by_tfds(builder, 'test')):
        rgba = example['alpha'].astype(np.float64)
        expected = rgba[..., :3] * rgba[..., 3:] / 255
        np.testing.assert_allclose(source.load(i, 'alpha'), expected, atol=1)


def test_access_in_any_order_and_from_many_threads(prepared):
    """A picture does not depend on what was or is being loaded."""
    source = Tfds(NAME, 'train', prepared[1])
    expected = [source.load(i, 'image') for i in range(23)]
    order = np.random.default_rng(0).integers(0, 23, 300).tolist()
    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(lambda i: source.load(i, 'image'), order))
    for i, image in zip(order, loaded, strict=True):
        np.testing.assert_array_equal(image, expected[i])


def test_labels_are_read_without_decoding_pictures(prepared, monkeypatch):
    """Opening a data set decodes no picture: ImageNet has a million."""
    decoded = []
    decode = tfds.features.Image.decode_example_np

    def counted(self, example):
        decoded.append(1)
        return decode(self, example)

    monkeypatch.setattr(tfds.features.Image, 'decode_example_np', counted)
    source = Tfds(NAME, 'train', prepared[1])
    assert not decoded
    source.load(0, 'image')
    assert decoded


def test_labels_of_what_was_loaded_cost_nothing(prepared, monkeypatch):
    """Loading the pictures of a batch gives its labels; others are read, once."""
    expected = Tfds(NAME, 'train', prepared[1]).labels
    source = Tfds(NAME, 'train', prepared[1])
    for index in (5, 0, 3):
        source.load(index, 'image')
    read, record = [], source._record
    monkeypatch.setattr(source, '_record', lambda index: read.append(index) or record(index))
    batch = np.array([3, 5, 0, 3])
    assert source.shown_labels(batch).tolist() == expected[batch].tolist()
    assert read == []
    for _ in range(2):
        assert source.shown_labels(np.array([5, 4])).tolist() == expected[[5, 4]].tolist()
    assert read == [4]


def test_unlabelled_data_sets(tmp_path):
    """Without a label feature there are no labels, and the name has the config."""
    prepare(ByolTestPlain, tmp_path, 'tfrecord', 1)
    source = Tfds('byol_test_plain/small', 'train', str(tmp_path), ('picture',))
    assert len(source) == 3
    assert source.labels is None
    assert source.shown_labels(np.arange(3)).tolist() == [-1, -1, -1]
    assert source.name(2) == 'byol_test_plain/small #2'


def test_unknown_split_suggests_the_nearest(prepared):
    """For a misspelt split, the nearest and all splits are named, with or without slices."""
    for split in ('trian', 'trian[:5]', 'train[5'):
        with pytest.raises(
            UserError, match=r"not a split .*'train'.* train \(23\), test \(5\)\."
        ) as caught:
            Tfds(NAME, split, prepared[1])
        assert f"'{split}'" in str(caught.value)


def test_unknown_feature_suggests_the_nearest(prepared):
    """For a misspelt picture key, the nearest picture is suggested; other features are not."""
    with pytest.raises(UserError, match=r"'imgae'.*image, .*Did you mean 'image'\?"):
        Tfds(NAME, 'train', prepared[1], ('imgae',))
    with pytest.raises(UserError, match="names 'number'") as caught:
        Tfds(NAME, 'train', prepared[1], ('number',))
    assert 'label' not in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'meant'),
    [
        ('byol_test_pictrues', 'byol_test_pictures'),
        ('cifr10', 'cifar10'),
        ('imagenett/160px-v2', 'imagenette'),
        ('imagenett:1.0.0', 'imagenette'),
    ],
)
def test_unknown_data_set_suggests_the_nearest(tmp_path, name, meant):
    """For a misspelt data set, the nearest is suggested, with or without a config."""
    with pytest.raises(UserError) as caught:
        Tfds(name, 'train', str(tmp_path))
    assert f"data.name='{name}'" in str(caught.value)
    assert f"'{meant}'" in str(caught.value)


@pytest.mark.parametrize('name', ['', 'a/b/c', f'{NAME}:9.9.9', 'byol_test_plain/smal'])
def test_unusable_names_are_the_users_errors(tmp_path, name):
    """An empty name, a wrong form, an unknown version or config is a UserError with the name."""
    with pytest.raises(UserError) as caught:
        Tfds(name, 'train', str(tmp_path))
    assert f"data.name='{name}'" in str(caught.value)


def test_unknown_config_suggests_the_nearest(tmp_path):
    """For a misspelt config, similar ones are named."""
    with pytest.raises(UserError, match='small'):
        Tfds('byol_test_plain/smal', 'train', str(tmp_path))


def no_network(*_, **__):
    raise requests.exceptions.ConnectionError('Failed to resolve pictures.invalid')


def not_found(*_, **__):
    response = requests.Response()
    response.status_code, response.url = 404, 'https://pictures.invalid/all.zip'
    response.raw = io.BytesIO()
    return response


@pytest.mark.parametrize(
    ('answer', 'said'), [(no_network, 'Failed to resolve'), (not_found, 'HTTP code: 404')]
)
def test_failed_download_is_the_users_error(tmp_path, monkeypatch, answer, said):
    """Without network, or with a dead address, the error says so and where the data belongs."""
    monkeypatch.setattr(requests.Session, 'request', answer)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"TFDS 'byol_test_remote/small' is not prepared") as caught:
        Tfds('byol_test_remote/small', 'train', str(tmp_path), ('picture',))
    assert time.monotonic() - start < 60
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_network_is_told_soon(tmp_path, monkeypatch):
    """If no address can be resolved, the error comes within half a minute."""
    waits = []

    def wait(self):
        waits.append(back_off(self))
        return 0

    def unresolved(*_, **__):
        raise socket.gaierror('Name or service not known')

    back_off = urllib3.Retry.get_backoff_time
    monkeypatch.setattr(urllib3.Retry, 'get_backoff_time', wait)
    monkeypatch.setattr(socket, 'getaddrinfo', unresolved)
    monkeypatch.setattr(urllib.request, 'getproxies', dict)
    with pytest.raises(UserError, match=r"'cifar10' .*could not be downloaded"):
        Tfds('cifar10', 'train', str(tmp_path))
    assert sum(waits) < 30


def test_manual_download_is_the_users_error(tmp_path):
    """A data set that the user must download is an error with TFDS's instructions."""
    with pytest.raises(UserError, match='byol_test_manual') as caught:
        Tfds('byol_test_manual/small', 'train', str(tmp_path), ('picture',))
    assert 'Register at pictures.invalid' in str(caught.value)


def test_prepared_data_need_no_network(prepared, monkeypatch):
    """A data set on disk opens without any request."""
    monkeypatch.setattr(requests.Session, 'request', no_network)
    assert len(Tfds(NAME, 'train', prepared[1])) == 23


@pytest.mark.parametrize('lost', [1, 5, 100])
def test_cut_tfrecord_is_named(tmp_path, lost):
    """A TFRecord file that was not copied completely is an error with its path."""
    builder = prepare(ByolTestPictures, tmp_path, 'tfrecord', 1)
    path = Path(builder.info.splits['train'].filepaths[0])
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UserError, match=path.name):
        Tfds(NAME, 'train', str(tmp_path))


def test_tfrecord_cut_inside_a_header_is_named(tmp_path):
    """A TFRecord file that ends in a record's first bytes is an error with its path."""
    builder = prepare(ByolTestPictures, tmp_path, 'tfrecord', 1)
    path = Path(builder.info.splits['train'].filepaths[0])
    path.write_bytes(path.read_bytes() + bytes(5))
    with pytest.raises(UserError, match=path.name):
        Tfds(NAME, 'train', str(tmp_path))


@pytest.mark.parametrize('file_format', FORMATS)
def test_damaged_records_are_bad_pictures(tmp_path, file_format):
    """If bytes are overwritten after opening, their records are bad, each under its own name."""
    builder = prepare(ByolTestPictures, tmp_path, file_format, 1)
    source = Tfds(NAME, 'train', str(tmp_path))
    expected = [source.load(i, 'image') for i in range(23)]
    file = Path(builder.info.splits['train'].filepaths[0])
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    named: list[tuple[str, str, str]] = []
    refused: list[str] = []
    for _ in range(10):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=8)] ^= 255
        file.write_bytes(damaged.tobytes())
        if file_format != 'tfrecord':
            # The readers of the other formats know the old contents.
            try:
                source = Tfds(NAME, 'train', str(tmp_path))
            except UserError as error:
                refused.append(str(error))
                continue
        for i in range(23):
            try:
                loaded = source.load(i, 'image')
            except BadPicture as error:
                named.append((error.file, source.file(i, 'image'), f'{NAME} #{i}'))
            else:
                # Only ArrayRecord's checksums are read: in other formats a pixel may differ.
                assert loaded.shape == expected[i].shape or file_format != 'array_record'
    assert 0 < len(named) + len(refused) < 230
    assert all(file.name in message for message in refused)
    assert all(len(set(names)) == 1 for names in named)


def test_vanished_records_are_bad_pictures(tmp_path):
    """If a file of records vanishes, each of its examples is reported, labels too."""
    builder = prepare(ByolTestPictures, tmp_path, 'tfrecord', 1)
    source = Tfds(NAME, 'train', str(tmp_path))
    Path(builder.info.splits['train'].filepaths[0]).unlink()
    with pytest.raises(BadPicture, match=f'{NAME} #3 cannot be read: '):
        source.load(3, 'image')
    with pytest.raises(BadPicture, match=f'{NAME} #0 cannot be read'):
        source.labels_of(np.arange(2))


def test_build_data_opens_tfds(prepared):
    """A config has data set, split, folder and pictures; the fraction of all is held out."""
    config = default.get_config()
    config.data.update(source='tfds', name=NAME, path=prepared[1], held_out_fraction=0.25)
    train, held_out = build.build_data(config)[:2]
    assert (len(train), len(held_out)) == (18, 5)
    whole = Tfds(NAME, 'train', prepared[1])
    assert sorted([*train.indices, *held_out.indices]) == list(range(23))
    for part in (train, held_out):
        assert part.labels.tolist() == whole.labels[part.indices].tolist()


def test_decoded_pictures_are_kept_on_disk(prepared, tmp_path, monkeypatch):
    """With data.cache, each picture of a data set is decoded once, and tiles decode none; a changed
    file or another version of TFDS invalidates all entries; sizes come from the entries.
    """
    source = Tfds(NAME, 'train', prepared[1])
    expected = [source.load(i, 'image') for i in range(len(source))]
    decode, decoded = tfds.features.Image.decode_example_np, []
    with monkeypatch.context() as patch:
        patch.setattr(
            tfds.features.Image,
            'decode_example_np',
            lambda self, data: decoded.append(1) or decode(self, data),
        )
        cached = DiskCached(source, tmp_path)
        tiles = Tiles(cached, 6)
        assert [tuple(sides) for sides in tiles.sides.tolist()] == [
            picture.shape[:2] if len(picture) >= 6 else (0, 0) for picture in expected
        ]
        assert not decoded
        last = list(cached.fill(('image',), 2))[-1]
        assert (last.done, last.bad, len(decoded)) == (len(source), 0, len(source))

    def never(*_):
        raise AssertionError('decoded again')

    again = DiskCached(Tfds(NAME, 'train', prepared[1]), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Tfds, '_feature', never)
        assert [filled.total for filled in again.fill(('image',), 2)] == [0]
        for i, picture in enumerate(expected):
            np.testing.assert_array_equal(again.load(i, 'image'), picture)
            assert again.size(i, 'image') == picture.shape[:2]
    file = prepared[0].info.splits['train'].filepaths[0]
    times = os.stat(file).st_atime_ns, os.stat(file).st_mtime_ns
    try:
        os.utime(file, ns=(times[0], times[1] + 1))
        changed = DiskCached(Tfds(NAME, 'train', prepared[1]), tmp_path)
        assert list(changed.fill(('image',), 2))[-1].total == len(source)
    finally:
        os.utime(file, ns=times)
    monkeypatch.setattr(tfds, '__version__', 'another')
    upgraded = DiskCached(Tfds(NAME, 'train', prepared[1]), tmp_path)
    assert list(upgraded.fill(('image',), 2))[-1].total == len(source)


def test_another_split_as_test_set(prepared):
    """evaluate.data_split measures on that split; a misspelt one is named by its own key."""
    config = default.get_config()
    config.data.source, config.data.name, config.data.path = 'tfds', NAME, str(prepared[1])
    config.data.held_out_fraction = 0.2
    config.evaluate.data_split = 'test'
    gallery, queries = compared(build.build_data(config))
    assert (len(gallery), len(queries)) == (COUNTS['train'], COUNTS['test'])
    np.testing.assert_array_equal(queries.labels, Tfds(NAME, 'test', prepared[1]).labels)
    config.evaluate.data_split = 'tset'
    with pytest.raises(UserError, match=r"evaluate\.data_split='tset'.*mean 'test'"):
        build.build_data(config)
