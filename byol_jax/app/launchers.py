"""What SLURM and Open MPI tell a process: which of a run it is, and which devices are its own."""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from byol_jax.errors import UserError

# Ports are chosen among the last 4,096, as JAX does.
_PORTS = 4096


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of a run this is.

    Attributes:
      coordinator: 'host:port' of process 0.
      count: number of processes.
      index: of this process, from 0.
    """

    coordinator: str
    count: int
    index: int


@dataclasses.dataclass(frozen=True)
class Share:
    """How the processes of a launcher share this host.

    Attributes:
      tasks: processes on this host.
      index: of this process among them, from 0.
      gpus: of this host that are the run's, as far as the launcher tells.
    """

    tasks: int
    index: int
    gpus: int | None


def find_place(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """Which process of a run this is, by the flags and, where these are left out, the launcher.

    Args:
      coordinator: 'host:port' of process 0, or None.
      count: number of processes, or None.
      index: of this process, or None.
      environment: of this process.

    Returns:
      The place, or None for a run of one process.

    Raises:
      UserError: it cannot be told; the message names what to give.
    """
    launched = _slurm(environment) or _open_mpi(environment)
    if launched is None:
        given = [value is not None for value in (coordinator, count, index)]
        if not any(given):
            return None
        if coordinator is None or count is None or index is None:
            raise UserError(
                'A run of several processes needs all of --coordinator=HOST:PORT, '
                '--process_count=N and --process_index=I (0 to N - 1); under SLURM it needs none '
                'of them, under Open MPI at most the first.'
            )
        return Place(coordinator, count, index)
    place = Place(
        launched.coordinator if coordinator is None else coordinator,
        launched.count if count is None else count,
        launched.index if index is None else index,
    )
    if not place.coordinator:
        raise UserError(
            f'Open MPI started {place.count} processes on several hosts and does not tell where '
            'process 0 runs: give --coordinator=HOST:PORT, with the first host of the run and a '
            'free port of it. Without Open MPI also give --process_count=N and --process_index=I.'
        )
    return place


def find_share(environment: Mapping[str, str] = os.environ) -> Share:
    """How the processes share this host; one process has it alone if no launcher tells."""
    if _slurm(environment) is not None:
        tasks = _tasks_per_node(environment.get('SLURM_STEP_TASKS_PER_NODE', '1'))
        node = int(environment.get('SLURM_NODEID', '0'))
        return Share(
            tasks[min(node, len(tasks) - 1)],
            int(environment.get('SLURM_LOCALID', '0')),
            _number(environment.get('SLURM_GPUS_ON_NODE')),
        )
    if _open_mpi(environment) is not None:
        return Share(
            int(environment.get('OMPI_COMM_WORLD_LOCAL_SIZE', '1')),
            int(environment.get('OMPI_COMM_WORLD_LOCAL_RANK', '0')),
            None,
        )
    return Share(1, 0, _number(environment.get('SLURM_GPUS_ON_NODE')))


def own_devices(share: Share, visible: int, on_host: int) -> list[int] | None:
    """Which of the GPUs that a process sees it takes.

    A process that is alone on its host takes all. One of several takes all that it sees if the
    launcher shows each its own, and else its part of them.

    Args:
      share: how the processes share the host.
      visible: GPUs that this process sees.
      on_host: GPUs of the host.

    Returns:
      Numbers among the visible ones, or None for all.

    Raises:
      UserError: there are more processes than GPUs.
    """
    offered = on_host if share.gpus is None else share.gpus
    if share.tasks == 1 or not visible or visible < offered:
        return None
    if visible < share.tasks:
        raise UserError(
            f'{share.tasks} processes share a host of {visible} GPU(s), and each needs one of its '
            'own: start fewer, one a host or one a GPU.'
        )
    part = visible // share.tasks
    return list(range(share.index * part, (share.index + 1) * part))


def count_gpus(
    environment: Mapping[str, str] = os.environ, devices: Path = Path('/dev')
) -> tuple[int, int]:
    """Returns how many NVIDIA or AMD GPUs this process sees, and how many the host has.

    Args:
      environment: of this process.
      devices: folder of the device files.
    """
    nvidia = [p for p in devices.glob('nvidia*') if re.fullmatch(r'nvidia\d+', p.name)]
    # Render devices may be of any card; this driver is AMD's for computing.
    amd = list(devices.glob('dri/renderD*')) if (devices / 'kfd').exists() else []
    on_host = len(nvidia) or len(amd)
    for name in ('CUDA_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES'):
        if name in environment:
            listed = [each for each in environment[name].split(',') if each.strip()]
            none = listed[:1] in (['-1'], ['NoDevFiles'])
            return min(0 if none else len(listed), on_host), on_host
    return on_host, on_host


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """The place of a task of `srun` with several; None in a batch script, which is one process."""
    count = int(environment.get('SLURM_STEP_NUM_TASKS', '1'))
    if count < 2:
        return None
    # Another step of the same job may run beside this one.
    step = f'{environment.get("SLURM_JOB_ID", "")}.{environment.get("SLURM_STEP_ID", "")}'
    host = _first_host(environment.get('SLURM_STEP_NODELIST', 'localhost'))
    return Place(f'{host}:{_port(step)}', count, int(environment['SLURM_PROCID']))


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    """The place of a process of `mpirun` with several.

    The address of process 0 is '' if it is not told: Open MPI 4 names the host of `mpirun`, Open
    MPI 5 none. On one host it needs no telling.
    """
    count = int(environment.get('OMPI_COMM_WORLD_SIZE', '1'))
    if count < 2:
        return None
    index = int(environment['OMPI_COMM_WORLD_RANK'])
    run = environment.get('OMPI_MCA_orte_hnp_uri', environment.get('PMIX_NAMESPACE', ''))
    port = _port(run)
    if environment.get('OMPI_COMM_WORLD_LOCAL_SIZE') == str(count):
        return Place(f'localhost:{port}', count, index)
    found = re.search(r'tcp://([^,:]+)|tcp6://\[([^],]+)', run)
    host = next((each for each in found.groups() if each), '') if found else ''
    return Place(f'{host}:{port}' if host else '', count, index)


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: 'node007' for 'node[007-010,012],login1'."""
    start, bracket, rest = nodes.partition('[')
    if not bracket or ',' in start:
        return start.partition(',')[0]
    return start + re.split('[],-]', rest, maxsplit=1)[0] + rest.partition(']')[2].partition(',')[0]


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's '2(x3),1' as [2, 2, 2, 1]."""
    tasks: list[int] = []
    for each in text.split(','):
        number, _, times = each.partition('(x')
        tasks += [int(number)] * int(times.rstrip(')') or 1)
    return tasks


def _port(name: str) -> int:
    """A port that is the same in all processes of a run and another in most other runs."""
    return 65536 - _PORTS + zlib.crc32(name.encode()) % _PORTS


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
