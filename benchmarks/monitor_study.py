"""Measures which label-free monitors predict an encoder's quality, by rank correlation over runs.

    python benchmarks/monitor_study.py --train=train.npz --test=test.npz --runs=DIR --output=docs

Trains configs/cifar10.py:cpu once for each of RUNS, for `--epochs` epochs, and measures each
encoder with the labels of the test set. Runs that are finished are not repeated. Then writes

  OUTPUT/monitor_study.svg   a small scatter plot of each monitor: its last value, and kNN accuracy
  OUTPUT/monitor_study.json  the numbers of all runs, and the correlations

and prints both as Markdown tables. A correlation is Spearman's rho over runs between a monitor's
last value and an accuracy, with the 95 % interval of 10,000 bootstrap samples of the runs.
`--only=NAME,NAME` makes only these runs and writes nothing.
"""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from absl import app, flags

_ROOT = Path(__file__).resolve().parent.parent

_TRAIN = flags.DEFINE_string('train', None, 'The .npz to train on.', required=True)
_TEST = flags.DEFINE_string('test', None, 'The .npz to measure on.', required=True)
_RUNS = flags.DEFINE_string('runs', None, 'Folder of the workdirs.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the picture and the figures.')
_EPOCHS = flags.DEFINE_float('epochs', 2.0, 'Length of a run.')
_ONLY = flags.DEFINE_list('only', [], 'Names of runs to make; the others are left alone.')

_VIEWS = ('views.view1', 'views.view2')
_COLOURS = ('jitter', 'gray', 'solarize')

# The changes to the config that all runs share.
BASE = ('warmup_epochs=0.5', 'optimizer.base_learning_rate=4.0', 'target.tau_base=0.9')

# The further changes of each run.
RUNS: dict[str, tuple[str, ...]] = {
    'base': (),
    'learning rate / 20': ('optimizer.base_learning_rate=0.2',),
    'learning rate / 4': ('optimizer.base_learning_rate=1.0',),
    'learning rate x 3': ('optimizer.base_learning_rate=12.0',),
    'learning rate x 25': ('optimizer.base_learning_rate=100.0',),
    'AdamW 2e-3': ('optimizer.name=adamw', 'optimizer.base_learning_rate=2e-3'),
    'tau 0': ('target.tau_base=0.0',),
    'tau 0.99': ('target.tau_base=0.99',),
    'tau 0.999': ('target.tau_base=0.999',),
    'no colours': tuple(f'{view}.{key}=0.0' for view in _VIEWS for key in _COLOURS),
    'no crops': tuple(f'{view}.crop_area=(0.9,1.0)' for view in _VIEWS),
    'small crops': tuple(f'{view}.crop_area=(0.05,0.3)' for view in _VIEWS),
}

# The monitors that need no labels: where the last value is, and 1 if more is better, else -1.
MONITORS: dict[str, tuple[str, int]] = {
    'loss': ('record', -1),
    'feature_std': ('record', 1),
    'representation_std': ('record', 1),
    'rankme_projection': ('record', 1),
    'rankme_representation': ('record', 1),
    'alignment': ('record', -1),
    'uniformity': ('record', -1),
    'prediction_projection_cosine': ('record', 1),
    'lidar': ('record', 1),
    'rankme': ('evaluation', 1),
    'recall_1': ('evaluation', 1),
}
ACCURACIES = ('knn_200', 'knn_20', 'ridge')
_SAMPLES = 10_000


def main(_: list[str]) -> None:
    unknown = [name for name in _ONLY.value if name not in RUNS]
    if unknown:
        sys.exit(f'--only={",".join(unknown)}: the runs are {", ".join(RUNS)}.')
    for name in _ONLY.value or RUNS:
        _make(name)
    if _ONLY.value:
        return
    if _OUTPUT.value is None:
        sys.exit('--output is missing: the folder of the picture and the figures.')
    output = Path(_OUTPUT.value).expanduser()
    runs = {name: _figures(_workdir(name)) for name in RUNS}
    correlations = {monitor: _correlate(runs, monitor) for monitor in MONITORS}
    (output / 'monitor_study.svg').write_text(_picture(runs, correlations), encoding='utf-8')
    study = {'epochs': _EPOCHS.value, 'runs': runs, 'correlations': correlations}
    (output / 'monitor_study.json').write_text(json.dumps(study, indent=2) + '\n', encoding='utf-8')
    print(_tables(runs, correlations))


def _workdir(name: str) -> Path:
    return Path(_RUNS.value).expanduser() / ''.join(c if c.isalnum() else '_' for c in name)


def _make(name: str) -> None:
    """Trains and measures one run in separate processes, as a user would."""
    workdir = _workdir(name)
    start = [sys.executable, str(_ROOT / 'main.py'), f'--config={_ROOT}/configs/cifar10.py:cpu']
    start += [f'--workdir={workdir}', f'--config.data.path={_TRAIN.value}']
    start += [f'--config.evaluate.data_path={_TEST.value}']
    if not (workdir / 'encoder').exists():
        flags_of_run = (
            f'total_epochs={_EPOCHS.value}',
            'evaluate.every_epochs=0.0',
            # LiDAR is then measured at the last step, which is always logged.
            'log.lidar_every_steps=1',
            'log.every_steps=1000000',
            *BASE,
            *RUNS[name],
        )
        print(f'training: {name}', flush=True)
        subprocess.run([*start, *(f'--config.{flag}' for flag in flags_of_run)], check=True)
    if not (workdir / 'evaluation.json').exists():
        print(f'measuring: {name}', flush=True)
        protocols = "--config.evaluate.protocols=('knn','ridge','spectrum','retrieval')"
        subprocess.run([*start, '--mode=evaluate', protocols], check=True)


