"""Reads runs from their workdirs and makes tables that compare them. Nothing read is executed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from byol_jax.app.alarms import ALARM
from byol_jax.app.lock import holder
from byol_jax.app.old_config import MISSING, completed, differences
from byol_jax.app.plan import total_steps
from byol_jax.app.records import OVER, alarms_log, metrics_log
from byol_jax.app.report.files import is_evaluation, is_results
from byol_jax.app.workdir import read_begun
from byol_jax.errors import UserError, did_you_mean
from byol_jax.files import Damaged, read_bytes, read_object

# A metric added to each record with a feature std: 1 for evenly spread projections, 0 for collapse.
# Unlike the feature std it can be compared between projections of different sizes P.
SCALED_STD = 'feature_std x sqrt(P)'

# The cell of a run that lacks the value.
NONE = '-'

# The first metrics of a table. Others follow in the order of the records.
_FIRST = (
    'loss',
    'feature_std',
    SCALED_STD,
    'rankme_projection',
    'rankme_representation',
    'knn_20',
    'knn_200',
    'online_probe_accuracy',
    'recall_1',
    'recall_5',
    'images_per_second',
    'input_wait_fraction',
)
_SHARES = ('online_probe_accuracy', 'input_wait_fraction')
_SHARE_PREFIXES = ('knn_', 'recall_', 'linear', 'probe', 'ridge')


class RunRecord(NamedTuple):
    """What the workdir of a run contains.

    Attributes:
      name: a short name, different for each run of a comparison.
      workdir: the workdir, as given.
      state: in words: finished, under way or stopped, and at which step.
      config: the resolved config, JSON values.
      examples: number of training examples; 0 if there is no data.json.
      records: the records of metrics.jsonl, oldest first, with SCALED_STD added.
      alarms: lines of alarms.jsonl.
      evaluation: content of evaluation.json; {} if there is none.
      results: content of results.json; {} if there is none.
      command: the command line that started it; '' if unknown.
      damage: what is wrong with its files, a phrase for each.
    """

    name: str
    workdir: Path
    state: str
    config: dict[str, Any]
    examples: int
    records: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    evaluation: dict[str, Any]
    results: dict[str, Any]
    command: str
    damage: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The last logged step; 0 if there is none."""
        return self.records[-1]['step'] if self.records else 0


class Row(NamedTuple):
    """A heading, and a cell for each run."""

    heading: str
    cells: tuple[str, ...]


class Table(NamedTuple):
    """Rows under a title.

    Attributes:
      title: title above the rows.
      note: how to read the rows, a sentence or ''.
      rows: the rows; may be empty if there is a note.
    """

    title: str
    note: str
    rows: list[Row]


def read_runs(workdirs: Sequence[Path]) -> list[RunRecord]:
    """Reads runs to compare, and writes nothing.

    Args:
      workdirs: workdirs of two or more runs.

    Raises:
      UserError: there are fewer than two, one is given twice, or one is no workdir or is damaged.
    """
    for workdir in workdirs:
        _check_is_run(workdir)
    seen: dict[Path, Path] = {}
    for workdir in workdirs:
        same = seen.setdefault(workdir.resolve(), workdir)
        if same is not workdir:
            raise UserError(
                f'--workdirs has {workdir} twice'
                + (f', as {same} too' if same != workdir else '')
                + ': give each run once.'
            )
    if len(workdirs) < 2:
        given = f'only {workdirs[0]}' if workdirs else 'no run'
        others = _runs_in(workdirs[0].resolve().parent) if workdirs else []
        beside = [p.name for p in others if p.resolve() not in seen]
        raise UserError(
            f'--mode=compare needs two or more runs; --workdirs names {given}.'
            + (f' Beside it: {_some(beside)}.' if beside else '')
            + ' Write --workdirs=A,B.'
        )
    return [
        _read_run(workdir, name) for workdir, name in zip(workdirs, names(workdirs), strict=True)
    ]


