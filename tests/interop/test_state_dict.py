"""What is checked of a .pth before PyTorch reads it."""

from __future__ import annotations

import pickle
import zipfile

import pytest

from byol_jax.interop.state_dict import _check_pickles

# ((..), (..)), 60 levels of it, as the key of a dict.
ENDLESS = b'\x80\x02})' + b'q\x00h\x00\x86' * 60 + b'Ns.'


def archive(path, data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as file:
        file.writestr('weights/data.pkl', data)
        file.writestr('weights/data/0', bytes(10**6))
    return path


@pytest.mark.timeout(60, method='thread')
@pytest.mark.parametrize(
    ('data', 'compression', 'says'),
    [
        (ENDLESS, zipfile.ZIP_STORED, 'a tuple as the key'),
        (pickle.dumps({}), zipfile.ZIP_DEFLATED, 'data/0 is compressed'),
    ],
)
def test_archives(tmp_path, data, compression, says):
    """Neither years of hashing nor a few bytes that unpack to any number reach PyTorch."""
    with pytest.raises((TypeError, ValueError), match=says):
        _check_pickles(archive(tmp_path / 'x.pth', data, compression))


@pytest.mark.timeout(60, method='thread')
def test_old_files(tmp_path):
    """A file of PyTorch before 1.6 is a row of pickles."""
    sound = [pickle.dumps(each, 2) for each in (1, 1001, {}, {'w': 1}, ['0'])]
    path = tmp_path / 'x.pth'
    path.write_bytes(b''.join(sound) + b'\x01' * 100)
    _check_pickles(path)
    path.write_bytes(b''.join([*sound[:3], ENDLESS, sound[4]]))
    with pytest.raises(TypeError, match='a tuple as the key'):
        _check_pickles(path)


def test_sound_archives(tmp_path):
    _check_pickles(archive(tmp_path / 'x.pth', pickle.dumps({'w': (1, 2)}, 2)))