def _figures(workdir: Path) -> dict[str, float]:
    records = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    last = json.loads(records[-1])
    measured = json.loads((workdir / 'evaluation.json').read_text(encoding='utf-8'))['metrics']
    sources: dict[str, dict[str, Any]] = {'record': last, 'evaluation': measured}
    figures = {monitor: sources[source][monitor] for monitor, (source, _) in MONITORS.items()}
    return figures | {accuracy: measured[accuracy] for accuracy in ACCURACIES}


def _correlate(runs: dict[str, dict[str, float]], monitor: str) -> dict[str, Any]:
    """Spearman's rho with each accuracy, and its interval; 1 is a perfect monitor."""
    sign = MONITORS[monitor][1]
    x = sign * np.array([run[monitor] for run in runs.values()])
    rng = np.random.default_rng(0)
    samples = rng.integers(0, len(x), (_SAMPLES, len(x)))
    found: dict[str, Any] = {}
    for accuracy in ACCURACIES:
        y = np.array([run[accuracy] for run in runs.values()])
        several = [s for s in samples if np.ptp(x[s]) > 0 and np.ptp(y[s]) > 0]
        rhos = [scipy.stats.spearmanr(x[s], y[s]).statistic for s in several]
        low, high = np.percentile(rhos, (2.5, 97.5))
        rho = scipy.stats.spearmanr(x, y).statistic
        found[accuracy] = [round(float(value), 3) for value in (rho, low, high)]
    return found


def _tables(runs: dict[str, dict[str, float]], correlations: dict[str, Any]) -> str:
    lines = [f'| monitor | {" | ".join(f"rho, {a}" for a in ACCURACIES)} |', '|---|---|---|---|']
    order = sorted(correlations, key=lambda monitor: -correlations[monitor][ACCURACIES[0]][0])
    for monitor in order:
        sign = 'high' if MONITORS[monitor][1] > 0 else 'low'
        cells = (
            f'{rho:+.2f} ({low:+.2f} to {high:+.2f})'
            for rho, low, high in correlations[monitor].values()
        )
        lines.append(f'| `{monitor}`, {sign} | {" | ".join(cells)} |')
    lines += ['', f'| run | {" | ".join((*ACCURACIES, *order))} |']
    lines.append('|---' * (1 + len(ACCURACIES) + len(order)) + '|')
    for name in sorted(runs, key=lambda name: -runs[name][ACCURACIES[0]]):
        figures = runs[name]
        accuracies = (f'{100 * figures[key]:.1f} %' for key in ACCURACIES)
        monitors = (f'{figures[key]:.3g}' for key in order)
        lines.append(f'| {name} | {" | ".join((*accuracies, *monitors))} |')
    return '\n'.join(lines)


def _picture(runs: dict[str, dict[str, float]], correlations: dict[str, Any]) -> str:
    """An SVG of one panel for each monitor, four in a row, best first; runs have numbers."""
    width, height, columns, left, bottom = 230, 190, 4, 40, 36
    order = sorted(correlations, key=lambda monitor: -correlations[monitor][ACCURACIES[0]][0])
    rows = -(-(len(order) + 1) // columns)
    accuracy = 100 * np.array([run[ACCURACIES[0]] for run in runs.values()])
    low, high = float(np.floor(accuracy.min())), float(np.ceil(accuracy.max()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * columns} {height * rows}" '
        'font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, monitor in enumerate(order):
        values = np.array([run[monitor] for run in runs.values()])
        across = (values - values.min()) / (np.ptp(values) or 1.0)
        x0, y0 = width * (i % columns) + left, height * (i // columns) + 22
        w, h = width - left - 14, height - 22 - bottom
        parts.append(f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{html.escape(monitor)}')
        parts.append(f' (rho {correlations[monitor][ACCURACIES[0]][0]:+.2f})</text>')
        parts.append(
            f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="none" stroke="#999"/>'
        )
        for value, y in ((high, y0 + 8), (low, y0 + h)):
            parts.append(f'<text x="{x0 - 4}" y="{y}" text-anchor="end">{value:.0f} %</text>')
        for value, x, anchor in ((values.min(), x0, 'start'), (values.max(), x0 + w, 'end')):
            parts.append(
                f'<text x="{x}" y="{y0 + h + 13}" text-anchor="{anchor}">{value:.3g}</text>'
            )
        for number, (fraction, percent) in enumerate(zip(across, accuracy, strict=True), 1):
            x = x0 + 8 + fraction * (w - 16)
            y = y0 + h - 8 - (percent - low) / (high - low) * (h - 16)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2563a8" opacity="0.75"/>')
            parts.append(f'<text x="{x + 4:.1f}" y="{y - 3:.1f}" font-size="8">{number}</text>')
    x0, y0 = width * (len(order) % columns) + left, height * (len(order) // columns) + 22
    for number, name in enumerate(runs, 1):
        parts.append(f'<text x="{x0}" y="{y0 + 10 * number}" font-size="9">{number} ')
        parts.append(f'{html.escape(name)}</text>')
    return '\n'.join([*parts, '</svg>\n'])


if __name__ == '__main__':
    app.run(main)
