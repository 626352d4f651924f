"""Standard output and error: no fault of theirs ends anything, and it is said once."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from byol_jax.app.output import LastingStream, keep_output, lasting_output


class Faulty(io.StringIO):
    """Fails as often as it is asked to, then works."""

    def __init__(self, error: Exception, times: int):
        super().__init__()
        self.error, self.times = error, times

    def _maybe(self):
        if self.times:
            self.times -= 1
            raise self.error

    def write(self, text):
        self._maybe()
        return super().write(text)

    def flush(self):
        self._maybe()


def pair(stream):
    """The stream made to last, and what the other one is told."""
    told = io.StringIO()
    lasting = LastingStream(stream, 'standard output')
    lasting.other = LastingStream(told, 'standard error')
    return lasting, told


@pytest.mark.parametrize(
    ('encoding', 'written'),
    [
        ('ascii', b'caf\\xe9 \\udce9 \\u2026\n'),
        ('latin-1', b'caf\xe9 \\udce9 \\u2026\n'),
        ('utf-8', b'caf\xc3\xa9 \\udce9 \xe2\x80\xa6\n'),
    ],
)
def test_characters_that_the_encoding_lacks(encoding, written):
    """They are escaped, half a character of a file's name too; the others are as they are."""
    raw = io.BytesIO()
    lasting, told = pair(io.TextIOWrapper(raw, encoding=encoding))
    print('caf\xe9 \udce9 \u2026', file=lasting, flush=True)
    assert raw.getvalue() == written
    assert told.getvalue() == ''


@pytest.mark.parametrize(
    ('error', 'why'),
    [
        (BrokenPipeError(32, 'Broken pipe'), 'Broken pipe'),
        (OSError(5, 'Input/output error'), 'Input/output error'),
        (OSError(28, 'No space left on device'), 'No space left on device'),
        (ValueError('I/O operation on closed file.'), 'I/O operation on closed file.'),
    ],
)
def test_what_cannot_be_written_is_said_once(error, why):
    """Nothing is raised; one line on the other stream says why."""
    lasting, told = pair(Faulty(error, 100))
    for _ in range(5):
        print('a', file=lasting, flush=True)
    lasting.writelines(['b\n', 'c\n'])
    assert told.getvalue() == f'standard output cannot be written, it goes on without it: {why}\n'


def test_a_fault_may_pass():
    """A full disk that has room again gets what is printed from then on."""
    stream = Faulty(OSError(28, 'No space left on device'), 3)
    lasting, _ = pair(stream)
    for text in ('lost\n', 'lost\n', 'kept\n', 'kept too\n'):
        lasting.write(text)
        lasting.flush()
    assert stream.getvalue().endswith('kept too\n')


def test_both_gone():
    """Without any stream left nothing is said, and nothing raised."""
    out = LastingStream(Faulty(BrokenPipeError(32, ''), 100), 'standard output')
    err = LastingStream(Faulty(BrokenPipeError(32, ''), 100), 'standard error')
    out.other, err.other = err, out
    print('a', file=out, flush=True)
    print('b', file=err, flush=True)


def test_streams_of_the_caller_come_back():
    """The library gives back what it found, unless somebody else has put something there."""
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert isinstance(sys.stdout, LastingStream)
        inner = sys.stdout
        keep_output()
        assert sys.stdout is inner
    assert (sys.stdout, sys.stderr) == before
    with lasting_output():
        other = sys.stdout = io.StringIO()
    assert sys.stdout is other
    sys.stdout, sys.stderr = before


CLOSED = """
import os, sys
from byol_jax.app.output import keep_output, open_standard_files
open_standard_files()
keep_output()
print('out', flush=True)
print('err', file=sys.stderr, flush=True)
os.write(1, b'library')
with open(sys.argv[1], 'w') as file:
    print(file.fileno() > 2, sys.stderr.isatty(), file=file)
"""


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_begun_without_standard_files(tmp_path, closed):
    """No other file gets their numbers, so nothing that is printed can come into one."""
    path = tmp_path / 'note'
    done = subprocess.run(
        ['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable, '-c', CLOSED, str(path)],
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert path.read_text() == 'True False\n'


def test_the_status_of_a_closed_pipe():
    """The interpreter's last flush fails too; the status is still that of the program."""
    code = (
        'import sys; from byol_jax.app.output import keep_output; keep_output(); '
        'print("a" * 100000); sys.exit(3)'
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(write)
    assert done.returncode == 3
    assert done.stderr == 'standard output cannot be written, it goes on without it: Broken pipe\n'
