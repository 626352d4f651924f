"""report.html: the verdict, the curves, the tables, and that the page suits a phone."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from byol_jax.app.plan import make_plan
from byol_jax.app.progress import Stopwatch
from byol_jax.app.report.alarm import Alarm, facts_of
from byol_jax.app.report.chart import HEIGHT, WIDTH, Level, Line, line_chart, short_number, thin
from byol_jax.app.report.curves import GROUPS, UPDATE_SHARE, curves_section
from byol_jax.app.report.neighbours import Thumbnail, neighbours_section
from byol_jax.app.report.page import again_section, facts_section, views_section, write_page
from byol_jax.app.report.pictures import data_uri
from byol_jax.app.report.results import (
    Result,
    evaluation_section,
    results_section,
)
from byol_jax.app.report.run_report import RunReport
from byol_jax.app.report.spectrum import Spectrum, spectrum_section
from byol_jax.app.report.verdict import (
    COLLAPSED,
    EARLY,
    HEALTHY,
    STOPPED,
    WATCHED,
    verdict,
    verdict_box,
)
from configs import div2k

CONFIG = div2k.get_config('sample')
PLAN = make_plan(CONFIG, 3409, 1)
FACTS = facts_of(CONFIG, PLAN)
# Steps after the warm-up of the sample run.
LATE = range(100, 200, 10)


def record(step, share=0.8, **more):
    """A record as of the healthy sample run; `share` is the feature std times sqrt(P)."""
    return {
        'step': step,
        'epoch': step / 53,
        'loss': 1.2,
        'learning_rate': 0.4,
        'tau': 0.99,
        'feature_std': share / math.sqrt(FACTS.projection_size),
        'representation_std': 0.05,
        'rankme_projection': 25.0,
        'rankme_representation': 24.0,
        'alignment': 0.6,
        'uniformity': -2.0,
        'online_target_cosine': 0.9,
        'prediction_target_cosine': 0.7,
        'prediction_projection_cosine': 0.8,
        'gradient_norm': 1.0,
        'update_norm': 0.1,
        'parameter_norm': 50.0,
        'stats_spread': 0.0,
        'images_per_second': 100.0,
        'input_wait_fraction': 0.01,
        'bad_files': 0,
    } | more


def alarm(name, severity, step=110):
    words = ('', '', '') if severity == 'over' else ('seen & measured', 'a cause', 'do <this>')
    return Alarm(step, name, severity, *words)


@pytest.mark.parametrize(
    ('records', 'alarms', 'state'),
    [
        ([], [], EARLY),
        ([record(5), record(10)], [], EARLY),
        ([record(100)], [], EARLY),
        ([record(s) for s in LATE], [], HEALTHY),
        ([record(s) for s in LATE], [alarm('input_bound', 'watch')], WATCHED),
        ([record(s) for s in LATE], [alarm('learning_rate', 'alarm')], WATCHED),
        ([record(s) for s in LATE], [alarm('collapse', 'watch')], WATCHED),
        ([record(s) for s in LATE], [alarm('collapse', 'alarm')], COLLAPSED),
        ([record(s) for s in LATE], [alarm('trivial_loss', 'alarm')], COLLAPSED),
        (
            [record(s) for s in LATE],
            [alarm('collapse', 'alarm'), alarm('collapse', 'watch', 120)],
            WATCHED,
        ),
        (
            [record(s) for s in LATE],
            [alarm('collapse', 'alarm'), alarm('collapse', 'over', 120)],
            HEALTHY,
        ),
        (
            [record(s) for s in LATE],
            [alarm('collapse', 'alarm'), alarm('non_finite', 'alarm', 130)],
            STOPPED,
        ),
        ([record(10)], [alarm('non_finite', 'alarm', 12)], STOPPED),
        ([record(s, share=0.6) for s in LATE], [], WATCHED),
        ([record(s, share=0.6) for s in (20, 30)], [], HEALTHY),
    ],
    ids=[
        'nothing-logged',
        'before-step-20',
        'one-record',
        'no-alarm',
        'a-watch',
        'an-alarm-but-no-collapse',
        'collapse-as-a-watch',
        'collapse',
        'trivial-loss',
        'collapse-became-a-watch',
        'collapse-is-over',
        'not-finite',
        'not-finite-early',
        'low-std-without-alarm',
        'low-std-in-the-warm-up',
    ],
)
def test_verdict(records, alarms, state):
    """Each verdict follows from the alarms that stand and the last records, and gives reasons."""
    found = verdict(records, alarms, FACTS)
    assert found.state == state
    assert bool(found.reasons) == (state in (WATCHED, COLLAPSED, STOPPED))
    text = verdict_box(found)
    assert state in text
    for reason in found.reasons:
        assert 'What to do' in text
        assert reason.name in text
    if records:
        assert f'At step {records[-1]["step"]}' in text


def test_verdict_names_evidence_and_remedy():
    """The box has an alarm's words, escaped, the worst first, and what is over."""
    alarms = [
        alarm('input_bound', 'watch', 100),
        alarm('weight_decay', 'watch', 100),
        alarm('collapse', 'alarm', 150),
        alarm('weight_decay', 'over', 160),
    ]
    found = verdict([record(s) for s in LATE], alarms, FACTS)
    assert [reason.name for reason in found.reasons] == ['collapse', 'input_bound']
    text = verdict_box(found)
    assert 'seen &amp; measured' in text
    assert 'do &lt;this&gt;' in text
    assert 'is over: weight_decay' in text
    assert 'since step 150' in text


