"""Files that a run can do without: whole records, said once, written again when there is room."""

from __future__ import annotations

import pytest
from full_disk import no_room_beyond

from byol_jax.app.side_files import SideFile


def test_records_that_found_no_room_come_later(tmp_path, capsys):
    """A record is there whole or not at all; those that waited come first, in their order."""
    file = SideFile(tmp_path / 'metrics.jsonl')
    file.append(b'first\n')
    with no_room_beyond(10):
        file.append(b'second\n')
        file.append(b'third\n')
        assert file.path.read_bytes() == b'first\n'
    said = capsys.readouterr().out
    assert said == f'{file.path} cannot be written, the run goes on without it: File too large\n'
    file.append(b'fourth\n')
    assert file.path.read_bytes() == b'first\nsecond\nthird\nfourth\n'
    assert capsys.readouterr().out == f'{file.path} is written again\n'


def test_the_last_try(tmp_path, capsys):
    """An append of nothing, as at the end of a run, writes what waits; alone it makes no file."""
    file = SideFile(tmp_path / 'tensorboard' / 'events')
    file.append(b'')
    assert not file.path.parent.exists()
    with no_room_beyond(2):
        file.append(b'event')
    file.append(b'')
    assert file.path.read_bytes() == b'event'


def test_a_file_that_is_cut_off_needs_no_room(tmp_path, capsys):
    """What a killed run wrote after its checkpoint can be removed on a full disk."""
    file = SideFile(tmp_path / 'metrics.jsonl')
    file.append(b'1\n2\n3\n')
    with no_room_beyond(0):
        file.rewrite(b'1\n2\n')
    assert file.path.read_bytes() == b'1\n2\n'
    file.rewrite(b'0\n1\n')
    assert file.path.read_bytes() == b'0\n1\n'
    assert capsys.readouterr().out == ''
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


@pytest.mark.parametrize('old', [None, b'old'])
def test_a_page_that_cannot_be_written(tmp_path, capsys, old):
    """The old one stays, nothing is left beside it, and it is said once."""
    file = SideFile(tmp_path / 'report.html')
    if old is not None:
        file.path.write_bytes(old)
    with no_room_beyond(3):
        for _ in range(3):
            assert not file.replace(lambda partial: partial.write_bytes(b'long page'))
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if old is None else [old])
    assert file.replace(lambda partial: partial.write_bytes(b'page'))
    assert file.path.read_bytes() == b'page'


def test_a_workdir_that_is_gone(tmp_path, capsys):
    """That is said as well; the folder of the run is not made anew."""
    file = SideFile(tmp_path / 'w' / 'tensorboard' / 'events')
    file.append(b'event')
    file.remove()
    assert capsys.readouterr().out.count('\n') == 2
    assert not (tmp_path / 'w').exists()
