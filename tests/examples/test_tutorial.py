"""examples/tutorial.ipynb, executed from top to bottom."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT, process_environment

NOTEBOOK = ROOT / 'examples' / 'tutorial.ipynb'


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tutorial(tmp_path):
    """Every cell runs, and pretraining and fine-tuning give what the text says."""
    cells = json.loads(NOTEBOOK.read_text())['cells']
    code = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    assert code.count('STEPS = 120') == 1
    # A tenth of the steps: this tests that the notebook works, not its numbers.
    script = tmp_path / 'tutorial.py'
    script.write_text(code.replace('STEPS = 120', 'STEPS = 20') + CHECKS)
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=process_environment(1) | {'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'untrained ' in done.stdout
    assert 'test accuracy of the fine-tuned classifier' in done.stdout


CHECKS = """

assert train_features.shape == (len(train_images), 128)
assert len(run.metrics) == 1 and run.metrics[-1]['step'] == 20
assert 0.1 < before <= 1 and 0.1 < after <= 1
# 1 of 10 by chance.
assert float(loss) < 1 and tuned > 0.4
"""