def test_verdict_measures_now():
    """An alarm that was raised long ago gives its reason as of the last record, and since when."""
    late = [record(step, input_wait_fraction=0.5) for step in LATE]
    (reason,) = verdict(late, [alarm('input_bound', 'watch', 40)], FACTS).reasons
    assert 'no batch for 50% of the time' in reason.evidence
    assert (reason.step, reason.severity) == (40, 'watch')


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
    text = curves_section(records, FACTS, [])
    # Each value, the made one, but not step and epoch.
    assert text.count('<svg') == len(records[0]) - 2 + 1
    assert '<b>my_own</b>' in text
    assert 'nearest neighbours' not in text
    records[-1]['knn_200'] = 0.5
    assert '<b>200 nearest neighbours</b>' in curves_section(records, FACTS, [])
    assert 'No step is logged' in curves_section([], FACTS, [])


def test_alarms_are_marked_from_raised_to_over():
    """A band lies over the curves an alarm is about, while it stood."""
    alarms = [alarm('collapse', 'alarm', 120), alarm('collapse', 'over', 150)]
    text = curves_section([record(step) for step in LATE], FACTS, alarms)
    bands = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)".*?</title>', text)
    assert len(bands) == 2
    # The axis is from step 0 to 190, across 270 units from 54 on.
    left, width = map(float, bands[0])
    assert left == pytest.approx(54 + 270 * 120 / 190, abs=0.1)
    assert width == pytest.approx(270 * 30 / 190, abs=0.1)
    assert '<rect' not in curves_section([record(step) for step in LATE], FACTS, [])


def test_an_alarm_that_comes_and_goes_is_one_band():
    """1,000 short alarms side by side do not make the page large."""
    lines = [
        alarm('trivial_loss', severity, 10 * n)
        for n, severity in enumerate(['alarm', 'over'] * 1000, 1)
    ]
    records = [record(step) for step in range(10, 20_010, 10)]
    assert curves_section(records, FACTS, lines).count('<rect') == 2


def test_long_runs_stay_small():
    """The curves of 20,000 records take less than 500 KB and lose no spike."""
    records = [record(step, gradient_norm=1 + math.sin(step)) for step in range(10, 200_010, 10)]
    records[7_777]['gradient_norm'] = 100.0
    text = curves_section(records, FACTS, [])
    assert len(text) < 500_000
    points = [(r['step'], r['gradient_norm']) for r in records]
    assert max(thin(points), key=lambda point: point[1]) == points[7_777]


