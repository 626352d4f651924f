"""The devices that a run has: that JAX finds them, how many there are, and which stay unused."""

from __future__ import annotations

import json
import socket

import jax

from byol_jax.app.hosts import gather_texts
from byol_jax.app.launchers import count_gpus, find_share
from byol_jax.errors import UserError, did_you_mean

_PLATFORMS = ('cpu', 'gpu', 'cuda', 'rocm', 'tpu')


def check_devices() -> None:
    """Checks that JAX finds devices.

    Raises:
      UserError: it finds none of those that JAX_PLATFORMS asks for.
    """
    try:
        jax.local_devices()
    # JAX has nothing to say about a platform that it knows and that is not installed.
    except (RuntimeError, AssertionError) as error:
        asked = _platforms_asked()
        said = str(error).partition('\n')[0].partition(' (set JAX_PLATFORMS')[0].rstrip('.')
        if not asked:
            raise UserError(f'JAX finds no device: {said}') from error
        unknown = [name for name in asked.split(',') if name not in _PLATFORMS]
        near = did_you_mean(unknown[0], _PLATFORMS) if unknown else ''
        raise UserError(
            f'JAX_PLATFORMS={asked} asks for devices that JAX does not find on '
            f'{socket.gethostname()}: {said or "it is not installed for them"}.{near} Unset it for '
            'the best there are, set JAX_PLATFORMS=cpu, or install JAX for these (jax[cuda13], '
            'jax[tpu]) and their driver.'
        ) from error


def describe_devices() -> tuple[str, list[str]]:
    """Says which devices a run has. All processes must call it at the same point.

    Returns:
      '2 hosts x 8 NVIDIA H200 devices', and a warning for each host of whose GPUs some are unused.
    """
    kind, on = jax.local_devices()[0].device_kind, jax.local_devices()[0].platform
    own = [socket.gethostname(), jax.local_device_count(), on == 'gpu', _offered()]
    return _described(kind, [json.loads(text) for text in gather_texts(json.dumps(own))])


def _described(kind: str, processes: list[list]) -> tuple[str, list[str]]:
    """The words of `describe_devices`.

    Args:
      kind: of the devices.
      processes: of each, the name of its host, its devices, whether they are GPUs, and the GPUs
        of the host that the run may use.
    """
    used: dict[str, int] = {}
    offered: dict[str, int] = {}
    for host, devices, gpus, free in processes:
        used[host] = used.get(host, 0) + (devices if gpus else 0)
        offered[host] = max(offered.get(host, 0), free)
    counts = sorted({devices for _, devices, _, _ in processes})
    each = ' or '.join(map(str, counts)) + f' {kind} device{"s" if counts != [1] else ""}'
    if len(processes) == 1:
        text = each
    elif len(used) == len(processes):
        text = f'{len(used)} hosts x {each}'
    else:
        text = f'{len(processes)} processes x {each} on {len(used)} host{"s"[: len(used) - 1]}'
    warnings = [
        f'warning: {host} has {offered[host]} GPUs for this run, which uses {count}: '
        + (
            'start one process a host, or one a GPU'
            if count
            else 'install JAX for them (requirements.txt), or set JAX_PLATFORMS=cpu if it is meant'
        )
        for host, count in used.items()
        if count < offered[host]
    ]
    return text, warnings


def _offered() -> int:
    """GPUs of this host that the run may use; 0 if it is told to use none."""
    asked = _platforms_asked()
    if asked and not {'gpu', 'cuda', 'rocm'} & set(asked.split(',')):
        return 0
    share, (visible, on_host) = find_share(), count_gpus()
    if share.gpus is not None:
        return share.gpus
    # With one process, those that are hidden from it are hidden on purpose.
    return visible if share.tasks == 1 else on_host


def _platforms_asked() -> str:
    """JAX_PLATFORMS, or what a program has set in its place."""
    return getattr(jax.config, 'jax_platforms', None) or ''
