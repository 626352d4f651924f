"""TFDS data sets on disk: without the network, in every format, damaged or incomplete."""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet
from streams import batches
from tfds_sets import builder_class, image, noise, prepare

from byol_jax.app.data import build_data
from byol_jax.errors import UserError
from byol_jax.sources.tfds import Tfds
from byol_jax.sources.tfds_files import TfRecords, open_builder, record_bounds
from configs import default

NAME = 'byol_set_alone'


FORMATS = ('tfrecord', 'array_record', 'parquet')


ALONE = builder_class('ByolSetAlone', {'image': image()}, lambda i: {'image': noise(i)}, count=11)


class ByolSetVersions(ALONE):
    """A data set whose code has a version and configs that need not be on disk."""

    BUILDER_CONFIGS = [  # noqa: RUF012  (TFDS reads a list here)
        tfds.core.BuilderConfig(name='small'),
        tfds.core.BuilderConfig(name='large'),
    ]


class ByolSetManual(ALONE):
    """A data set of which the user downloads one part, and TFDS another."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = 'Register at pictures.invalid.'
    url_infos = {'https://pictures.invalid/a.zip': None}  # noqa: RUF012

    def _split_generators(self, dl_manager):
        assert dl_manager.manual_dir
        return super()._split_generators(dl_manager)


@pytest.fixture
def no_network(monkeypatch) -> None:
    """Any use of a socket or a name server fails the test, even if the error is caught."""
    used = []

    def refuse(*arguments, **_):
        used.append(arguments)
        raise OSError('the network was used')

    monkeypatch.setattr(socket, 'socket', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(socket, 'create_connection', refuse)
    yield
    assert not used


def files(folder: Path, split: str = 'train') -> list[Path]:
    return sorted(path for path in folder.rglob(f'*{split}*') if '-of-' in path.name)


@pytest.mark.parametrize('name', ['cifar10', 'imagenette/160px-v2', 'imagenet2012'])
def test_without_download_the_network_is_left_alone(tmp_path, no_network, name):
    """With data.download=False, missing data is an error that says how to prepare it."""
    config = default.get_config()
    config.data.update(source='tfds', name=name, path=str(tmp_path), download=False)
    with pytest.raises(UserError, match=r'data\.download=False') as caught:
        build_data(config)
    assert f"tfds.builder('{name}', data_dir='{tmp_path}')" in str(caught.value)
    assert ('by hand' in str(caught.value)) == (name == 'imagenet2012')
    assert not list(tmp_path.iterdir())


def commands(error: UserError) -> list[str]:
    """The Python programs in a message to the user."""
    return re.findall(r'python -c "(.*?)"', str(error))


def test_the_command_that_is_given_prepares_the_data_set(tmp_path):
    """After running the command in the error, the same call succeeds."""
    with pytest.raises(UserError, match=r'data\.download=False') as caught:
        Tfds(NAME, 'train', str(tmp_path), download=False)
    (command,) = commands(caught.value)
    exec(command)
    assert len(Tfds(NAME, 'train', str(tmp_path), download=False)) == 11


@pytest.mark.parametrize('download', [True, False])
def test_what_is_prepared_needs_no_network(tmp_path, no_network, download):
    """A data set on disk is read without the network, whether downloads are allowed or not."""
    prepare(ALONE, tmp_path)
    source = Tfds(NAME, 'train', str(tmp_path), download=download)
    assert len([source.load(i, 'image') for i in range(11)]) == 11


def test_other_versions_on_disk_are_named(tmp_path, no_network):
    """If another version or config is prepared, the error has the name to use."""
    prepare(ByolSetVersions, tmp_path)
    with pytest.raises(UserError, match=r'Prepared there: byol_set_versions/small:1\.0\.0\.'):
        Tfds('byol_set_versions/large', 'train', str(tmp_path), download=False)
    with pytest.raises(UserError, match=r"'byol_set_versions:2\.0\.0': .* only: 1\.0\.0"):
        Tfds('byol_set_versions:2.0.0', 'train', str(tmp_path), download=False)
    assert len(Tfds('byol_set_versions/small:1.0.0', 'train', str(tmp_path))) == 11


def test_manual_archives_are_asked_for_first(tmp_path, no_network):
    """What the user must download is said at once, before a name server is asked."""
    with pytest.raises(UserError, match=r'by hand first: Register at pictures\.invalid'):
        Tfds('byol_set_manual', 'train', str(tmp_path))
    (tmp_path / 'downloads' / 'manual').mkdir(parents=True)
    (tmp_path / 'downloads' / 'manual' / 'a.zip').touch()
    assert len(Tfds('byol_set_manual', 'train', str(tmp_path))) == 11


def test_folders_that_cannot_hold_data_sets(tmp_path):
    """A folder that does not exist, is a file or is remote is an error; none is created."""
    (tmp_path / 'tfds').mkdir()
    (tmp_path / 'file').touch()
    message = r"/tfsd does not exist\. Did you mean 'tfds'\?.*create the folder"
    with pytest.raises(UserError, match=message):
        Tfds(NAME, 'train', str(tmp_path / 'tfsd'))
    with pytest.raises(UserError, match='/file is a file, not a folder'):
        Tfds(NAME, 'train', str(tmp_path / 'file'))
    with pytest.raises(UserError, match='gs://bucket/tfds is not a folder on this machine'):
        Tfds(NAME, 'train', 'gs://bucket/tfds')
    assert {path.name for path in tmp_path.iterdir()} == {'tfds', 'file'}


@pytest.mark.parametrize('file_format', FORMATS)
def test_missing_and_empty_files_are_named(tmp_path, file_format):
    """A file of records that is empty or missing is an error with its path, in every format."""
    prepare(ALONE, tmp_path, file_format, shards=2)
    lost = files(tmp_path)[1]
    lost.write_bytes(b'')
    with pytest.raises(UserError, match=lost.name):
        Tfds(NAME, 'train', str(tmp_path))
    assert len(Tfds(NAME, 'test', str(tmp_path))) == 11
    lost.unlink()
    with pytest.raises(UserError, match=f'lacks .*{lost.name}'):
        Tfds(NAME, 'train', str(tmp_path))


@pytest.mark.parametrize('file_format', FORMATS)
def test_files_of_another_length_are_named(tmp_path, file_format):
    """A whole file of another split is an error with both numbers of records."""
    prepare(ALONE, tmp_path / 'one', file_format, shards=1)
    prepare(ALONE, tmp_path / 'two', file_format, shards=2)
    here, (there, _) = files(tmp_path / 'one')[0], files(tmp_path / 'two')
    here.write_bytes(there.read_bytes())
    with pytest.raises(UserError, match=rf'{here.name} holds [56] records, .* says 11'):
        Tfds(NAME, 'train', str(tmp_path / 'one'))


def test_records_that_tfds_drops_are_missed(tmp_path):
    """TFDS's writer of Parquet files may lose records; the data set is then refused."""
    features = {'image': image()}
    many = builder_class('ByolSetMany', features, lambda i: {'image': noise(i)}, count=250)
    prepare(many, tmp_path, 'parquet')
    if parquet.read_metadata(files(tmp_path)[0]).num_rows == 250:
        assert len(Tfds('byol_set_many', 'train', str(tmp_path))) == 250
        return
    with pytest.raises(UserError, match=r'holds \d+ records, .* says 250') as caught:
        Tfds('byol_set_many', 'train', str(tmp_path))
    (command,) = commands(caught.value)
    (tmp_path / 'array_record').mkdir()
    exec(command)
    assert len(Tfds('byol_set_many', 'train', str(tmp_path / 'array_record'))) == 250


