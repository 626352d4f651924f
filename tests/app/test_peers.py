"""The connections between the processes of a run, here all in one process."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from byol_jax.app import peers
from byol_jax.app.peers import Peers
from byol_jax.errors import UserError

pytestmark = pytest.mark.timeout(60)


class Ends(list):
    """The lines with which processes end, as (index, line)."""

    def wait(self, count: int, seconds: float = 20) -> dict[int, str]:
        end = time.monotonic() + seconds
        while len(self) < count and time.monotonic() < end:
            time.sleep(0.01)
        return dict(self)


@pytest.fixture
def ends(monkeypatch):
    """Short times, and a list of the ends of processes instead of their ends."""
    for name, seconds in (('JOIN', 20), ('GRACE', 0.1), ('TICK', 0.05), ('SILENT', 0.6)):
        monkeypatch.setattr(peers, f'{name}_SECONDS', seconds)
    monkeypatch.setattr(peers, '_READ_SECONDS', 0.05)
    made, init = [], Peers.__init__

    def remember(self, *args) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(Peers, '__init__', remember)
    yield Ends()
    for process in made:
        if hasattr(process, '_thread'):
            process._end_process = lambda line: None
            process.agree_to_end()
            process.close()


def free_address() -> str:
    with socket.create_server(('127.0.0.1', 0)) as probe:
        return f'localhost:{probe.getsockname()[1]}'


def make(ends: Ends, count: int, indices: list[int] | None = None) -> list[Peers]:
    address = free_address()
    return [
        Peers(address, count, i, lambda line, i=i: ends.append((i, line)))
        for i in (range(count) if indices is None else indices)
    ]


def join(processes: list[Peers]) -> list[UserError | None]:
    """Joins all at the same time; returns the error of each."""

    def one(process: Peers) -> UserError | None:
        try:
            process.join()
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def vanish(process: Peers) -> None:
    """What the kernel does with the connections of a killed process."""

    def close() -> None:
        for writer in process._lines.values():
            writer.transport.abort()

    process._end_process = lambda line: None
    process._loop.call_soon_threadsafe(close)


def silence(process: Peers) -> None:
    """Stops the thread of a process: it is there and says nothing."""
    process._loop.call_soon_threadsafe(time.sleep, 1.2)


@pytest.mark.parametrize('killed', [0, 1, 2])
def test_one_that_is_gone_ends_the_others(ends, killed):
    """All others end with one line, which names it."""
    processes = make(ends, 3)
    assert join(processes) == [None] * 3
    vanish(processes[killed])
    lines = ends.wait(2)
    assert sorted(lines) == [i for i in range(3) if i != killed]
    for index, line in lines.items():
        assert line.startswith(f'error: process {killed} of 3 (')
        assert 'is gone' in line
        assert f'Process {index} ends too. The same commands go on' in line


@pytest.mark.parametrize('silent', [0, 1])
def test_one_that_is_silent_ends_the_other(ends, silent):
    """A host without power closes no connection."""
    processes = make(ends, 2)
    join(processes)
    silence(processes[silent])
    assert list(ends.wait(1)) == [1 - silent]


def test_nobody_ends_without_reason(ends):
    """Processes that say that they are alive stay, longer than a silence."""
    processes = make(ends, 3)
    join(processes)
    time.sleep(0.9)
    assert not ends
    assert all(process.watching for process in processes)


@pytest.mark.parametrize('first', [0, 1])
def test_an_error_in_one_ends_the_others(ends, first):
    """They wait for a moment, in which the same error may reach them, and then end."""
    processes = make(ends, 3)
    join(processes)
    processes[first].leave()
    lines = ends.wait(2)
    assert sorted(lines) == [i for i in range(3) if i != first]
    for line in lines.values():
        assert f'process {first} of 3' in line
        assert 'ended with an error or a signal of its own' in line
    assert processes[2].explain(0) == lines[2]


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_an_agreed_end_is_nobodys_error(ends, order):
    """Those that leave a little later are not ended by those that left before, and process 0,
    which they need, leaves after them."""
    processes = make(ends, 3)
    join(processes)
    for process in processes:
        process.agree_to_end()
    left: list[int] = []

    def leave(index: int) -> None:
        time.sleep(0.2 * order.index(index))
        processes[index].leave()
        left.append(index)
        vanish(processes[index])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(leave, order))
    assert not ends
    assert left[-1] == 0


def test_an_agreed_end_has_an_end(ends, monkeypatch):
    """A process that hangs at its end does not keep process 0, and ends too."""
    monkeypatch.setattr(peers, 'LAST_SECONDS', 0.3)
    processes = make(ends, 2)
    join(processes)
    for process in processes:
        process.agree_to_end()
    processes[0].leave()
    assert list(ends.wait(1)) == [1]


def test_leaving_is_told_before_it_is_seen(ends):
    """A process that leaves and is gone at once counts as one that has left."""
    processes = make(ends, 2)
    join(processes)
    processes[1].leave()
    vanish(processes[1])
    assert 'ended with an error' in ends.wait(1)[0]


def test_parting_ends_the_watch(ends):
    """After the last step each may end when it likes."""
    processes = make(ends, 3)
    join(processes)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Peers.part, processes))
    time.sleep(0.2)
    assert not ends
    assert not any(process.watching for process in processes)


def test_missing_process_is_named(ends, monkeypatch):
    """Those that came end with the same line, which names the flags."""
    monkeypatch.setattr(peers, 'JOIN_SECONDS', 0.2)
    zero, one = join(make(ends, 4, [0, 1]))
    for error in (zero, one):
        assert str(error).startswith('processes 2, 3 of 4 did not come to process 0 (')
        for flag in ('--coordinator=', '--process_count=', '--process_index='):
            assert flag in str(error)


def test_missing_process_0_is_named(ends, monkeypatch):
    """So is the address at which nobody listened."""
    monkeypatch.setattr(peers, 'JOIN_SECONDS', 0.2)
    (error,) = join(make(ends, 2, [1]))
    assert 'could not reach process 0 at localhost:' in str(error)


def test_who_is_waited_for_is_said(ends, monkeypatch, capfd):
    """Long before the time is up."""
    monkeypatch.setattr(peers, 'JOIN_SECONDS', 0.5)
    monkeypatch.setattr(peers, 'WAITING_SECONDS', 0.2)
    join(make(ends, 3, [0, 2]))
    assert 'for process 1 of 3 ...' in capfd.readouterr().err


def test_counts_that_differ(ends):
    """Both are told."""
    address = free_address()
    for error in join([Peers(address, 2, 0), Peers(address, 3, 1)]):
        assert 'says --process_count=3, process 0' in str(error)


def test_an_index_that_is_taken(ends):
    """All are told."""
    address = free_address()
    processes = [Peers(address, 3, 0), Peers(address, 3, 1), Peers(address, 3, 1)]
    for error in join(processes):
        assert 'Two processes say --process_index=1' in str(error)


def test_taken_port(ends):
    """Another program at the port is named before anybody waits."""
    with socket.create_server(('', 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f'cannot listen at port {port}: .*in use'):
            Peers(f'localhost:{port}', 2, 0).join()


@pytest.mark.parametrize('sent', [b'', b'GET / HTTP/1.1\r\n\r\n', b'\xff\x00' * 99, b'x' * 200_000])
def test_strangers_do_not_disturb(ends, sent):
    """A scan of the port before and after the processes come changes nothing."""
    processes = make(ends, 2)

    def scan() -> None:
        place = ('localhost', processes[0]._port)
        with contextlib.suppress(OSError), socket.create_connection(place, 2) as stranger:
            stranger.sendall(sent + b'\n')

    joining = threading.Thread(target=join, args=[processes])
    scan()
    joining.start()
    joining.join()
    scan()
    time.sleep(0.3)
    assert not ends
    assert all(process.watching for process in processes)


@pytest.mark.parametrize(
    ('address', 'count', 'index', 'words'),
    [
        ('host', 2, 0, 'HOST:PORT'),
        ('host:x', 2, 0, 'HOST:PORT'),
        ('host:99999', 2, 0, 'HOST:PORT'),
        ('host:1', 2, 2, '--process_index=2'),
        ('host:1', 2, -1, '--process_index=-1'),
    ],
)
def test_flags_that_cannot_be(address, count, index, words):
    """They are refused before anybody waits."""
    with pytest.raises(UserError, match=words):
        Peers(address, count, index)


def test_bytes_of_jax_are_carried(ends):
    """What a process sends to its local port reaches the service of process 0, and back, also
    when its threads are busy; when process 0 is gone the local connection stays open."""
    processes = make(ends, 2)
    join(processes)
    far, near = ((host, int(port)) for host, port in (p.service().split(':') for p in processes))
    assert far != near
    with socket.create_server(far) as service:
        client = socket.create_connection(near, 10)
        at_service, _ = service.accept()
    data = bytes(range(256)) * 2000
    threading.Thread(target=client.sendall, args=[data], daemon=True).start()
    received = b''
    while len(received) < len(data):
        received += at_service.recv(1 << 16)
    assert received == data
    at_service.sendall(b'answer')
    # No thread of this process has carried it.
    processes[1]._loop.call_soon_threadsafe(time.sleep, 0.5)
    assert client.recv(100) == b'answer'
    at_service.close()
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.close()


def test_relay_ends_with_its_process(ends):
    """It outlives signals that a scheduler sends to all, and not the process that started it."""
    processes = make(ends, 2)
    join(processes)
    processes[1].service()
    relay = processes[1]._relay
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        relay.send_signal(number)
    time.sleep(0.2)
    assert relay.poll() is None
    relay.stdin.close()
    assert relay.wait(timeout=10) == 0
    relay.stdin = None
