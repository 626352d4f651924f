"""Carries JAX's connections between processes, so that JAX sees none of them break off.

JAX aborts a process whose connection to process 0 ends. Its client therefore connects to a port of
its own machine, and the bytes go on from there to process 0, whose end is told by `peers.Peers`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine

# The first line of a relayed connection.
HELLO = 'byol_jax-relay'


class Relay:
    """The relayed connections of one process; used in the thread of an event loop."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        # An asyncio connection that nothing refers to is closed, and such a task is cancelled.
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int) -> int:
        """Opens a local port from which connections go on to process 0; returns it.

        Args:
          host: of process 0.
          port: at which process 0 hands relayed connections to `to_service`.
        """

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # Stays open when process 0 is gone.
            self._writers.append(writer)
            try:
                far_reader, far_writer = await asyncio.open_connection(host, port)
            except OSError:
                # Process 0 is gone.
                return
            far_writer.write(f'{HELLO}\n'.encode())
            self._spawn(_carry(reader, far_writer, close=True))
            self._spawn(_carry(far_reader, writer, close=False))

        self._server = await asyncio.start_server(relay, '127.0.0.1', 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def to_service(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        service: int,
        seconds: float,
    ) -> None:
        """Carries the bytes of a relayed connection to JAX's service in this process, and back.

        Args:
          reader: of the connection, behind its first line.
          writer: of the connection.
          service: port of the service on this machine.
          seconds: in which the service must have started.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            try:
                near_reader, near_writer = await asyncio.open_connection('127.0.0.1', service)
                break
            except OSError:
                if loop.time() > end:
                    return
                await asyncio.sleep(0.05)
        self._spawn(_carry(reader, near_writer, close=True))
        await _carry(near_reader, writer, close=True)

    def close(self) -> None:
        """Closes all connections."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def listener(port: int) -> socket.socket:
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


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.create_server(('127.0.0.1', 0)) as probe:
        return int(probe.getsockname()[1])


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, close: bool) -> None:
    """Carries bytes in one direction until a side ends; then ends the other, if asked to."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        # A connection that breaks off has ended.
        pass
    finally:
        if close:
            writer.close()