def test_many_row_groups_are_read_right(tmp_path, monkeypatch):
    """In a Parquet file with several row groups, every record is found, in slices too."""
    monkeypatch.setattr(tfds.core.file_adapters, '_batched', row_groups)
    rows = {'image': image(), 'label': np.int64}
    many = builder_class('ByolSetGroups', rows, lambda i: {'image': noise(i), 'label': i}, count=25)
    prepare(many, tmp_path, 'parquet', shards=2)
    assert parquet.read_metadata(files(tmp_path)[0]).num_row_groups == 2
    whole = Tfds('byol_set_groups', 'train', str(tmp_path))
    assert sorted(whole.labels.tolist()) == list(range(25))
    for i in np.random.default_rng(0).permutation(25).tolist():
        np.testing.assert_array_equal(whole.load(i, 'image'), noise(int(whole.labels[i])))
    part = Tfds('byol_set_groups', 'train[9:21]', str(tmp_path))
    for i in range(12):
        np.testing.assert_array_equal(part.load(i, 'image'), whole.load(9 + i, 'image'))


def row_groups(iterator: Iterator[Any], _: int) -> Iterator[list[Any]]:
    """Batches of 7 records, without loss."""
    examples = list(iterator)
    yield from (examples[i : i + 7] for i in range(0, len(examples), 7))