def test_thin_keeps_ends_and_extremes():
    """At most as many points as asked for, in order, with both ends, the lowest and highest."""
    values = np.random.default_rng(0).normal(size=5_003)
    points = [(float(i), float(v)) for i, v in enumerate(values)]
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert {points[0], points[-1], points[values.argmin()], points[values.argmax()]} <= set(kept)
    assert thin(points[:100], 100) == points[:100]


@pytest.mark.parametrize(
    ('points', 'options'),
    [
        ([(1, 2.0), (2, 3.0), (3, -1.0)], {}),
        ([(5, 0.25)], {}),
        ([(1, 7.0), (2, 7.0)], {}),
        ([(1, 0.0), (2, 0.0)], {'from_zero': True}),
        ([(0, 1e-9), (1, 3e-9)], {'from_zero': True}),
        ([(1, 1.0), (400, 1e-6)], {'log': True}),
        ([(1, 2.0), (2, 3.0)], {'levels': [Level(40.0, 'far')]}),
        ([(10_000, 123_456.0), (2_000_000, 3e6)], {}),
    ],
    ids=['plain', 'one-point', 'constant', 'zeros', 'tiny', 'log', 'level', 'large'],
)
def test_charts_stay_in_their_frame(points, options):
    """Lines, levels, ticks and their words lie within the drawing; each axis has two ticks."""
    text = line_chart([Line(points)], x_label='step', **options)
    drawn = re.findall(r'points="([^"]+)"', text) or [
        ','.join(re.search(r'cx="([\d.]+)" cy="([\d.]+)"', text).groups())
    ]
    places = [tuple(map(float, pair.split(','))) for pair in drawn[0].split()]
    assert len(places) == len(points)
    places += [
        tuple(map(float, p)) for p in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"', text)
    ]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', text)
    assert len(set(labels)) >= 2
    # Higher values are drawn higher.
    if len({y for _, y in points}) > 1:
        highest = max(range(len(points)), key=lambda i: points[i][1])
        assert places[highest][1] == min(y for _, y in places[: len(points)])


def test_short_numbers():
    """Numbers beside the curves are short, and right."""
    values = (1_234_567, 12_345, 0.068_83, 3e-7, 42.04, 0)
    assert [*map(short_number, values)] == ['1.235M', '12.35k', '0.0688', '3e-07', '42', '0']


def test_update_share_is_drawn():
    """How far a step moves the weights is a curve of two metrics: 0.1 of 50."""
    text = curves_section([record(step) for step in LATE], FACTS, [])
    assert UPDATE_SHARE not in text
    assert re.search(r'<b>Step / weights</b><b class="latest">0\.002</b>', text)


def test_evaluation_table(tmp_path):
    """evaluation.json and the last evaluation during training are shown; other files are named."""
    assert evaluation_section(tmp_path, [record(10)]) == ''
    probed = record(30, online_probe_accuracy=0.875)
    records = [record(10, knn_200=0.5), record(20, knn_200=0.625, recall_1=0.25), probed]
    text = evaluation_section(tmp_path, records)
    assert '62.5%' in text
    assert '25.0%' in text
    assert 'last at step 20' in text
    assert '87.5%' in text
    assert 'last at step 30' in text
    evaluation = {
        'encoder': 'runs/<x>/encoder',
        'weights_sha256': 'ab' * 32,
        'step': 320,
        'data': {},
        'metrics': {'knn_200': 0.8125, 'kmeans_nmi': 0.4321, 'rankme': 21.5},
    }
    (tmp_path / 'evaluation.json').write_text(json.dumps(evaluation))
    text = evaluation_section(tmp_path, [])
    for part in ('81.2%', '0.4321', '21.5', 'runs/&lt;x&gt;/encoder', 'step 320', 'abababababab'):
        assert part in text
    for foreign in ('[1]', '{"metrics": 3}', 'no json'):
        (tmp_path / 'evaluation.json').write_text(foreign)
        assert 'is not what --mode=evaluate writes' in evaluation_section(tmp_path, [])


