"""The cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from byol_jax.cores import usable_cores

V1 = '4:cpu,cpuacct:{path}\n3:memory:/other\n0::/unified\n'
V1_MOUNTS = (
    '30 25 0:26 {inside} /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n'
    '31 25 0:27 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n'
    '32 25 0:28 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n'
)
V2 = '0::{path}\n'
V2_MOUNTS = '30 25 0:26 {inside} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw\n'


@pytest.fixture
def many_cores(monkeypatch):
    """A process whose affinity allows 64 cores."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(64)), raising=False)


def make_host(place: Path, groups: str, mounts: str, path='/job', inside='/') -> tuple[Path, Path]:
    """Writes what the kernel tells of a process in a control group; returns (proc, root)."""
    proc = place / 'proc'
    proc.mkdir()
    (proc / 'cgroup').write_text(groups.format(path=path))
    (proc / 'mountinfo').write_text(mounts.format(inside=inside))
    return proc, place


def limit(group: Path, quota: int, period: int = 100_000, version: int = 2) -> None:
    group.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (group / 'cpu.max').write_text(f'{"max" if quota < 0 else quota} {period}\n')
    else:
        (group / 'cpu.cfs_quota_us').write_text(f'{quota}\n')
        (group / 'cpu.cfs_period_us').write_text(f'{period}\n')


def test_affinity_counts(monkeypatch):
    """The cores of `taskset` or SLURM's binding count, not those of the machine."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {3, 9}, raising=False)
    assert usable_cores() <= 2


@pytest.mark.parametrize(
    ('version', 'groups', 'mounts', 'folder'),
    [(1, V1, V1_MOUNTS, 'sys/fs/cgroup/cpu'), (2, V2, V2_MOUNTS, 'sys/fs/cgroup')],
)
class TestQuota:
    """The quota of control groups, of either version."""

    def test_of_the_own_group(self, many_cores, tmp_path, version, groups, mounts, folder):
        """A quota of parts of a core is rounded up."""
        limit(tmp_path / folder / 'job', 250_000, version=version)
        assert usable_cores(*make_host(tmp_path, groups, mounts)) == 3

    def test_of_a_group_above(self, many_cores, tmp_path, version, groups, mounts, folder):
        """The smallest quota on the way up counts."""
        limit(tmp_path / folder / 'job' / 'step', -1, version=version)
        limit(tmp_path / folder / 'job', 400_000, version=version)
        limit(tmp_path / folder, 800_000, version=version)
        assert usable_cores(*make_host(tmp_path, groups, mounts, path='/job/step')) == 4

    def test_none(self, many_cores, tmp_path, version, groups, mounts, folder):
        """Without a limit the affinity counts."""
        limit(tmp_path / folder / 'job', -1, version=version)
        assert usable_cores(*make_host(tmp_path, groups, mounts)) == 64

    def test_in_a_container(self, many_cores, tmp_path, version, groups, mounts, folder):
        """A container sees its own group as the top of the mount."""
        limit(tmp_path / folder, 150_000, version=version)
        host = make_host(tmp_path, groups, mounts, '/docker/a1', inside='/docker/a1')
        assert usable_cores(*host) == 2

    def test_below_one_core(self, many_cores, tmp_path, version, groups, mounts, folder):
        """A tenth of a core is one worker."""
        limit(tmp_path / folder / 'job', 10_000, version=version)
        assert usable_cores(*make_host(tmp_path, groups, mounts)) == 1


def test_without_control_groups(many_cores, tmp_path):
    """Where the kernel tells of none, the affinity counts."""
    assert usable_cores(tmp_path / 'nothing', tmp_path) == 64