def test_tfrecord_cut_between_two_records_is_named(tmp_path):
    """A TFRecord file that lacks whole records is not accepted as a smaller data set."""
    prepare(ALONE, tmp_path)
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[: int(record_bounds(path)[-2])])
    with pytest.raises(UserError, match=rf'{path.name} holds 10 records, .* says 11'):
        Tfds(NAME, 'train', str(tmp_path))


def test_a_changed_tfrecord_is_no_other_picture(tmp_path):
    """If a TFRecord file is replaced while in use, there are errors, but never other bytes."""
    prepare(ALONE, tmp_path)
    source = Tfds(NAME, 'train', str(tmp_path))
    path = files(tmp_path)[0]
    path.write_bytes(b'\1' + path.read_bytes())
    for i in range(11):
        with pytest.raises(UserError, match='has changed since the run began'):
            source.load(i, 'image')


def test_riegeli_is_refused(tmp_path):
    """A format without random access is an error that says how to prepare another."""
    prepare(ALONE, tmp_path)
    (info,) = tmp_path.rglob('dataset_info.json')
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {'fileFormat': 'riegeli'}))
    with pytest.raises(UserError, match='riegeli, which has no random access') as caught:
        Tfds(NAME, 'train', str(tmp_path))
    (command,) = commands(caught.value)
    (tmp_path / 'array_record').mkdir()
    exec(command)
    assert len(Tfds(NAME, 'train', str(tmp_path / 'array_record'), download=False)) == 11


@pytest.mark.parametrize(
    ('file_format', 'module', 'package'),
    [
        ('array_record', 'array_record.python', 'array_record'),
        ('parquet', 'pyarrow', 'pyarrow'),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, file_format, module, package):
    """If the package of a format is missing, the error names it, and a way without it."""
    prepare(ALONE, tmp_path, file_format)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f'pip install {package}') as caught:
        Tfds(NAME, 'train', str(tmp_path))
    (command,) = commands(caught.value)
    assert "file_format='tfrecord'" in command


@pytest.mark.parametrize('split', ['train[3:99]', 'train+tset', "train[:'a']"])
def test_slices_that_do_not_exist(tmp_path, split):
    """A slice that is invalid or goes beyond the end is an error that quotes it."""
    prepare(ALONE, tmp_path)
    with pytest.raises(UserError) as caught:
        Tfds(NAME, split, str(tmp_path))
    assert f"data.split='{split}'" in str(caught.value)


@pytest.mark.parametrize('file_format', FORMATS)
def test_a_run_goes_on_from_its_step_alone(tmp_path, file_format):
    """A start at step k gives exactly the batches of a run from step 0, in every format."""
    prepare(ALONE, tmp_path, file_format, shards=2)
    config = default.get_config()
    config.batch_size = 4
    config.views.image_size = 16
    config.data.update(source='tfds', name=NAME, path=str(tmp_path), split='train[1:]+test[:7]')

    def run(start: int) -> list[np.ndarray]:
        data = build_data(config)
        made = batches(data.train, config, start_step=start, stop_step=12)
        return [np.stack([batch['view1'], batch['view2']]) for batch in made]

    whole = run(0)
    assert len({batch.tobytes() for batch in whole}) == 12
    for start in (1, 4, 5, 11):
        np.testing.assert_array_equal(run(start), whole[start:])


def test_the_index_of_tfrecords_is_small(tmp_path):
    """It takes little more than 8 bytes for each record: 11 MB for ImageNet's."""
    count, shards = 20_000, 4
    record = struct.pack('<Q', 3) + b'crc.abccrc.'
    instructions = []
    for shard in range(shards):
        path = tmp_path / f'{shard}'
        path.write_bytes(record * count)
        instructions.append(tfds.core.utils.shard_utils.FileInstruction(str(path), 0, -1, count))
    tracemalloc.start()
    records = TfRecords(None, 'train', instructions)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(records) == shards * count
    assert kept < 8.5 * shards * count
    assert records.read(2 * count + 7) == b'abc'


def test_no_module_is_imported_by_a_file(tmp_path, monkeypatch):
    """TFDS would import the module of a class that features.json names; we do not let it."""
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules' / 'hostile_features.py').write_text('Feature = None\n')
    monkeypatch.syspath_prepend(tmp_path / 'modules')
    folder = tmp_path / 'data' / 'evil' / '1.0.0'
    folder.mkdir(parents=True)
    feature = {'pythonClassName': 'hostile_features.Feature'}
    content = {'featuresDict': {'features': {'x': feature}}}
    (folder / 'features.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'features\.json: .* import hostile_features first\.$'):
        open_builder('evil', str(tmp_path / 'data'))
    assert 'hostile_features' not in sys.modules
