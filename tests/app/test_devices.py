"""The devices that a run has, in words."""

from __future__ import annotations

import jax
import pytest

from byol_jax.app import devices
from byol_jax.errors import UserError


def processes(*each: tuple[str, int, int]) -> list[list]:
    """What each process tells: host, its GPUs, and those of the host that the run may use."""
    return [[host, count, True, free] for host, count, free in each]


@pytest.mark.parametrize(
    ('told', 'expected'),
    [
        (processes(('a', 1, 1)), '1 H200 device'),
        (processes(('a', 8, 8)), '8 H200 devices'),
        (processes(*((h, 8, 8) for h in 'abcd')), '4 hosts x 8 H200 devices'),
        (
            processes(*((h, 1, 2) for h in 'aabb')),
            '4 processes x 1 H200 device on 2 hosts',
        ),
        (processes(('a', 1, 2), ('a', 1, 2)), '2 processes x 1 H200 device on 1 host'),
    ],
)
def test_hosts_and_devices(told, expected):
    """Hosts times devices; processes where a host has several."""
    assert devices._described('H200', told) == (expected, [])


def test_unused_gpus_are_named():
    """A host that has more GPUs than the run uses is named, with what to do."""
    told = [*processes(('a', 1, 8), ('b', 8, 8)), ['c', 4, False, 2]]
    _, (first, second) = devices._described('H200', told)
    assert first.startswith('warning: a has 8 GPUs for this run, which uses 1: start one process')
    assert second.startswith('warning: c has 2 GPUs for this run, which uses 0: install JAX')


@pytest.mark.parametrize(
    ('asked', 'error', 'words'),
    [
        ('cuda', AssertionError(), ['JAX_PLATFORMS=cuda', 'not installed', 'JAX_PLATFORMS=cpu']),
        (
            'cpuu',
            RuntimeError("Unable to initialize backend 'cpuu': no such thing. (set JAX_PLATFORMS"),
            ['JAX_PLATFORMS=cpuu', "Did you mean 'cpu'?", 'no such thing. Did'],
        ),
        ('', RuntimeError('no GPU\nmore'), ['JAX finds no device: no GPU']),
    ],
)
def test_platforms_that_are_not_there(monkeypatch, asked, error, words):
    """What JAX does not find is one line that says the way out."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(jax, 'local_devices', fail)
    monkeypatch.setattr(devices, '_platforms_asked', lambda: asked)
    with pytest.raises(UserError) as caught:
        devices.check_devices()
    assert '\n' not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_devices_are_found():
    """Where JAX has devices nothing is said."""
    devices.check_devices()
    text, warnings = devices.describe_devices()
    assert text == '4 cpu devices'
    assert warnings == []
