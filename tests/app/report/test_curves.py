"""The curves of a run: every metric has one, with its level and the alarms on it."""

from __future__ import annotations

import math
import re

import pytest
from conftest import ROOT
from records import FACTS, LATE, alarm, record

from byol_jax.app.report.charts import thin
from byol_jax.app.report.curves import GROUPS, UPDATE_SHARE, draw_curves
from byol_jax.app.report.page import render
from byol_jax.app.report.run_report import Report
from byol_jax.methods.base import LossScale


def page_of(records, facts, alarms):
    curves = draw_curves(records, facts, alarms)
    return render('report.html', report=Report(curves=curves, shaded=bool(alarms)))


def test_every_monitor_has_a_curve():
    """Each metric in the tables of docs/monitors.md has a place among the curves."""
    text = (ROOT / 'docs' / 'monitors.md').read_text().split('## Alarms')[0]
    rows = [row.split('|')[1] for row in text.splitlines() if row.startswith('| `')]
    names = {name for row in rows for name in re.findall(r'`(\w+)`', row)}
    assert len(names) > 12
    assert names <= {curve.metric for group in GROUPS.values() for curve in group}


def test_curves_show_what_records_have():
    """A curve for each metric of the records, known or not; none for what they do not have."""
    records = [record(step, my_own=step / 7) for step in LATE]
    text = page_of(records, FACTS, [])
    # Each value, the invented one too, but not step and epoch.
    assert text.count('<svg') == len(records[0]) - 2 + 1
    assert '<b>my_own</b>' in text
    assert 'nearest neighbours' not in text
    records[-1]['knn_200'] = 0.5
    assert '<b>200 nearest neighbours</b>' in page_of(records, FACTS, [])
    assert 'No step is logged' in page_of([], FACTS, [])


def test_alarms_are_marked_from_raised_to_over():
    """A band covers the curves of an alarm for the time it stood."""
    alarms = [alarm('collapse', 'alarm', 120), alarm('collapse', 'over', 150)]
    text = page_of([record(step) for step in LATE], FACTS, alarms)
    bands = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)".*?</title>', text)
    assert len(bands) == 2
    # The axis spans steps 0 to 190 over 270 units, from 54 on.
    left, width = map(float, bands[0])
    assert left == pytest.approx(54 + 270 * 120 / 190, abs=0.1)
    assert width == pytest.approx(270 * 30 / 190, abs=0.1)
    assert '<rect' not in page_of([record(step) for step in LATE], FACTS, [])


def test_an_alarm_that_comes_and_goes_is_one_band():
    """1,000 short alarms side by side do not make the page large."""
    lines = [
        alarm('trivial_loss', severity, 10 * n)
        for n, severity in enumerate(['alarm', 'over'] * 1000, 1)
    ]
    records = [record(step) for step in range(10, 20_010, 10)]
    assert page_of(records, FACTS, lines).count('<rect') == 2


def test_long_runs_stay_small():
    """The curves of 20,000 records take less than 500 KB and lose no spike."""
    records = [record(step, gradient_norm=1 + math.sin(step)) for step in range(10, 200_010, 10)]
    records[7_777]['gradient_norm'] = 100.0
    text = page_of(records, FACTS, [])
    assert len(text) < 500_000
    points = [(r['step'], r['gradient_norm']) for r in records]
    assert max(thin(points), key=lambda point: point[1]) == points[7_777]


def test_update_share_is_drawn():
    """How far a step moves the weights is a curve of two metrics: 0.1 of 50."""
    text = page_of([record(step) for step in LATE], FACTS, [])
    assert UPDATE_SHARE not in text
    assert re.search(r'<b>Update / weights</b><b class="latest">0\.002</b>', text)


def test_the_loss_has_the_scale_of_the_method():
    """Range and level of chance are the method's; an axis starts at 0 only if the loss does."""
    late = [record(step, loss=-0.5) for step in LATE]
    cosine = page_of(late, FACTS._replace(loss_scale=LossScale(-1, 0, 1)), [])
    assert '<span>-1 to 1; it also falls in a collapse' in cosine
    assert '>chance: 0</text>' in cosine
    contrast = page_of(late, FACTS._replace(loss_scale=LossScale(0, 6.9, math.inf)), [])
    assert '<span>0 and more; it also falls' in contrast
    assert '>chance: 6.9</text>' in contrast
    byol = page_of([record(step) for step in LATE], FACTS, [])
    assert '<span>0 to 8; it also falls' in byol
    assert '>chance: 4</text>' in byol


def test_metrics_of_a_method_have_curves_under_their_names():
    """A method's own metrics come last; monitors that it lacks have no curve."""
    groups = draw_curves([{'step': 10, 'loss': 1.0, 'invariance': 0.3, 'a<b': 1}], FACTS, [])
    assert [group.title for group in groups] == ['Learning', 'Other']
    assert [(f.title, f.latest) for f in groups[1].figures] == [('a<b', '1'), ('invariance', '0.3')]
