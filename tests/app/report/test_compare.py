"""--mode=compare: the table, the page, and what cannot be compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from byol_jax.app import lock
from byol_jax.app.report.compare import compare, mark, text_of, write_comparison
from byol_jax.app.report.compare_tables import SCALED_STD, names, read_runs, show, tables
from byol_jax.errors import UserError
from byol_jax.settings import Settings
from configs import default


def make_run(
    workdir, steps=(2, 4, 6), total=6, projection=16, command='', values=None, cut='', **keys
):
    """A workdir as training leaves it; `values` are added to every record."""
    config = default.get_config()
    config.batch_size = 8
    config.total_epochs, config.total_steps = None, total
    config.projector.output_size = projection
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in keys.items()})
    workdir.mkdir(parents=True)
    (workdir / 'config.json').write_text(json.dumps(Settings.of(config).plain))
    (workdir / 'data.json').write_text(json.dumps({'examples': 80, 'held_out': 8}))
    records = [
        {
            'step': step,
            'epoch': step * config.batch_size / 80,
            'loss': 4 / step,
            'feature_std': 0.8 * projection**-0.5,
            **(values or {}),
        }
        for step in steps
    ]
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (workdir / 'metrics.jsonl').write_text(lines + cut)
    if command:
        (workdir / 'command.txt').write_text(f'{command}\n')
    return workdir


def finish(workdir, **metrics):
    (workdir / 'encoder').mkdir()
    (workdir / 'encoder' / 'encoder.json').write_text('{}')
    content = {'step': 6, 'data': {'source': 'sample'}, 'metrics': metrics}
    (workdir / 'evaluation.json').write_text(json.dumps(content))


def table_of(workdirs, title):
    """The cells of a table by heading."""
    found = [t for t in tables(read_runs(workdirs)) if t.title == title]
    assert len(found) == 1, [t.title for t in tables(read_runs(workdirs))]
    return {row.heading: row.cells for row in found[0].rows}


def test_config_shows_what_differs_alone(tmp_path):
    """Only keys in which the configs differ are shown. One that a config lacks is at its default;
    without a default here it is a dash."""
    a = make_run(tmp_path / 'a')
    b = make_run(tmp_path / 'b', seed=3, views__view1__blur=0.5)
    config = json.loads((b / 'config.json').read_text())
    del config['data']['cache']
    config['data']['of_later'] = 1
    (b / 'config.json').write_text(json.dumps(config))
    assert table_of([a, b], 'Config') == {
        'data.of_later': ('-', '1'),
        'seed': ('0', '3'),
        'views.view1.blur': ('1.0', '0.5'),
    }
    c = make_run(tmp_path / 'c')
    assert 'The configs are the same.' in [t.note for t in tables(read_runs([a, c]))]
    # A run from when tau_base was called base_ema and there were no hooks.
    config = json.loads((c / 'config.json').read_text())
    config['target'] = {'base_ema': config['target']['tau_base']}
    del config['hooks'], config['method']
    (c / 'config.json').write_text(json.dumps(config))
    assert 'The configs are the same.' in [t.note for t in tables(read_runs([a, c]))]


def test_last_values(tmp_path):
    """Shows the last value of each metric, with its step if that is earlier, or a dash."""
    a = make_run(tmp_path / 'a', values={'images_per_second': 1234.5, 'input_wait_fraction': 0.125})
    with (a / 'metrics.jsonl').open('a') as file:
        file.write(json.dumps({'step': 8, 'epoch': 0.8, 'loss': 0.5, 'new_metric': 3}) + '\n')
    b = make_run(tmp_path / 'b', projection=64, values={'tau': 0.9999512}, cut='{"step": 8, "lo')
    values = table_of([a, b], 'Last values')
    assert values['loss'] == ('0.5000', '0.6667')
    assert values['feature_std'] == ('0.2000 (step 6)', '0.1000')
    # Metrics that depend on P.
    assert values[SCALED_STD] == ('0.8000 (step 6)', '0.8000')
    assert values['images_per_second'] == ('1,234 (step 6)', '-')
    assert values['input_wait_fraction'] == ('12.5% (step 6)', '-')
    assert values['tau'] == ('-', '0.999951')
    assert values['new_metric'] == ('3', '-')
    assert list(values)[:3] == ['loss', 'feature_std', SCALED_STD]
    assert 'step' not in values


def test_same_step(tmp_path):
    """Runs of different length are compared at the last step, or epoch, that all have reached."""
    a = make_run(tmp_path / 'a', steps=(2, 4, 6, 8))
    b = make_run(tmp_path / 'b', steps=(1, 3, 5))
    c = make_run(tmp_path / 'c', steps=())
    at = table_of([a, b, c], 'At step 5')
    assert at['step'] == ('4', '5', '-')
    assert at['loss'] == ('1.000', '0.8000', '-')
    # Twice as many epochs for a step.
    d = make_run(tmp_path / 'd', steps=(1, 2, 3), batch_size=16)
    at = table_of([a, d], 'At epoch 0.6000')
    assert at['step'] == ('6', '3')


def test_state(tmp_path):
    """Finished, stopped and under way are told apart, with the step and the number of steps."""
    finished = make_run(tmp_path / 'finished')
    finish(finished)
    stopped = make_run(tmp_path / 'stopped', steps=(2,), total=1500)
    epochs = make_run(tmp_path / 'epochs', steps=(), total_steps=None, total_epochs=5.0)
    lock.take_lock(epochs)
    (stopped / '.lock').touch()
    runs = [finished, stopped, epochs]
    try:
        for _ in range(2):
            assert table_of(runs, 'Runs')['state'] == (
                'finished: step 6 of 6',
                'stopped: step 2 of 1,500',
                'under way: no step logged yet of 50',
            )
    finally:
        lock.release_lock(epochs)


def test_evaluations_and_results(tmp_path):
    """evaluation.json and the before/after table stand side by side; missing ones are said."""
    a, b, c = (make_run(tmp_path / name) for name in 'abc')
    finish(a, knn_20=0.8125, kmeans_nmi=0.5, linear=0.9)
    finish(b, knn_20=0.5, rankme=12.5)
    rows = [
        {'name': 'randomly initialised', 'accuracy': 0.25, 'feature_std': 0.01},
        {'name': 'trained 6 steps', 'accuracy': None, 'feature_std': 0.02},
    ]
    (a / 'results.json').write_text(json.dumps({'protocol': 'By cosine.', 'results': rows}))
    assert table_of([a, b, c], 'Evaluation') == {
        'step': ('6', '6', '-'),
        'knn_20': ('81.2%', '50.0%', '-'),
        'kmeans_nmi': ('0.5000', '-', '-'),
        'linear': ('90.0%', '-', '-'),
        'rankme': ('-', '12.50', '-'),
    }
    found = table_of([a, b], 'Before and after training')
    assert found['before, nearest neighbours'] == ('25.0%', '-')
    assert found['after, nearest neighbours'] == ('-', '-')
    assert found['after, feature std'] == ('0.02000', '-')


def test_what_training_writes_is_read(tmp_path):
    """The table and the command of a run are found where training writes them."""
    from byol_jax.app import workdir as workdirs
    from byol_jax.app.report.run_report import Result, write_results

    config = default.get_config()
    a = tmp_path / 'a'
    data = {'examples': 5, 'held_out': 1}
    workdirs.claim_workdir(a, config, data, 'python main.py --config=x')
    rows = [Result('x', share, 0.1) for share in (0.5, 0.75)]
    write_results(a, rows, 'By cosine.')
    b = make_run(tmp_path / 'b')
    assert read_runs([a, b])[0].command == 'python main.py --config=x'
    assert table_of([a, b], 'Runs')['state'][0].startswith('under way')
    while lock._locks:
        lock.release_lock(next(iter(lock._locks)))
    assert table_of([a, b], 'Runs')['state'][0].startswith('stopped')
    found = table_of([a, b], 'Before and after training')
    assert found['before, nearest neighbours'] == ('50.0%', '-')
    assert found['after, nearest neighbours'] == ('75.0%', '-')


ALARMS = [
    {'step': 40, 'name': 'collapse', 'severity': 'watch', 'evidence': 'std 42 %'},
    {'step': 60, 'name': 'collapse', 'severity': 'alarm', 'evidence': 'std <12 %'},
    {'step': 90, 'name': 'collapse', 'severity': 'over', 'evidence': ''},
    {'step': 80, 'name': 'input_bound', 'severity': 'watch', 'evidence': 'wait 40 %'},
]


def raise_alarms(workdir):
    lines = [json.dumps(alarm | {'cause': 'steps', 'remedy': 'lower it'}) for alarm in ALARMS]
    (workdir / 'alarms.jsonl').write_text('\n'.join(lines) + '\n')


def test_alarms(tmp_path):
    """Shows each alarm at its worst, from when to when, and whether it still stands."""
    a, b = make_run(tmp_path / 'a'), make_run(tmp_path / 'b')
    raise_alarms(b)
    assert table_of([a, b], 'Alarms') == {
        'collapse': ('-', 'alarm from step 40 to 90'),
        'input_bound': ('-', 'watch from step 80, and stands'),
    }


class Page(HTMLParser):
    """Collects open tags, all attributes, and what a page would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ('meta', 'img', 'input', 'wbr', 'path', 'circle', 'polyline'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The page of three unlike runs, one with a name that is markup."""
    folder = tmp_path_factory.mktemp('page')
    a = make_run(folder / 'a', command='python main.py --config=a')
    b = make_run(folder / '<b>&$x$', steps=(2,), batch_size=16, values={'lidar': 3.0})
    c = make_run(folder / 'c', steps=())
    raise_alarms(b)
    pixels = np.full((60, 40, 3), (0, 128, 255), np.uint8)
    Image.fromarray(pixels).save(a / 'views.png')
    (b / 'views.png').write_bytes(b'no picture')
    runs = read_runs([a, b, c])
    path = folder / 'page.html'
    write_comparison(path, runs, tables(runs))
    return path.read_text()


def test_page_is_self_contained_and_sound(page):
    """Every element is closed, nothing is loaded or executed, and names are no markup."""
    parsed = Page(page)
    assert parsed.open == []
    assert 'script' not in parsed.tags
    loaded = [value for name, value in parsed.attributes if name in ('src', 'href', 'xlink:href')]
    assert loaded
    assert all(value.startswith('data:image/') for value in loaded)
    assert '<b>' not in page
    assert '&lt;b&gt;&amp;$x$' in page
    assert 'std &lt;12 %' in page
    assert 'python main.py --config=a' in page
    assert 'It cannot be read' in page


def test_page_has_a_chart_of_each_metric(page):
    """Each metric has a chart over steps, and over epochs if batch sizes differ, with a legend."""
    figures = re.findall(
        r'<figure><figcaption>([\w ()]+)</figcaption>(.*?)</figure>', page, re.DOTALL
    )
    drawn = [name for name, body in figures if '<svg class="chart"' in body]
    assert drawn == ['loss', 'feature_std', SCALED_STD, 'lidar'] * 2
    by_step, by_epoch = figures[0][1], figures[4][1]
    assert 'loss over the steps of a, &lt;b&gt;&amp;$x$' in by_step
    assert 'loss over the epochs of' in by_epoch
    # A line of three points, and a dot of one; the run without a record is in no legend.
    assert len(re.search('points="([^"]*)"', by_step)[1].split()) == 3
    assert by_step.count('<circle') == 1
    assert by_step.count('<li>') == 2


def test_lines_are_told_apart():
    """Twenty-one runs have twenty-one pairs of colour and dash, none as light as yellow."""
    marks = [mark(number) for number in range(21)]
    assert len(set(marks)) == 21
    for colour, _ in marks:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 175


def test_text_fits_the_terminal(tmp_path):
    """Ten runs fit into 80 columns, below each other; long names are cut in the middle."""
    workdirs = [make_run(tmp_path / f'{"a long name " * 5}{n}', seed=n) for n in range(10)]
    runs = read_runs(workdirs)
    text = text_of([run.name for run in runs], tables(runs), 80)
    tabular = [line for line in text.splitlines() if line.startswith((' ', 'loss', 'seed'))]
    assert max(map(len, tabular)) <= 80
    seeds = ' '.join(line.removeprefix('seed') for line in tabular if line.startswith('seed'))
    assert seeds.split() == [str(n) for n in range(10)]
    header = next(line for line in tabular if line.startswith(' '))
    assert re.search(r' a long name a long\.{3} name a long name 0$', header)


def test_names_are_as_short_as_they_can_be(tmp_path):
    """A name is the last part of the path, or as many parts as tell all runs apart."""
    assert names([tmp_path / 'x' / 'a', tmp_path / 'y' / 'b']) == ['a', 'b']
    assert names([tmp_path / 'x' / 'a', tmp_path / 'y' / 'a']) == ['x/a', 'y/a']


@pytest.mark.parametrize(
    ('name', 'value', 'text'),
    [
        ('loss', 0.99018, '0.9902'),
        ('tau', 0.99996, '0.999960'),
        ('knn_200', 0.853, '85.3%'),
        ('images_per_second', 12345.6, '12,346'),
        ('stats_spread', 0.0, '0'),
        ('stats_spread', 1.5e-7, '1.500e-07'),
        ('loss', float('nan'), 'nan'),
        ('bad_files', 12, '12'),
        ('note', 'text', 'text'),
        ('accuracy', None, '-'),
    ],
)
def test_numbers(name, value, text):
    """Accuracies are percent, small differences near 1 are kept, large numbers have no fraction."""
    assert show(name, value) == text


def test_written_and_replaced(tmp_path, capsys, monkeypatch):
    """The page goes to compare.html and is replaced by the next one; no other file is."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / 'a')
    make_run(tmp_path / 'b')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    compare('a, b', None)
    assert 'written: compare.html' in capsys.readouterr().out
    compare('b,a', None)
    assert '<h1>2 runs side by side' in (tmp_path / 'compare.html').read_text()
    compare('a,b', tmp_path / 'new' / 'page.HTML')
    own = tmp_path / 'own.html'
    own.write_text('my own')
    with pytest.raises(UserError, match=r'own\.html exists and is not a page'):
        compare('a,b', own)
    assert own.read_text() == 'my own'
    with pytest.raises(UserError, match=r'ends in \.html'):
        compare('a,b', tmp_path / 'a' / 'metrics.jsonl')
    (tmp_path / 'folder.html').mkdir()
    with pytest.raises(UserError, match='is a folder'):
        compare('a,b', tmp_path / 'folder.html')
    with pytest.raises(UserError, match='cannot be written'):
        compare('a,b', own / 'page.html')
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ('workdirs', 'words'),
    [
        (None, ('no run', '--workdirs=A,B')),
        ('runs/first', ('only runs/first', 'Beside it: second')),
        ('runs/first,runs/secnd', ('runs/secnd does not exist', "Did you mean 'runs/second'?")),
        ('first,runs/first', ('first does not exist', "Did you mean 'runs/first'?")),
        ('runs/first,notes.txt', ('notes.txt is no folder',)),
        ('runs/first,runs/../runs/first', ('twice', 'give each run once')),
        ('runs/first,runs/first', ('has runs/first twice: give',)),
        ('runs/first,runs', ('runs holds no run', 'runs/first, runs/second', 'give one of them')),
        ('runs/first,empty', ('empty holds no run', 'no config.json', 'runs/<config name>')),
        ('runs/first,broken', ('broken/config.json is damaged: it is not JSON',)),
        ('runs/first,other', ('other/config.json is not the config of a run', 'projector')),
    ],
    ids=str,
)
def test_what_cannot_be_compared(tmp_path, monkeypatch, workdirs, words):
    """The message says which folder is wrong, why, and what is near; nothing is written."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / 'runs' / 'first')
    make_run(tmp_path / 'runs' / 'second')
    (tmp_path / 'notes.txt').touch()
    for name, config in (('empty', None), ('broken', '{"a": '), ('other', '{"a": 1}')):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / 'config.json').write_text(config)
    with pytest.raises(UserError) as error:
        compare(workdirs, None)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / 'compare.html').exists()


def test_as_a_user_starts_it(tmp_path):
    """main.py compares without a config, TensorFlow or device."""
    a, b = make_run(tmp_path / 'a'), make_run(tmp_path / 'b')
    output = tmp_path / 'page.html'
    # Importing TensorFlow, or asking for devices, fails.
    code = textwrap.dedent("""
        import sys
        sys.modules['tensorflow'] = None
        import jax
        jax.devices = jax.device_count = None
        sys.argv[0] = 'main.py'
        exec(compile(open('main.py').read(), 'main.py', 'exec'))
    """)

    done = subprocess.run(
        [sys.executable, '-c', code, '--mode=compare', f'--workdirs={a},{b}', f'--output={output}'],
        cwd=ROOT,
        env=os.environ | {'COLUMNS': '80'},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'LAST VALUES' in done.stdout
    assert done.stderr == ''
    assert output.exists()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--mode=compare', '--workdirs=a,b', '--workdir=a'), '--workdir does not go with --mode='),
        (('--mode=views', '--workdirs=a,b'), '--workdirs=a,b goes with --mode=compare, not with'),
    ],
    ids=['workdir', 'views'],
)
def test_flags_that_do_not_fit(main_py, arguments, words):
    """A flag that compares nothing, and runs to compare in another mode, are named in one line."""
    done = main_py(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: {words}')
    assert len(done.stderr.splitlines()) == 1
