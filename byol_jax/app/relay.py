"""Carries a process's JAX connections to process 0, so that JAX does not see process 0 disappear.

JAX aborts a process whose connection to process 0 ends, before anything can be said about it. Its
client therefore connects to a local port of this program, a process of its own: JAX may hold
Python's lock while it waits for an answer, so no thread beside it could carry the answer.

    python relay.py HOST PORT

prints the local port. It ends with the process that started it, whose end closes its input.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys


async def serve(host: str, port: int) -> None:
    """Relays until the input ends.

    Args:
      host: of process 0.
      port: at which JAX's service listens there, or will soon.
    """
    tasks = set()
    kept = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Stays open when process 0 is gone; asyncio closes what nothing refers to.
        kept.append(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            # JAX tries again: its service is not there yet.
            writer.close()
            return
        tasks.add(asyncio.create_task(carry(reader, far_writer, close=True)))
        tasks.add(asyncio.create_task(carry(far_reader, writer, close=False)))

    server = await asyncio.start_server(relay, '127.0.0.1', 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, close: bool) -> None:
    """Carries bytes in one direction until a side ends; then ends the other, if asked to."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        # A connection that breaks off has ended.
        pass
    if close:
        writer.close()


if __name__ == '__main__':
    # Schedulers signal all processes of a job; this one is needed to the last.
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