def test_names_that_are_no_utf8_are_shown(tmp_path):
    """A file or class folder may have any bytes in its name: the page is written all the same."""
    name = b'caf\xe9.png'.decode(errors='surrogateescape')
    write_page(tmp_path / 'report.html', 'BYOL', [f'<p>{name}</p>'])
    assert r'<p>caf\udce9.png</p>' in (tmp_path / 'report.html').read_text(encoding='utf-8')


def test_spectrum_names_rankme():
    """Both spectra are drawn, over their largest value, with RankMe: equal values use all."""
    spectra = [Spectrum('before', np.full(8, 3.0)), Spectrum('after', np.array([2.0, 0, 0, 0]))]
    text = spectrum_section(spectra, 100)
    assert 'before: RankMe 8.0 of 8; after: RankMe 1.0 of 4' in text
    assert text.count('<polyline') == 1
    assert text.count('<circle') == 1


class Elements(HTMLParser):
    """Every element of a page with the classes of those around it."""

    def __init__(self, text):
        super().__init__()
        self.around, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found.append((tag, attributes, [*self.around]))
        if tag not in ('img', 'br', 'meta', 'path', 'rect'):
            self.around.append(attributes.get('class', ''))

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), [*self.around]))

    def handle_endtag(self, tag):
        self.around.pop()


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """A page with every section."""
    folder = tmp_path_factory.mktemp('page')
    picture = Image.new('RGB', (600, 400), 'red')
    thumbnail = Thumbnail(picture.resize((96, 64)), '0.93', True)
    write_page(
        folder / 'report.html',
        'A <run>',
        [
            verdict_box(verdict([record(s) for s in LATE], [alarm('collapse', 'alarm')], FACTS)),
            results_section([Result('x' * 80, 0.5, 0.03)], 'How it was measured.'),
            facts_section({'Encoder': 'resnet18'}),
            curves_section([record(s) for s in LATE], FACTS, []),
            views_section(data_uri(picture)),
            neighbours_section([(thumbnail, [thumbnail] * 6)]),
            again_section('python main.py ' + '--config.x=y ' * 20, {'a': 1}),
        ],
    )
    return (folder / 'report.html').read_text()


def test_page_loads_nothing(page):
    """No script, no style sheet, no address but data: ones; the title is escaped."""
    assert '<h1>A &lt;run&gt;</h1>' in page
    for tag, attributes, _ in Elements(page).found:
        assert tag not in ('script', 'link', 'iframe', 'object')
        for name in ('src', 'href', 'xlink:href', 'data', 'srcset'):
            assert attributes.get(name, 'data:').startswith('data:')
    assert 'url(' not in page
    assert '@import' not in page


def test_page_fits_a_phone(page):
    """Nothing has a width that 360 pixels cannot hold but what scrolls by itself."""
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    for tag, attributes, around in Elements(page).found:
        if tag in ('table', 'img') and attributes.get('class') != 'wide':
            within = {word for words in around for word in words.split()}
            assert within & {'scroll', 'neighbours'}, (tag, attributes)
        if tag in ('div', 'img', 'table', 'pre', 'svg', 'figure', 'section'):
            assert 'width' not in attributes
            assert 'width' not in attributes.get('style', '')
    style = page[page.index('<style>') : page.index('</style>')]
    assert '.scroll { overflow-x: auto; }' in style
    for selector, rules in re.findall(r'([^{}]+)\{([^}]*)\}', style):
        for name, value in re.findall(r'([\w-]*width|minmax\()[:\s]*([^;]+)', rules):
            sizes = [float(n) * (16 if u == 'rem' else 1) for n, u in _sizes(value)]
            bounded = name == 'max-width' or 'min(100%' in value or 'img.map' in selector
            assert bounded or all(size <= 320 for size in sizes), (selector, name, value)
    # Words are never below 12 pixels but within charts, which are drawn at their own size.
    letters = re.findall(r'([^{}]+)\{[^}]*font-size: ([\d.]+)(rem|px)', style)
    assert all(float(n) * (16 if u == 'rem' else 1) >= 12 or '.chart' in s for s, n, u in letters)


