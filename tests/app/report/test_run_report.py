"""report.html: its sections, its layout on a phone, and when it is written."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from records import CONFIG, FACTS, LATE, PLAN, alarm, record

from byol_jax.app.alarm_log import verdict
from byol_jax.app.progress import Stopwatch
from byol_jax.app.report.curves import draw_curves
from byol_jax.app.report.illustrations import Illustrations, Map, draw_spectrum, for_page
from byol_jax.app.report.page import data_uri, render, write_page
from byol_jax.app.report.pictures import Thumbnail
from byol_jax.app.report.run_report import Report, Result, RunReport, evaluation_tables
from byol_jax.methods.byol import Byol


def test_evaluation_table(tmp_path):
    """evaluation.json and the last evaluation during training are shown; other files are named."""

    def evaluation_section(workdir, records):
        tables = evaluation_tables(workdir, records)
        return render('report.html', report=Report(evaluations=tables))

    assert '<h2>Evaluation' not in evaluation_section(tmp_path, [record(10)])
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
    """The page is written although the name of a file or class folder is not UTF-8."""
    name = b'caf\xe9.png'.decode(errors='surrogateescape')
    write_page(tmp_path / 'report.html', 'report.html', report=Report(command=name))
    assert r'<pre>caf\udce9.png</pre>' in (tmp_path / 'report.html').read_text(encoding='utf-8')


def test_control_characters_are_shown(tmp_path):
    """A word of a file neither turns the text nor moves a terminal that shows the page's source."""
    path = tmp_path / 'report.html'
    write_page(path, 'report.html', report=Report(title='\x1b[2J\u202e\x00', command='a\rb'))
    text = path.read_text()
    assert all(c.isprintable() or c == '\n' for c in text)
    for word in (r'\x1b[2J\u202e\x00', r'a\rb'):
        assert word in text


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
    late = [record(s) for s in LATE]
    write_page(
        folder / 'report.html',
        'report.html',
        report=Report(
            title='A <run>',
            words='Under way: step 100.',
            step=100,
            total_steps=320,
            verdict=verdict(late, [alarm('collapse', 'alarm')], FACTS),
            results=[Result('x' * 80, 0.5, 0.03)],
            protocol='How it was measured.',
            evaluations=evaluation_tables(folder, [record(30, knn_200=0.5)]),
            facts={'Encoder': 'resnet18'},
            curves=draw_curves(late, FACTS, []),
            views=data_uri(picture),
            shown=Illustrations(
                100,
                draw_spectrum({'before': np.full(8, 3.0)}),
                [Map('pca', 'By PCA', 'a & b', picture, data_uri(picture))],
                [('cat', '#9aa4ae')],
                neighbours=for_page([(thumbnail, [thumbnail] * 6)]),
            ),
            command='python main.py ' + '--config.x=y ' * 20,
            config='{"a": 1}',
        ),
    )
    return (folder / 'report.html').read_text()


def test_page_loads_nothing(page):
    """No script, no style sheet, no address except data: URLs; the title is escaped."""
    assert '<h1>A &lt;run&gt;</h1>' in page
    for tag, attributes, _ in Elements(page).found:
        assert tag not in ('script', 'link', 'iframe', 'object')
        for name in ('src', 'href', 'xlink:href', 'data', 'srcset'):
            assert attributes.get(name, 'data:').startswith('data:')
    assert 'url(' not in page
    assert '@import' not in page


def test_page_fits_a_phone(page):
    """Nothing is wider than 360 pixels except what scrolls on its own."""
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
    # Text is at least 12 pixels high, except in charts, which are scaled.
    letters = re.findall(r'([^{}]+)\{[^}]*font-size: ([\d.]+)(rem|px)', style)
    assert all(float(n) * (16 if u == 'rem' else 1) >= 12 or '.chart' in s for s, n, u in letters)


def _sizes(value):
    return re.findall(r'([\d.]+)(rem|px)', value)


@pytest.fixture
def live(tmp_path):
    """A report of the sample run, in its own workdir."""
    Image.new('RGB', (30, 20)).save(tmp_path / 'views.png')
    run = SimpleNamespace(
        initial_norm=0.0,
        pixels=(),
        config=CONFIG,
        plan=PLAN,
        method=SimpleNamespace(
            loss_scale=Byol.loss_scale, encoder=SimpleNamespace(hidden_layer='stage3/block1')
        ),
        data=SimpleNamespace(small=(), held_out=range(7)),
        training=SimpleNamespace(origin=''),
    )
    return RunReport(run, tmp_path, 'python main.py --config=<this>')


def log(workdir, *records):
    with (workdir / 'metrics.jsonl').open('a') as file:
        file.writelines(json.dumps(each) + '\n' for each in records)


def test_report_of_a_run_under_way(live, tmp_path):
    """It says how far the run is and what is known, also when the run is resumed."""
    path = tmp_path / 'report.html'
    live.begin(0)
    assert 'Starting at step 0 of 320' in path.read_text()
    assert 'too early to say' in path.read_text()
    watch = Stopwatch(PLAN, 10)
    log(tmp_path, record(20), record(30), record(40))
    watch.lap(40)
    live.update(40, watch)
    text = path.read_text()
    for part in ('Under way: step 40 of 320 (12%)', ' left.', 'reload it', 'View pairs'):
        assert part in text
    for part in (
        '<p class="state">healthy</p>',
        '<b>Loss</b>',
        'tapped at stage3/block1',
        '--config=&lt;this&gt;',
        'warmup_steps',
    ):
        assert part in text
    live.show(Illustrations(missing='found at 40'))
    live.update(50, watch)
    live.stopped('killed')
    assert 'found at 40' in path.read_text()
    again = RunReport(live._run, tmp_path, 'again')
    again.begin(40)
    assert 'Starting at step 40' in path.read_text()
    assert '<b>Loss</b>' in path.read_text()
    again.stopped('SIGTERM & more')
    assert 'Stopped: SIGTERM &amp; more' in path.read_text()
    results = [Result('trained', 0.875, 0.03)]
    shown = Illustrations(missing='found at the end')
    again.finished(320, '', results, 'By cosine.', shown, 3)
    text = path.read_text()
    for part in (
        'Finished: all 320 steps',
        '87.5%',
        'By cosine.',
        'found at the end',
        '3, named in',
    ):
        assert part in text
    assert '<progress' not in text
    assert 'reload' not in text


def test_report_is_written_once_a_minute_and_is_no_step(live, tmp_path):
    """Pages are a minute apart however much is logged, and their time does not count as steps'."""
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
    """The error is said in one line, once, with the file; the next page is tried all the same."""
    path = tmp_path / 'report.html'
    path.mkdir()
    log(tmp_path, record(20), record(30))
    live.begin(0)
    live.update(30, Stopwatch(PLAN, 10))
    line = capsys.readouterr().out
    assert len(line.splitlines()) == 1
    assert 'cannot be written' in line
    assert str(path) in line
    path.rmdir()
    live.stopped('by the test')
    assert 'Stopped: by the test' in path.read_text()
