"""Other TFDS data sets: labels of every kind, nested features, odd pictures."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import encode, rotated
from tfds_sets import builder_class, image, noise, prepare

from byol_jax.app.data import build_data
from byol_jax.errors import BadPicture, UserError
from byol_jax.sources.base import Source, Subset
from byol_jax.sources.data import Data, matched
from byol_jax.sources.quiet_tensorflow import tf
from byol_jax.sources.tfds import Tfds
from byol_jax.training.online_probe import labels_of_probe
from configs import default

Class = tfds.features.ClassLabel

# Numbers with gaps, and the names they get.
INTEGERS = builder_class(
    'ByolSetIntegers',
    {'image': image(), 'label': np.int32},
    lambda i: {'image': noise(i), 'label': 100 * (i % 3) - 100},
)
NESTED = builder_class(
    'ByolSetNested',
    {
        'x': {'image': image(), 'deep': {'image': image()}, 'label': np.int64},
        'y': Class(names='ab'),
    },
    lambda i: {'x': {'image': noise(i), 'deep': {'image': noise(50 + i)}, 'label': i}, 'y': i % 2},
)
SEVERAL = builder_class(
    'ByolSetSeveral',
    {
        'image': image(),
        'fine': Class(num_classes=6),
        'coarse': Class(num_classes=2),
        'id': np.int64,
    },
    lambda i: {'image': noise(i), 'fine': i, 'coarse': i % 2, 'id': 1000 + i},
)
DECLARED = builder_class(
    'ByolSetDeclared',
    {'image': image(), 'fine': Class(num_classes=6), 'coarse': Class(num_classes=2)},
    lambda i: {'image': noise(i), 'fine': i, 'coarse': i % 2},
    supervised_keys=('image', 'coarse'),
)
LISTS = builder_class(
    'ByolSetLists',
    {
        'image': image(),
        'labels': tfds.features.Sequence(Class(num_classes=3)),
        'hot': tfds.features.Tensor(shape=(3,), dtype=np.int64),
        'objects': tfds.features.Sequence({'label': Class(num_classes=3), 'crop': image()}),
    },
    lambda i: {
        'image': noise(i),
        'labels': [0, 1],
        'hot': [1, 1, 0],
        'objects': {'label': [2], 'crop': [noise(i)]},
    },
)
HIDDEN = builder_class(
    'ByolSetHidden',
    {'image': image(), 'label': Class(num_classes=3), 'some': Class(num_classes=3)},
    lambda i: {'image': noise(i), 'label': -1, 'some': i % 3 - 1},
)
ODD = builder_class(
    'ByolSetOdd',
    {
        'grey_alpha': image(2),
        'deep_grey': image(1, dtype=np.uint16, encoding_format='png'),
        'deep_alpha': image(4, dtype=np.uint16, encoding_format='png'),
        'depth': image(1, dtype=np.float32),
        'clip': tfds.features.Video(shape=(None, 8, 9, 3)),
    },
    lambda i: {
        'grey_alpha': noise(i, 2),
        'deep_grey': noise(i, 1, np.uint16),
        'deep_alpha': noise(i, 4, np.uint16),
        'depth': np.ones((8, 9, 1), np.float32),
        'clip': np.stack([noise(i)] * 2),
    },
)
SETS = {
    'byol_set_integers': INTEGERS,
    'byol_set_nested': NESTED,
    'byol_set_several': SEVERAL,
    'byol_set_declared': DECLARED,
    'byol_set_lists': LISTS,
    'byol_set_hidden': HIDDEN,
    'byol_set_odd': ODD,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('sets')
    for made in SETS.values():
        prepare(made, path)
    return str(path)


class Numbers(Source):
    """No pictures, with names of labels."""

    def __init__(self, names: tuple[str, ...]):
        self.label_names = names

    def __len__(self) -> int:
        return 0

    def load(self, index: int, key: str) -> np.ndarray:
        raise IndexError(index)

    def name(self, index: int) -> str:
        raise IndexError(index)


def order(source: Tfds, key: str = 'image', first: int = 0) -> list[int]:
    """The index of the example at each place, since TFDS shuffles."""
    written = [noise(first + i) for i in range(6)]
    return [
        next(i for i in range(6) if np.array_equal(written[i], source.load(place, key)))
        for place in range(len(source))
    ]


def test_plain_numbers_are_labels(folder):
    """An integer named label is the label, as an index into the sorted numbers that occur."""
    source = Tfds('byol_set_integers', 'train', folder)
    assert source.label_names == ('-100', '0', '100')
    assert source.labels.tolist() == [i % 3 for i in order(source)]
    # A part has the indices of the whole, whichever numbers it has.
    places = np.flatnonzero(source.labels == 2)
    part = Subset(source, places)
    assert part.labels.tolist() == [2, 2]
    assert part.label_names == source.label_names


def test_plain_numbers_are_read_when_they_are_asked_for(folder, monkeypatch):
    """Opening a data set, or a part of it, reads no record."""
    source = Tfds('byol_set_integers', 'train', folder)
    read = []
    records = source._records
    monkeypatch.setattr(records, 'read', lambda i: read.append(i) or type(records).read(records, i))
    part = Subset(source, np.arange(3))
    assert not read
    assert len(part.label_names) == 3
    assert sorted(read) == list(range(6))


@pytest.mark.parametrize('number', [0, 3])
@pytest.mark.parametrize('damage', ['unreadable', 'without its label'])
def test_a_damaged_record_does_not_stop_the_reading_of_labels(folder, monkeypatch, number, damage):
    """With one bad record, numbers are named, a probe is made and a test set is matched; it is one
    bad picture, and all other labels are the same as without it.
    """
    whole = Tfds('byol_set_integers', 'train', folder)
    names, expected = whole.label_names, whole.labels
    source = Tfds('byol_set_integers', 'train', folder)
    read = source._records.read

    def damaged(index: int) -> bytes:
        if index == number and damage == 'unreadable':
            raise OSError('the disk gave up')
        record = read(index)
        if index == number:
            example = tf.train.Example.FromString(record)
            example.features.feature['label'].int64_list.value.clear()
            record = example.SerializeToString()
        return record

    monkeypatch.setattr(source._records, 'read', damaged)
    # Every number is that of two records.
    assert source.label_names == names
    assert labels_of_probe(source) == 3
    others = np.setdiff1d(np.arange(6), [number])
    assert source.labels_of(others).tolist() == expected[others].tolist()
    shown = source.shown_labels(np.arange(6))
    assert shown[number] == -1
    assert shown[others].tolist() == expected[others].tolist()
    words = 'cannot be read' if damage == 'unreadable' else 'holds no label'
    with pytest.raises(BadPicture, match=f'byol_set_integers #{number} {words}'):
        source.load(number, 'image')
    with pytest.raises(UserError, match=r"1 label\(s\) .*'100' \([12] picture"):
        matched(source, Numbers(('-100', '0')), tiles=False)
    assert matched(source, whole, tiles=False).labels_of(others).tolist() == shown[others].tolist()


def test_a_number_of_a_record_that_was_mended_since_is_no_other(folder, monkeypatch):
    """A label that no record had when the numbers were read is none, not another number's."""
    source = Tfds('byol_set_integers', 'train', folder)
    lost = [place for place, i in enumerate(order(source)) if i % 3 == 1]
    source = Tfds('byol_set_integers', 'train', folder)
    read = source._records.read

    def damaged(index: int) -> bytes:
        if index in lost:
            raise OSError('the disk gave up')
        return read(index)

    with monkeypatch.context() as patch:
        patch.setattr(source._records, 'read', damaged)
        assert source.label_names == ('-100', '100')
    assert source.shown_labels(np.array(lost)).tolist() == [-1, -1]
    assert sorted(source.shown_labels(np.arange(6)).tolist()) == [-1, -1, 0, 0, 1, 1]


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG'])
@pytest.mark.parametrize('orientation', [1, 3, 6])
def test_sizes_are_read_without_decoding(folder, monkeypatch, file_format, orientation):
    """The size, read from the header, is that of the picture as TFDS decodes it, without EXIF;
    a record without a picture is bad.
    """
    source = Tfds('byol_set_integers', 'train', folder)
    encoded = encode(noise(0), file_format, exif=rotated(orientation))
    read = source._records.read

    def turned(index: int) -> bytes:
        example = tf.train.Example.FromString(read(index))
        example.features.feature['image'].bytes_list.value[:] = [encoded] if index else []
        return example.SerializeToString()

    monkeypatch.setattr(source._records, 'read', turned)
    shape = source.load(1, 'image').shape

    def decoded(*_):
        raise AssertionError('a picture was decoded')

    monkeypatch.setattr(tfds.features.Image, 'decode_example_np', decoded)
    assert source.size(1, 'image') == shape[:2] == (8, 9)
    with pytest.raises(BadPicture, match='#0 holds no picture'):
        source.size(0, 'image')
    source.max_megapixels = 1e-6
    with pytest.raises(BadPicture, match='declares 9x8 pixels'):
        source.size(1, 'image')


