"""results.json: the table of a run's encoder before and after training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byol_jax.files import write_whole


def write_results(workdir: Path, results: Sequence[Mapping[str, Any]], protocol: str) -> None:
    """Writes `workdir/results.json`.

    Args:
      workdir: of the run.
      results: the rows, before first: `name`, `accuracy` (in [0, 1], or None), `feature_std`.
      protocol: one sentence on how they were measured.
    """
    text = json.dumps({'protocol': protocol, 'results': list(results)}, indent=2) + '\n'
    write_whole(workdir / 'results.json', lambda partial: partial.write_text(text))
