"""The other processes of a run: when all are there, which of them is gone, and how to end.

JAX aborts a process with a C++ stack trace when another process does not come or is gone, so the
processes also talk to each other here. Process 0 listens at the coordinator's address; every other
process keeps one connection to it, on which lines go both ways. JAX's own connection passes through
`relay.py`, so that JAX does not notice that process 0 is gone before it is said here in one line.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from byol_jax.app import relay
from byol_jax.errors import UserError, printable

# JAX itself waits this long for the others.
JOIN_SECONDS = 300.0
# After so long without all of them, process 0 says whom it waits for.
WAITING_SECONDS = 15.0
# Every process sends a line this often, and is gone when it has sent none for so long. JAX ends the
# others after 100 seconds.
TICK_SECONDS = 5.0
SILENT_SECONDS = 60.0
# An error that several processes share reaches them at about the same time. Those that are still
# there so long after one has left did not meet it.
GRACE_SECONDS = 10.0
# Process 0 waits so long for the others where all end, and they end so long after it.
LAST_SECONDS = 60.0
# For what others answer at once.
_SOON_SECONDS = 5.0
# In which what is sent is read.
_READ_SECONDS = 0.5

_HELLO = 'byol_jax-peer'
_WAYS = (
    'Every process needs the same --coordinator=HOST:PORT, which all can reach, the same '
    '--process_count=N, and its own --process_index=I (0 to N - 1).'
)
_GONE = 'is gone: killed, out of memory, or its host or network failed.'
_LEFT = 'ended with an error or a signal of its own (see its output).'


class Peers:
    """This process's connections to the others of its run.

    They are served by a thread of their own, also while the main thread compiles or waits in a
    collective. When another process is gone, the thread says so and ends this process.

    Attributes:
      index: of this process, from 0.
      count: number of processes.
      watching: whether a process that is gone ends the others: from `join` to `part` or `leave`.
    """

    def __init__(
        self,
        coordinator: str,
        count: int,
        index: int,
        end: Callable[[str], None] | None = None,
    ):
        """Connects nothing yet.

        Args:
          coordinator: 'host:port' of process 0.
          count: number of processes.
          index: of this process, from 0.
          end: called in place of ending this process, with the line that tells why.

        Raises:
          UserError: one of them cannot be right.
        """
        host, _, port = coordinator.rpartition(':')
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f'--coordinator={coordinator} is not HOST:PORT, such as node1:12345.')
        if not 0 <= index < count:
            raise UserError(
                f'--process_index={index} does not go with --process_count={count}: '
                'processes are numbered from 0.'
            )
        self.index, self.count = index, count
        self._host, self._port = host.strip('[]'), int(port)
        self._end_process = end or self._exit
        # While TensorFlow is imported, what is written to the second file is held back.
        self._stderr = os.dup(2)
        self._lines: dict[int, asyncio.StreamWriter] = {}
        self._hosts: dict[int, str] = {index: socket.gethostname() or 'unnamed'}
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._acknowledged: set[int] = set()
        self.watching = False
        self._news = ''
        self._ending = self._agreed = self._claimed = False
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._relay: subprocess.Popen[bytes] | None = None
        self._server: asyncio.Server | None = None
        self._service = _free_port() if index == 0 else 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name='peers', daemon=True)
        self._thread.start()
        self._all_here: asyncio.Future[None] = self._loop.create_future()

    def join(self) -> None:
        """Returns when all processes are there.

        Raises:
          UserError: they do not come, or their flags do not fit; in every process.
        """
        self._call(self._listen() if self.index == 0 else self._connect())
        self._call(self._watch())

    def service(self) -> str:
        """Returns 'host:port' of JAX's coordination service, which process 0 must start there.

        For any other process it is a port of its own machine. To be called after `join`, once.
        """
        if self.index == 0:
            return f'127.0.0.1:{self._service}'
        self._relay = subprocess.Popen(
            [sys.executable, '-I', relay.__file__, self._host, str(self._service)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._relay.stdout is not None
        return f'127.0.0.1:{int(self._relay.stdout.readline())}'

    def agree_to_end(self) -> None:
        """Called where all processes end alike: none of them ends another any more."""
        self._agreed = True
        self.begin_to_end()

    def begin_to_end(self) -> None:
        """Called when this process ends by itself: it is no longer ended by the others.

        Does not return if another process is gone: that is why this one fails.
        """
        with self._lock:
            claimed, self._ending = self._claimed, True
        if claimed:
            self._ended.wait(_SOON_SECONDS)

    def explain(self, seconds: float) -> str:
        """Why a collective failed in this process.

        Args:
          seconds: to wait for word of another process. If one is gone, this process ends meanwhile.

        Returns:
          A line about another process that has left, or '' if none has.
        """
        end = time.monotonic() + seconds
        while not self._news and time.monotonic() < end:
            time.sleep(0.05)
        return self._news

    def leave(self) -> None:
        """Tells the others that this process ends for a reason that it has given itself."""
        self.begin_to_end()
        if self.watching:
            self.watching = False
            self._soon(self._say_and_wait('left'))
            if self.index == 0 and self._agreed:
                # They may still need the service for what they save.
                self._soon(self._wait_for_others(), LAST_SECONDS)

    def part(self) -> None:
        """Ends the watch over each other, in all processes; process 0 waits for the others."""
        self.begin_to_end()
        self.watching = False
        if self.index == 0:
            self._soon(self._wait_for_others(), LAST_SECONDS)
        else:
            self._soon(self._say_and_wait('parted'))
        self.close()

    def close(self) -> None:
        """Closes all connections and ends their thread; what the others make of it is theirs."""
        if self._thread.is_alive():
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            os.close(self._stderr)
        if self._relay is not None:
            # The end of its input ends it.
            self._relay.communicate()

    # What follows runs in the thread of the connections.

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _soon(self, coroutine: Coroutine[Any, Any, None], seconds: float = _SOON_SECONDS) -> None:
        """Waits a bounded time for what may not come any more."""
        try:
            self._call(asyncio.wait_for(coroutine, seconds))
        except (TimeoutError, OSError):
            return

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        # The loop itself keeps only weak references.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self) -> None:
        """Process 0: waits until all others are there."""
        try:
            self._server = await asyncio.start_server(
                lambda *both: self._spawn(self._accept(*both)), sock=_listener(self._port)
            )
        except OSError as error:
            raise UserError(
                f'Process 0 cannot listen at port {self._port}: {error.strerror}. Take another '
                'port, the same in all processes.'
            ) from error
        if self.count == 1:
            return
        said = self._loop.call_later(WAITING_SECONDS, self._say_waiting)
        try:
            await asyncio.wait_for(asyncio.shield(self._all_here), JOIN_SECONDS)
        except TimeoutError:
            where = f'process 0 ({self._hosts[0]}, port {self._port})'
            line = (
                f'{_named(self._missing())} of {self.count} did not come to {where} in '
                f'{JOIN_SECONDS:.0f} s. {_WAYS}'
            )
            await self._say(f'no {line}')
            raise UserError(line) from None
        finally:
            said.cancel()
        hosts = ' '.join(self._hosts[i] for i in range(self.count))
        await self._say(f'go {self._service} {hosts}')

    async def _watch(self) -> None:
        """From here on a process that is gone ends the others."""
        self.watching = True
        self._spawn(self._tick())
        for index in self._missing() if self.index == 0 else []:
            await self._gone(index)

    def _missing(self) -> list[int]:
        return [i for i in range(1, self.count) if i not in self._lines]

    def _say_waiting(self) -> None:
        print(
            f'waiting at {self._hosts[0]}, port {self._port}, for {_named(self._missing())} of '
            f'{self.count} ...',
            file=sys.stderr,
            flush=True,
        )

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Process 0: a connection of another process, or of a stranger."""
        try:
            first = await asyncio.wait_for(reader.readline(), _SOON_SECONDS)
            words = first.decode('ascii').split()
            if len(words) == 4 and words[0] == _HELLO:
                await self._welcome(int(words[1]), int(words[2]), words[3], reader, writer)
        except (OSError, TimeoutError, ValueError):
            # Not a process of this run, such as a scan of all ports; or one that is gone already.
            pass
        finally:
            writer.close()

    async def _welcome(
        self,
        index: int,
        count: int,
        host: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        wrong = ''
        if count != self.count:
            wrong = (
                f'Process {index} ({host}) says --process_count={count}, process 0 '
                f'({self._hosts[0]}) says {self.count}.'
            )
        elif not 0 < index < count or index in self._lines:
            other = self._hosts.get(index, '')
            wrong = f'Two processes say --process_index={index}: {other} and {host}.'
        if wrong:
            writer.write(f'no {wrong} {_WAYS}\n'.encode())
            if not self._all_here.done():
                await self._say(f'no {wrong} {_WAYS}')
                self._all_here.set_exception(UserError(f'{wrong} {_WAYS}'))
            return
        self._lines[index], self._hosts[index] = writer, host
        if not self._missing() and not self._all_here.done():
            self._all_here.set_result(None)
        await self._listen_to(index, reader)

    async def _connect(self) -> None:
        """Another process than 0: waits for process 0, and for its word that all are there."""
        address = f'{self._host}:{self._port}'
        end = self._loop.time() + JOIN_SECONDS
        while True:
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(self._host, self._port), _SOON_SECONDS
                )
                break
            except (OSError, TimeoutError) as error:
                if self._loop.time() > end:
                    why = getattr(error, 'strerror', None) or 'no answer'
                    raise UserError(
                        f'Process {self.index} of {self.count} ({self._hosts[self.index]}) could '
                        f'not reach process 0 at {address} in {JOIN_SECONDS:.0f} s: {why}. {_WAYS}'
                    ) from None
                await asyncio.sleep(0.2)
        self._lines[0], self._hosts[0] = writer, self._host
        await self._say(f'{_HELLO} {self.index} {self.count} {self._hosts[self.index]}')
        try:
            # Process 0 gives up first and says who is missing.
            answer = await asyncio.wait_for(reader.readline(), JOIN_SECONDS + 2 * _SOON_SECONDS)
        except (OSError, TimeoutError):
            answer = b''
        word, _, rest = answer.decode(errors='replace').strip().partition(' ')
        if word != 'go':
            gone = f'Process 0 at {address} is gone, or gave no answer, before all were there.'
            raise UserError(rest or f'{gone} {_WAYS}')
        service, *hosts = rest.split()
        self._service, self._hosts = int(service), dict(enumerate(hosts))
        self._spawn(self._listen_to(0, reader))

    async def _listen_to(self, index: int, reader: asyncio.StreamReader) -> None:
        """Follows what another process says, until it is gone."""
        self._heard[index] = self._loop.time()
        try:
            while line := await reader.readline():
                self._heard[index] = self._loop.time()
                word, _, rest = line.decode('ascii').strip().partition(' ')
                await self._hear(index, word, rest)
        except (OSError, ValueError):
            # A connection that breaks off has ended.
            pass
        self._heard.pop(index, None)
        if writer := self._lines.pop(index, None):
            writer.close()
        if self.watching and index not in self._left:
            await self._gone(index)

    async def _hear(self, index: int, word: str, rest: str) -> None:
        if word in ('left', 'parted'):
            # Process 0 passes on what the others say: `left 3`.
            who = int(rest) if rest else index
            if who == index:
                await self._say('seen', to=index)
            self._left.add(who)
            if word == 'left':
                if self.index == 0:
                    await self._say(f'left {who}', but=who)
                self._news = self._line_about(who, _LEFT)
                self._loop.call_later(GRACE_SECONDS, self._end, self._news)
                if who == 0:
                    # Whatever this process still waits for needs process 0.
                    self._loop.call_later(LAST_SECONDS, self._end_process, self._news)
        elif word == 'gone':
            self._left.add(index)
            self._end(self._line_about(int(rest), _GONE))
        elif word == 'seen':
            self._acknowledged.add(index)

    async def _gone(self, index: int) -> None:
        if not self._claim():
            return
        if self.index == 0:
            await self._say(f'gone {index}')
            # What an exit leaves unread may take with it what it has just sent.
            await asyncio.sleep(_READ_SECONDS)
        self._end_process(self._line_about(index, _GONE))
        self._ended.set()

    def _line_about(self, index: int, what: str) -> str:
        return (
            f'error: process {index} of {self.count} ({self._hosts[index]}) {what} Process '
            f'{self.index} ends too. The same commands go on from the last checkpoint.'
        )

    def _end(self, line: str) -> None:
        if self._claim():
            self._end_process(line)
            self._ended.set()

    def _claim(self) -> bool:
        """Whether this thread ends the process; not if the main thread does so already."""
        with self._lock:
            if self._ending:
                return False
            self._ending = self._claimed = True
        return True

    def _exit(self, line: str) -> None:
        """Ends this process whatever its other threads do; Python's own exit waits for them."""
        with suppress(OSError):
            os.write(self._stderr, f'{printable(line)}\n'.encode(errors='backslashreplace'))
        os._exit(1)

    async def _tick(self) -> None:
        """Lets the others know that this process is alive, and finds those that are not."""
        # Nobody has said anything since they came.
        self._heard = dict.fromkeys(self._heard, self._loop.time())
        while True:
            before = self._loop.time()
            await asyncio.sleep(TICK_SECONDS)
            await self._say('.')
            if self._loop.time() - before > 2 * TICK_SECONDS:
                # This process itself was stopped: what the others said meanwhile is still unread.
                self._heard = dict.fromkeys(self._heard, self._loop.time())
            for index, when in self._heard.copy().items():
                if self._loop.time() - when > SILENT_SECONDS and index not in self._left:
                    await self._gone(index)

    async def _say(self, line: str, to: int | None = None, but: int | None = None) -> None:
        """Says a line to all connected processes, or to one, or to all but one."""
        for index, writer in self._lines.copy().items():
            if index != but and to in (None, index):
                writer.write(f'{line}\n'.encode())

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._lines.values():
            writer.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _say_and_wait(self, word: str) -> None:
        """Says a word to all and waits until they have seen it: an exit may lose what is unread."""
        self._acknowledged.clear()
        await self._say(word)
        while set(self._lines) - self._acknowledged - self._left:
            await asyncio.sleep(0.02)

    async def _wait_for_others(self) -> None:
        while set(self._lines) - self._left:
            await asyncio.sleep(0.02)


def _listener(port: int) -> socket.socket:
    """Listens at a port of all interfaces, of IPv4 and, where it is in use, of IPv6.

    Raises:
      OSError: the port is taken or not allowed.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:
            # IPv6 is switched off; where it is not, this fails again.
            return socket.create_server(('', port))
    return socket.create_server(('', port))


def _free_port() -> int:
    """A port of this machine that nothing listens at."""
    with _listener(0) as probe:
        return int(probe.getsockname()[1])


def _named(indices: list[int]) -> str:
    """'process 3', or 'processes 1, 2, 5'."""
    return f'process{"es" if len(indices) > 1 else ""} {", ".join(map(str, indices))}'