def test_labels_decode_no_picture(folder, monkeypatch):
    """Labels need only the records."""
    source = Tfds('byol_set_declared', 'train', folder)
    expected = [i % 2 for i in order(source)]

    def decoded(*_):
        raise AssertionError('a picture was decoded')

    monkeypatch.setattr(tfds.features.Image, 'decode_example_np', decoded)
    assert source.labels.tolist() == expected


def test_one_picture_is_decoded_at_a_time(folder, monkeypatch):
    """Of two pictures of an example, only the requested one is decoded."""
    source = Tfds('byol_set_nested', 'train', folder, ('x/image', 'x/deep/image'))
    decode, calls = tfds.features.Image.decode_example_np, []
    monkeypatch.setattr(
        tfds.features.Image,
        'decode_example_np',
        lambda self, data: calls.append(1) or decode(self, data),
    )
    source.load(0, 'x/image')
    assert len(calls) == 1


def test_nested_features(folder):
    """A picture or label inside a FeaturesDict is named by its path."""
    keys = ('x/image', 'x/deep/image')
    source = Tfds('byol_set_nested', 'train', folder, keys)
    assert source.keys == keys
    assert order(source, 'x/image') == order(source, 'x/deep/image', 50)
    assert source.labels.tolist() == [i % 2 for i in order(source, 'x/image')]
    assert list(source.label_names) == ['a', 'b']
    source = Tfds('byol_set_nested', 'train', folder, keys, label_key='x/label')
    assert source.labels.tolist() == order(source, 'x/image')


