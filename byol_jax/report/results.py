"""results.json: the table of a run's encoder before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from byol_jax.files import write_whole
from byol_jax.report.page import Result


def write_results(workdir: Path, results: Sequence[Result], protocol: str) -> None:
    """Writes `workdir/results.json`: `protocol`, a sentence, and `results`, the table's rows."""
    content = {'protocol': protocol, 'results': [result._asdict() for result in results]}
    text = json.dumps(content, indent=2) + '\n'
    write_whole(workdir / 'results.json', lambda partial: partial.write_text(text))
