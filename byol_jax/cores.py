"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(proc: Path = Path('/proc/self'), root: Path = Path('/')) -> int:
    """Counts the CPU cores that this process may use: not all that the machine has.

    The affinity of the process (`taskset`, SLURM's binding) and the quota of its control groups
    (containers, systemd, SLURM) limit them. A quota of parts of a core is rounded up.

    Args:
      proc: the kernel's folder about this process.
      root: the folder that the mount points of control groups are below.

    Returns:
      At least 1.
    """
    if hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(proc, root))))


def _quota(proc: Path, root: Path) -> float:
    """Cores that the control groups of this process grant; infinite without a limit."""
    try:
        groups = (proc / 'cgroup').read_text().splitlines()
        mounts = (proc / 'mountinfo').read_text().splitlines()
    except OSError:
        # No Linux, or no /proc.
        return math.inf
    # A line of `cgroup` is number:controllers:path; the controllers of version 2 are not listed.
    paths = {}
    for line in groups:
        _, controllers, path = line.split(':', 2)
        if not controllers or 'cpu' in controllers.split(','):
            paths['cgroup' if controllers else 'cgroup2'] = path
    quota = math.inf
    for line in mounts:
        # `36 35 98:0 /inside /mount/point options - type source options of the file system`
        before, _, after = line.partition(' - ')
        inside, place = before.split()[3:5]
        kind, _, options = after.split(' ', 2)
        if kind not in paths or (kind == 'cgroup' and 'cpu' not in options.split(',')):
            continue
        top = root / place.lstrip('/')
        # A container may see only its own group, as the top of the mount.
        below = paths[kind].removeprefix(inside.rstrip('/')).lstrip('/')
        for folder in (top / below, *(top / below).parents):
            quota = min(quota, _limit(folder))
            if folder == top:
                break
    return quota


def _limit(group: Path) -> float:
    """Cores that one control group grants; infinite if it sets no limit or does not exist."""
    try:
        if (group / 'cpu.max').exists():
            granted, period = (group / 'cpu.max').read_text().split()
        else:
            granted = (group / 'cpu.cfs_quota_us').read_text().strip()
            period = (group / 'cpu.cfs_period_us').read_text().strip()
    except OSError:
        return math.inf
    return math.inf if granted in ('max', '-1') else int(granted) / int(period)