def test_a_nested_picture_is_suggested(folder):
    """If pictures are nested, the error lists their paths."""
    with pytest.raises(UserError, match=r"'image', but .* are: x/image, x/deep/image\. Did you"):
        Tfds('byol_set_nested', 'train', folder)


def test_several_labels_must_be_chosen_from(folder):
    """With several candidates, none is guessed: the error lists them and the key to choose with."""
    with pytest.raises(UserError, match=r'several .*: fine, coarse\. .*data\.label_key=fine'):
        Tfds('byol_set_several', 'train', folder)
    for key, label in (('fine', lambda i: i), ('coarse', lambda i: i % 2), ('id', lambda i: i)):
        source = Tfds('byol_set_several', 'train', folder, label_key=key)
        assert source.labels.tolist() == [label(i) for i in order(source)]
    assert source.label_names[0] == '1000'
    source = Tfds('byol_set_several', 'train', folder, label_key='')
    assert source.labels is None
    assert source.label_names == ()


def test_the_declared_label_is_taken(folder):
    """Of several ClassLabels, the one that the data set declares is the label."""
    source = Tfds('byol_set_declared', 'train', folder)
    assert source.labels.tolist() == [i % 2 for i in order(source)]


@pytest.mark.parametrize(
    ('name', 'key', 'message'),
    [
        ('several', 'corse', r"not a feature .*: fine, coarse, id\. Did you mean 'coarse'"),
        ('several', 'image', r"'image' \(Image\) is not a whole number"),
        ('lists', 'labels', 'any number of labels'),
        ('lists', 'hot', 'any number of labels'),
        ('lists', 'objects/label', 'any number of labels'),
    ],
)
def test_what_can_be_no_label(folder, name, key, message):
    """A feature that is not a label, or has several for a picture, is an error."""
    with pytest.raises(UserError, match=f"data.label_key='{key}'.*{message}|{message}"):
        Tfds(f'byol_set_{name}', 'train', folder, label_key=key)