def names(workdirs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as make the names unique."""
    parts = [workdir.resolve().parts for workdir in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        found = ['/'.join(p[-count:]) for p in parts]
        if len(set(found)) == len(found):
            break
    return found


def _check_is_run(workdir: Path) -> None:
    if not workdir.is_dir():
        near = [str(p) for p in _folders(workdir.parent)] + [str(p) for p in _runs_in(Path('runs'))]
        what = 'is no folder' if workdir.exists() else 'does not exist'
        raise UserError(f'--workdirs: {workdir} {what}.{did_you_mean(str(workdir), near)}')
    if not any((workdir / name).exists() for name in ('config.json', 'identity.json')):
        inside = [str(p) for p in _runs_in(workdir)]
        raise UserError(
            f'--workdirs: {workdir} holds no run: there is no config.json in it. '
            + (
                f'It contains runs: {_some(inside)}; give one of them.'
                if inside
                else 'Give the folder that was the --workdir of a run (by default '
                'runs/<config name>).'
            )
        )


def _read_run(workdir: Path, name: str) -> RunRecord:
    begun = read_begun(workdir)
    assert begun is not None
    config, examples = begun.config, begun.data.get('examples', 0)
    try:
        channels = int(config['projector']['output_size'])
        total = total_steps(
            config['total_epochs'], config['total_steps'], config['batch_size'], examples
        )
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f'{workdir / "config.json"} is not the config of a run of byol_jax: {error} is missing '
            'or no value of its kind.'
        ) from error
    metrics, alarms = metrics_log(workdir), alarms_log(workdir)
    for record in metrics.records:
        if 'feature_std' in record:
            record[SCALED_STD] = record['feature_std'] * channels**0.5
    damage = [f'{log.path.name}: {log.wrong}' for log in (metrics, alarms) if log.wrong]
    return RunRecord(
        name,
        workdir,
        _state(workdir, metrics.records[-1]['step'] if metrics.records else 0, total),
        config,
        examples,
        metrics.records,
        alarms.records,
        _read(workdir / 'evaluation.json', is_evaluation, damage),
        _read(workdir / 'results.json', is_results, damage),
        _command(workdir / 'command.txt', damage),
        (*(f'{each.path.name}: {each.what}' for each in begun.damage), *damage),
    )


def _read(path: Path, sound: Callable[[Any], bool], damage: list[str]) -> dict[str, Any]:
    """A sound object in a file; {} if there is none, and what is wrong goes to `damage`."""
    try:
        content = read_object(path)
        if content is not None and not sound(content):
            raise Damaged(path, 'it is not what byol_jax writes there')
    except Damaged as error:
        damage.append(f'{path.name}: {error.what}')
        return {}
    return content or {}


def _command(path: Path, damage: list[str]) -> str:
    try:
        content = read_bytes(path) or b''
    except Damaged as error:
        damage.append(f'{path.name}: {error.what}')
        return ''
    return content.decode(errors='backslashreplace').strip()


def _state(workdir: Path, step: int, total: int) -> str:
    of = f'step {step:,}' if step else 'no step logged yet'
    # The total is unknown if the length is given in epochs and data.json is missing.
    of += f' of {total:,}' if total else ''
    # The lock itself is not touched: a run that starts now must get it.
    found = holder(workdir)
    if found is not None and found.alive:
        return f'under way: {of}'
    if found is not None:
        return f'under way on {found.host}, or killed there: {of}'
    if total and step >= total and (workdir / 'encoder' / 'encoder.json').exists():
        return f'finished: {of}'
    return f'stopped: {of}'


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []


def _runs_in(parent: Path) -> list[Path]:
    return [p for p in _folders(parent) if (p / 'config.json').exists()]


def _some(names: Sequence[str]) -> str:
    shown = ', '.join(names[:8])
    return f'{shown} and {len(names) - 8} more' if len(names) > 8 else shown


def tables(runs: Sequence[RunRecord]) -> list[Table]:
    """All tables that have content, in the order of the page."""
    made = [
        _overview(runs),
        _configs(runs),
        _last_values(runs),
        _at_the_same_step(runs),
        _before_and_after(runs),
        _evaluations(runs),
        _alarms(runs),
    ]
    return [table for table in made if table.rows or table.note]


def metric_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that any record has, in the order in which tables show them."""
    found = dict.fromkeys(name for record in records for name in record)
    first = [name for name in _FIRST if name in found]
    return first + [name for name in found if name not in (*first, 'step', 'epoch')]


def per_epoch_differs(runs: Sequence[RunRecord]) -> bool:
    """Whether the runs differ in the number of steps per epoch."""
    return len({(run.config['batch_size'], run.examples) for run in runs}) > 1


def show(name: str, value: Any) -> str:
    """Formats the value of a metric briefly."""
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name in _SHARES or name.startswith(_SHARE_PREFIXES):
        return f'{value:.1%}'
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f'{value:,.0f}'
    # These are near 1, where four digits would hide the differences.
    return f'{value:.6f}' if name == 'tau' or name.endswith('cosine') else f'{value:#.4g}'


def _rows(
    runs: Sequence[RunRecord], headings: Iterable[str], cell: Callable[[RunRecord, str], str]
) -> list[Row]:
    return [Row(heading, tuple(cell(run, heading) for run in runs)) for heading in headings]


def _overview(runs: Sequence[RunRecord]) -> Table:
    def cell(run: RunRecord, heading: str) -> str:
        if heading == 'state':
            return run.state
        if heading == 'epochs seen':
            return show('', run.records[-1].get('epoch')) if run.records else NONE
        return f'{run.examples:,}' if run.examples else NONE

    damage = [f'{run.name}: {"; ".join(run.damage)}.' for run in runs if run.damage]
    note = f'Damaged files, left out or in part: {" ".join(damage)}' if damage else ''
    return Table('Runs', note, _rows(runs, ('state', 'epochs seen', 'training examples'), cell))


def _configs(runs: Sequence[RunRecord]) -> Table:
    # Completed, or a run of an older version would differ in every renamed or added key.
    differing = differences([completed(run.config) for run in runs])
    rows = [
        Row(key, tuple(NONE if value is MISSING else _config_value(value) for value in values))
        for key, values in differing.items()
    ]
    note = 'All other keys are the same.' if rows else 'The configs are the same.'
    return Table('Config', note, rows)


def _config_value(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def _last_values(runs: Sequence[RunRecord]) -> Table:
    def cell(run: RunRecord, name: str) -> str:
        for record in reversed(run.records):
            if name in record:
                late = record['step'] != run.step
                return show(name, record[name]) + late * f' (step {record["step"]:,})'
        return NONE

    names = metric_names(record for run in runs for record in run.records)
    notes = [f'{SCALED_STD} is healthy from 0.74 to 1; 0 is collapse.'] if names else []
    if len({run.config['batch_size'] for run in runs}) > 1:
        notes.append('Compare RankMe only between runs of the same batch size.')
    if names and any(not run.records for run in runs):
        without = ', '.join(run.name for run in runs if not run.records)
        notes.append(f'No step is logged yet: {without}.')
    note = ' '.join(notes) if names else 'No step is logged yet.'
    return Table('Last values', note, _rows(runs, names, cell))


def _at_the_same_step(runs: Sequence[RunRecord]) -> Table:
    """Values at the last step (or epoch) that all runs with records have reached.

    Empty if all of them are equally far, or if fewer than two have a record up to there.
    """
    axis = 'epoch' if per_epoch_differs(runs) else 'step'
    last = [run.records[-1][axis] for run in runs if axis in (run.records or [{}])[-1]]
    if len(set(last)) < 2:
        return Table('', '', [])
    common = min(last)
    reached = [[r for r in run.records if r.get(axis, common) <= common] for run in runs]
    records = [found[-1] if found else {} for found in reached]
    if sum(map(bool, records)) < 2:
        return Table('', '', [])
    rows = [
        Row(name, tuple(show(name, record.get(name)) for record in records))
        for name in ('step', *metric_names(records))
    ]
    note = 'The last record of each run up to the point that all runs with records have reached.'
    return Table(f'At {axis} {show("", common)}', note, rows)


def _before_and_after(runs: Sequence[RunRecord]) -> Table:
    def cell(run: RunRecord, heading: str) -> str:
        results = run.results.get('results', [])
        when, _, name = heading.partition(', ')
        # One row only: what the run started from is not known any more.
        if not results or (when == 'before' and len(results) < 2):
            return NONE
        result = results[0 if when == 'before' else -1]
        key, metric = {
            'encoder': ('name', ''),
            'nearest neighbours': ('accuracy', 'knn_'),
            'feature std': ('feature_std', 'feature_std'),
        }[name]
        return show(metric, result.get(key))

    headings = [
        f'{when}, {what}'
        for what in ('encoder', 'nearest neighbours', 'feature std')
        for when in ('before', 'after')
    ]
    if not any(run.results for run in runs):
        return Table('', '', [])
    return Table('Before and after training', _protocols(runs), _rows(runs, headings, cell))


def _protocols(runs: Sequence[RunRecord]) -> str:
    found = list(dict.fromkeys(r.results['protocol'] for r in runs if r.results.get('protocol')))
    if len(found) == 1:
        return found[0]
    return 'Measured in different ways: ' + ' / '.join(found) if found else ''


def _evaluations(runs: Sequence[RunRecord]) -> Table:
    names = metric_names(run.evaluation.get('metrics', {}) for run in runs)
    if not names:
        return Table('', '', [])
    rows = _rows(
        runs,
        ('step',),
        lambda run, name: show(name, run.evaluation.get(name)),
    ) + _rows(
        runs,
        names,
        lambda run, name: show(name, run.evaluation.get('metrics', {}).get(name)),
    )
    data = [run.evaluation.get('data') for run in runs if run.evaluation]
    alike = all(each == data[0] for each in data)
    note = '' if alike else 'Measured on different data, see evaluation.json of each run.'
    return Table('Evaluation', note, rows)


def _alarms(runs: Sequence[RunRecord]) -> Table:
    def cell(run: RunRecord, name: str) -> str:
        lines = [alarm for alarm in run.alarms if alarm['name'] == name]
        raised = [alarm for alarm in lines if alarm['severity'] != OVER]
        if not raised:
            return NONE
        worst = next((a for a in raised if a['severity'] == ALARM), raised[0])['severity']
        over = lines[-1]['severity'] == OVER
        end = f' to {lines[-1]["step"]:,}' if over else ', and stands'
        return f'{worst} from step {raised[0]["step"]:,}{end}'

    names = list(dict.fromkeys(alarm['name'] for run in runs for alarm in run.alarms))
    note = '' if names else 'No alarm was raised in any run.'
    return Table('Alarms', note, _rows(runs, names, cell))
