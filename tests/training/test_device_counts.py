"""Any number of devices trains the same network."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_1_2_4_and_8_devices_agree():
    """Weights differ by the rounding of sums: by 1e-7 of their norm early, little after 20 steps.

    Measured: 1e-8 after 2 steps; after 20, 6e-8, or 1e-4 if rounding has switched a ReLU.
    """
    result = subprocess.run(
        [sys.executable, 'benchmarks/devices.py'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=380,
        check=True,
    )
    differences = json.loads(result.stdout)
    assert differences.keys() == {'2 devices', '4 devices', '8 devices'}
    for difference in differences.values():
        assert difference['after 2 steps'] < 1e-7
        assert 0 < difference['after 20 steps'] < 1e-3