def test_lists_of_labels_are_no_label(folder):
    """A data set with several labels for a picture is unlabelled, and the run says so."""
    source = Tfds('byol_set_lists', 'train', folder)
    assert source.labels is None
    config = default.get_config()
    config.data.update({'source': 'tfds', 'name': 'byol_set_lists', 'path': str(folder)})
    (line,) = build_data(config).left_out()
    assert line.startswith("left out, the labels of TFDS 'byol_set_lists' (labels, objects/label)")
    config.data.label_key = ''
    assert not build_data(config).left_out()


def test_labels_that_are_not_public(folder):
    """A split whose labels are all -1 has none; if only some are -1, the first is named."""
    assert Tfds('byol_set_hidden', 'train', folder).labels is None
    source = Tfds('byol_set_hidden', 'train', folder, label_key='some')
    with pytest.raises(UserError, match='have no label'):
        Data(source, Subset(source, np.arange(0))).check_labels()
    with pytest.raises(UserError, match=r'2 of 6 .* no label .*byol_set_hidden #\d') as caught:
        _ = source.labels
    first = int(str(caught.value).split('byol_set_hidden #')[1][0])
    assert order(source)[first] % 3 == 0
    known = np.array([place for place, i in enumerate(order(source)) if i % 3])
    assert source.labels_of(known).tolist() == [i % 3 - 1 for i in order(source) if i % 3]


@pytest.mark.parametrize('key', ['objects/crop', 'objects'])
def test_pictures_in_a_sequence_are_refused(folder, key):
    """A sequence of pictures is not a picture; the error says so."""
    with pytest.raises(UserError, match=r"are: image\. 'objects' is a sequence"):
        Tfds('byol_set_lists', 'train', folder, (key,))


@pytest.mark.parametrize(('key', 'why'), [('depth', '32-bit floats'), ('clip', 'a sequence')])
def test_what_is_no_picture_is_refused(folder, key, why):
    """Measurements and clips are not pictures to train on."""
    with pytest.raises(UserError, match=f'are: grey_alpha, deep_grey, deep_alpha.*{why}'):
        Tfds('byol_set_odd', 'train', folder, (key,))


def test_odd_pictures_become_rgb(folder):
    """Grey with alpha, 16-bit grey and 16 bits with alpha become 8-bit RGB over black."""
    keys = ('grey_alpha', 'deep_grey', 'deep_alpha')
    source = Tfds('byol_set_odd', 'train', folder, keys)
    written = {}
    for i in range(6):
        grey, deep = noise(i, 2).astype(float), noise(i, 4, np.uint16) / 257
        written[i] = (
            np.repeat(grey[..., :1] * grey[..., 1:] / 255, 3, -1),
            np.repeat(noise(i, 1, np.uint16) / 257, 3, -1),
            deep[..., :3] * deep[..., 3:] / 255,
        )
    found = []
    for place in range(6):
        loaded = [source.load(place, key) for key in keys]
        assert all(picture.dtype == np.uint8 for picture in loaded)
        found += [
            i
            for i, expected in written.items()
            if all(np.abs(a - b).max() <= 0.501 for a, b in zip(loaded, expected, strict=True))
        ]
    assert sorted(found) == list(range(6))


def test_large_pictures_are_refused_by_their_header(folder, monkeypatch):
    """A picture that declares more than data.max_megapixels is bad, and is not decoded."""
    source = Tfds('byol_set_integers', 'train', folder, max_megapixels=7.1e-5)

    def decoded(*_):
        raise AssertionError('the picture was decoded')

    monkeypatch.setattr(tfds.features.Image, 'decode_example_np', decoded)
    with pytest.raises(BadPicture, match='declares 9x8 pixels') as caught:
        source.load(2, 'image')
    assert caught.value.file == 'byol_set_integers #2'
