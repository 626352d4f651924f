"""Measuring the online encoder during training: when, what, and without effect on the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
from conftest import TINY
from feeds import Mixed, make_config, quick
from streams import stream_of, views_at
from whole_runs import SAMPLE, finish, records, start_two

from byol_jax.app import periodic
from byol_jax.app.hooks import Event
from byol_jax.app.periodic import Periodic, accuracy_of, due, neighbours_of, other_views
from byol_jax.app.plan import make_plan
from byol_jax.app.progress import Stopwatch
from byol_jax.errors import BadPicture, UserError
from byol_jax.evaluation.neighbours import recall
from byol_jax.settings import Settings
from byol_jax.sources.base import Source, Subset
from byol_jax.sources.data import Data


def plan(every_steps: int, log_steps: int, total_steps: int = 100):
    config = make_config()
    config.log.every_steps, config.total_steps = log_steps, total_steps
    made = make_plan(config, 10, 1)
    return dataclasses.replace(made, evaluate_steps=every_steps)


@pytest.mark.parametrize(
    ('every', 'log', 'steps'),
    [
        (10, 5, [10, 20, 30, 40]),
        (10, 20, [20, 40]),
        (7, 5, [10, 15, 25, 30, 35, 43]),
        (43, 5, [43]),
        (1, 20, [20, 40, 43]),
        (0, 5, []),
    ],
)
def test_due_at_the_first_logged_step(every, log, steps):
    """Measures at the first logged step at or after each multiple, and at the last step, 43, which
    is logged too; never if it is turned off.
    """
    logged = [step for step in range(1, 44) if step % log == 0 or step == 43]
    assert [step for step in logged if due(plan(every, log, 43), step)] == steps


@pytest.mark.parametrize(('epochs', 'steps'), [(0.0, 0), (0.001, 1), (1.0, 6), (2.5, 15)])
def test_epochs_are_whole_steps(epochs, steps):
    """evaluate.every_epochs for 50 examples in batches of 8 is rounded down."""
    config = make_config()
    config.evaluate.every_epochs = epochs
    assert make_plan(config, 50, 1).evaluate_steps == steps
    config.evaluate.every_epochs = -1.0
    with pytest.raises(UserError, match=r'evaluate\.every_epochs'):
        Settings.of(config)


class Flat(Source):
    """Pictures of one colour each, which views do not change; pictures 4 and 7 are unreadable."""

    label_names = ('dark', 'light')

    def __init__(self, count: int, groups: np.ndarray | None = None, bad: tuple[int, ...] = ()):
        self.groups, self._bad, self._count = groups, bad, count
        self.labels = (np.arange(count) >= count // 2).astype(np.int64)

    def __len__(self) -> int:
        return self._count

    def load(self, index: int, key: str) -> np.ndarray:
        if index in self._bad:
            raise BadPicture(self.name(index), 'is damaged', 'Mend it.')
        return np.full((20, 20, 3), 2 * index + 1, np.uint8)

    def name(self, index: int) -> str:
        return str(index)


def flat_config():
    """A config whose views have the colours of their pictures."""
    config = quick(make_config())
    for view in (config.views.view1, config.views.view2):
        view.gray = view.solarize = 0.0
    config.evaluate.batch_size = 4
    return Settings.of(config)


def colour(images):
    """Features that tell every colour from every other: points on a circle."""
    angle = images[:, 0, 0, 0] / 255 * np.pi
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def data_of(train: Source, held_out: Source | None = None) -> Data:
    nothing = Subset(train, np.zeros(0, int))
    return Data(train, nothing if held_out is None else held_out)


def seen(monkeypatch):
    """The views, [2][M, D], for which recall is measured."""
    given = []
    monkeypatch.setattr(periodic, 'recall', lambda *a: given.append(a[:2]) or recall(*a))
    return given


def test_other_views_are_found():
    """An encoder that tells all pictures apart finds every view; a blind one finds as many as
    chance; neither the batch size nor padding changes this.
    """
    data = data_of(Flat(30))
    config = flat_config()
    assert other_views(colour, data, config) == {'recall_1': 1.0, 'recall_5': 1.0}
    blind = other_views(lambda images: np.ones((len(images), 3), np.float32), data, config)
    assert blind == pytest.approx({'recall_1': 1 / 30, 'recall_5': 5 / 30})


def test_other_views_are_those_of_training():
    """The encoded views are those of the stream's first positions, bit for bit."""
    source, config = Mixed(), make_config()
    config.evaluate.batch_size = 4
    shown = []

    def encode(images):
        shown.append(images)
        return colour(images)

    other_views(encode, data_of(source), Settings.of(config))
    stream = stream_of(source, config)
    for position in range(len(source)):
        batch, row = divmod(position, 4)
        for number, view in enumerate(views_at(stream, position)):
            np.testing.assert_array_equal(shown[2 * batch + number][row], view)