def _sizes(value):
    return re.findall(r'([\d.]+)(rem|px)', value)


@pytest.fixture
def live(tmp_path):
    """A report of the sample run, in a workdir of its own."""
    Image.new('RGB', (30, 20)).save(tmp_path / 'views.png')
    run = SimpleNamespace(
        config=CONFIG,
        plan=PLAN,
        data=SimpleNamespace(small=(), held_out=range(7)),
        training=SimpleNamespace(origin=''),
    )
    return RunReport(run, tmp_path, 'python main.py --config=<this>')


def log(workdir, *records):
    with (workdir / 'metrics.jsonl').open('a') as file:
        file.writelines(json.dumps(each) + '\n' for each in records)


def test_report_of_a_run_under_way(live, tmp_path):
    """It says how far the run is and what is known; it goes on where another start left it."""
    path = tmp_path / 'report.html'
    live.begin(0)
    assert 'Starting at step 0 of 320' in path.read_text()
    assert 'too early to say' in path.read_text()
    watch = Stopwatch(PLAN, 10)
    log(tmp_path, record(20), record(30), record(40))
    watch.lap(40)
    live.update(40, watch)
    text = path.read_text()
    for part in ('Under way: step 40 of 320 (12%)', ' left.', 'reload this page', 'View pairs'):
        assert part in text
    for part in (
        '<p class="state">healthy</p>',
        '<b>Loss</b>',
        '--config=&lt;this&gt;',
        'warmup_steps',
    ):
        assert part in text
    live.show(['<p>found at 40</p>'])
    live.update(50, watch)
    live.stopped('killed')
    assert '<p>found at 40</p>' in path.read_text()
    again = RunReport(live._run, tmp_path, 'again')
    again.begin(40)
    assert 'Starting at step 40' in path.read_text()
    assert '<b>Loss</b>' in path.read_text()
    again.stopped('SIGTERM & more')
    assert 'Stopped: SIGTERM &amp; more' in path.read_text()
    again.finished('<p>results</p>', ['<p>found</p>'], 3)
    text = path.read_text()
    for part in ('Finished: all 320 steps', '<p>results</p>', '<p>found</p>', '3, named in'):
        assert part in text
    assert '<progress' not in text
    assert 'reload' not in text


def test_report_is_written_once_a_minute_and_is_no_step(live, tmp_path):
    """Between two pages lies a minute, whatever is logged; their time is not the steps'."""
    log(tmp_path, record(20), record(30))
    watch = Stopwatch(PLAN, 10)
    start = watch._last
    live.update(30, watch)
    paused = watch._last - start
    assert 0 < paused < 30
    (tmp_path / 'report.html').unlink()
    live.update(31, watch)
    assert not (tmp_path / 'report.html').exists()
    assert watch._last - start == paused
    live._due -= 60
    live.update(32, watch)
    assert (tmp_path / 'report.html').exists()


def test_report_that_cannot_be_written_ends_nothing(live, tmp_path, capsys):
    """It is said in one line, once, naming the file, and the next one is tried all the same."""
    path = tmp_path / 'report.html'
    path.mkdir()
    log(tmp_path, record(20), record(30))
    live.begin(0)
    live.update(30, Stopwatch(PLAN, 10))
    line = capsys.readouterr().out
    assert len(line.splitlines()) == 1
    assert 'could not be written' in line
    assert str(path) in line
    path.rmdir()
    live.stopped('by the test')
    assert 'Stopped: by the test' in path.read_text()
