"""What runs say side by side, as tables for the terminal and the page: a column a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from byol_jax.app.report.alarm import ALARM
from byol_jax.app.report.alarm_log import OVER
from byol_jax.app.report.compare_run import SCALED_STD, RunRecord
from byol_jax.app.report.config_diff import MISSING, differences

# Stands in a cell for what a run does not have.
NONE = '-'

# What is looked at first; other metrics follow as the records have them.
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


class Row(NamedTuple):
    """A heading, and a cell of each run."""

    heading: str
    cells: tuple[str, ...]


class Table(NamedTuple):
    """Rows under a title; `note`, a sentence or '', says how to read them."""

    title: str
    note: str
    rows: list[Row]


def tables(runs: Sequence[RunRecord]) -> list[Table]:
    """All tables there is something to write in, in the order to read them in."""
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
    """Metrics that any record has, in the order to show them in."""
    found = dict.fromkeys(name for record in records for name in record)
    first = [name for name in _FIRST if name in found]
    return first + [name for name in found if name not in (*first, 'step', 'epoch')]


def per_epoch_differs(runs: Sequence[RunRecord]) -> bool:
    """Whether a step is another part of an epoch in each run."""
    return len({(run.config['batch_size'], run.examples) for run in runs}) > 1


def show(name: str, value: Any) -> str:
    """The value of a metric, in few letters."""
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name in _SHARES or name.startswith(_SHARE_PREFIXES):
        return f'{value:.1%}'
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f'{value:,.0f}'
    # Near 1 these differ in what four figures would round away.
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

    return Table('Runs', '', _rows(runs, ('state', 'epochs seen', 'training examples'), cell))


def _configs(runs: Sequence[RunRecord]) -> Table:
    differing = differences([run.config for run in runs])
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
        notes.append('RankMe compares only between runs of the same batch size.')
    if names and any(not run.records for run in runs):
        without = ', '.join(run.name for run in runs if not run.records)
        notes.append(f'No step is logged yet: {without}.')
    note = ' '.join(notes) if names else 'No step is logged yet.'
    return Table('Last values', note, _rows(runs, names, cell))


def _at_the_same_step(runs: Sequence[RunRecord]) -> Table:
    """Nothing if all that have begun are equally far, or no two have a record that early."""
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
    note = 'As far as all that have begun have come: the last record of each up to there.'
    return Table(f'At {axis} {show("", common)}', note, rows)


def _before_and_after(runs: Sequence[RunRecord]) -> Table:
    def cell(run: RunRecord, heading: str) -> str:
        results = run.results.get('results', [])
        when, _, name = heading.partition(', ')
        if not results:
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
    return 'Not measured alike: ' + ' / '.join(found) if found else ''


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
    note = '' if alike else 'Not measured on the same data: evaluation.json of each says on what.'
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
    note = '' if names else 'None was raised in any run.'
    return Table('Alarms', note, _rows(runs, names, cell))