def test_the_pool(monkeypatch):
    """Held-out pictures if there are any; at most POOL; one from each group; no unreadable ones and
    no replacements.
    """
    given, config = seen(monkeypatch), flat_config()
    other_views(colour, data_of(Flat(30), Flat(9)), config)
    assert len(given[-1][0]) == 9
    other_views(colour, data_of(Flat(30, groups=np.arange(30) // 3)), config)
    assert len(given[-1][0]) == 10
    other_views(colour, data_of(Flat(20, bad=(4, 7))), config)
    view1, view2 = given[-1]
    np.testing.assert_array_equal(view1, view2)
    assert len(np.unique(view1, axis=0)) == len(view1) == 18
    monkeypatch.setattr(periodic, 'POOL', 12)
    other_views(colour, data_of(Flat(30)), config)
    assert len(given[-1][0]) == 12


def test_a_pool_too_small_says_nothing():
    """All five pictures are among the first five, so there is no result."""
    assert other_views(colour, data_of(Flat(5)), flat_config()) == {}


def test_accuracy_needs_labels_and_held_out_pictures():
    """The accuracy is that of the table at the end; without labels or held-out pictures there is
    none.
    """
    config = flat_config()
    found = neighbours_of(colour, data_of(Flat(60), Flat(60)), config)
    assert accuracy_of(found, config) == {'knn_20': found.accuracy}
    assert found.accuracy > 0.5
    for data in (data_of(Flat(30)), data_of(Mixed(), Mixed())):
        assert accuracy_of(neighbours_of(colour, data, config), config) == {}


@pytest.fixture
def measured():
    """Measures Flat pictures with `colour` as the encoder: (data) -> (values, watch)."""
    encoder = types.SimpleNamespace(variables={}, compiled=lambda _, images: colour(images))

    def call(data):
        run = types.SimpleNamespace(config=flat_config(), plan=plan(10, 10), data=data)
        event = Event(run, 10, None, watch=Stopwatch(run.plan, 0))
        event.encoder = encoder
        before = event.watch._last
        return Periodic(None, None).measure(event), event.watch._last - before

    return call


def test_says_what_it_found_and_leaves_the_time_out(measured, capsys, monkeypatch):
    """One line has the results and the seconds, which do not count as step time."""
    times = iter([100.0, 100.0, 107.0])
    monkeypatch.setattr(periodic.time, 'perf_counter', lambda: next(times))
    values, left_out = measured(data_of(Flat(30), Flat(30)))
    assert values == {'knn_20': pytest.approx(0.8, abs=0.2), 'recall_1': 1.0, 'recall_5': 1.0}
    assert left_out == 7
    said = f'knn_20 {values["knn_20"]:.3f}  recall_1 1.000  recall_5 1.000\n'
    assert capsys.readouterr().out == f'evaluated at step 10 in 7s: {said}'


def test_bad_pictures_do_not_stop_a_run(measured, capsys):
    """If no picture can be read, the run continues without the results and says why."""
    values, _ = measured(data_of(Flat(8), Flat(8, bad=tuple(range(8)))))
    assert values == {}
    said = capsys.readouterr().out
    assert 'evaluated at step 10' in said
    assert said.count('None of 8 pictures can be read') == 2


def test_one_figure_does_not_take_the_other_with_it(measured, monkeypatch, capsys):
    """If labels cannot be used, recall is still measured, and the reverse."""

    def refused(*_, **__):
        raise UserError('refused')

    with monkeypatch.context() as patch:
        patch.setattr(periodic, 'evaluate', refused)
        values, _ = measured(data_of(Flat(30), Flat(30)))
        assert values == {'recall_1': 1.0, 'recall_5': 1.0}
    with monkeypatch.context() as patch:
        patch.setattr(periodic, 'encode_pairs', refused)
        values, _ = measured(data_of(Flat(30), Flat(30)))
        assert values.keys() == {'knn_20'}
    said = capsys.readouterr().out
    assert 'no neighbours. refused' in said
    assert 'no views. refused' in said


EVERY = '--config.evaluate.every_epochs=0.08'


@pytest.fixture(scope='module')
def whole(main_py, tmp_path_factory):
    """A whole run: (workdir, completed process)."""
    workdir = tmp_path_factory.mktemp('measured') / 'whole'
    result = main_py(SAMPLE, *TINY, EVERY, f'--workdir={workdir}')
    assert result.returncode == 0, result.stderr
    return workdir, result


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_is_measured_and_goes_on_bit_for_bit(whole, tmp_path, main_py):
    """A run's records have the results at the steps that are due; the last equal those of the
    report's table; a run that was interrupted and resumed has the same results and probe.
    """
    whole, result = whole
    cut, made = tmp_path / 'cut', records(whole)
    names = {'knn_20', 'recall_1', 'recall_5', 'online_probe_accuracy', 'online_probe_loss'}
    found = {record['step']: names & record.keys() for record in made}
    probe = {'online_probe_accuracy', 'online_probe_loss'}
    assert all(probe <= keys for keys in found.values())
    steps = [step for step, keys in found.items() if 'knn_20' in keys]
    assert steps == [step for step in found if f'evaluated at step {step} in' in result.stdout]
    assert len(steps) > 1
    assert found[8] == names
    assert f'{made[-1]["knn_20"]:.1%}' in result.stdout.split('trained 8 steps')[1].splitlines()[0]
    shutil.copytree(whole, cut)
    for step in (6, 8):
        shutil.rmtree(cut / 'checkpoints' / str(step), ignore_errors=True)
    again = main_py(SAMPLE, *TINY, EVERY, f'--workdir={cut}')
    assert again.returncode == 0, again.stderr
    assert 'going on from the checkpoint of step 4' in again.stdout
    timing = {'images_per_second', 'input_wait_fraction'}
    for a, b in zip(made, records(cut), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }
    assert saved(whole) == saved(cut)
    assert any(name.startswith('online_probe/') for name in saved(whole))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_measure_as_one(whole, tmp_path):
    """Each process has the labels of its share, and only process 0 measures the encoder: all
    results of the first step equal those of one process up to rounding, and later ones exist.
    """
    said = finish(start_two(tmp_path / 'w', EVERY))
    assert 'evaluated at step' in said[0]
    assert 'evaluated at step' not in said[1]
    one, two = records(whole[0]), records(tmp_path / 'w')
    assert [record.keys() for record in one] == [record.keys() for record in two]
    assert two[0]['online_probe_loss'] == pytest.approx(one[0]['online_probe_loss'], rel=1e-3)
    for name in ('knn_20', 'recall_1', 'recall_5'):
        assert two[0][name] == pytest.approx(one[0][name], abs=0.05)


def saved(workdir):
    """The digests of all leaves of the newest checkpoint."""
    newest = max(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    return json.loads((workdir / 'checkpoints' / str(newest) / 'digests' / 'metadata').read_text())
