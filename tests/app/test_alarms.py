"""The alarms: each can be provoked, names its cause, and is silent if nothing is wrong."""

from __future__ import annotations

import math
import time

import jax
import optax
import pytest
from records import facts, healthy, sample_config
from tiny_runs import (
    SIZE,
    LinearPredictor,
    NoPredictor,
    NoStopGradient,
    make_byol,
    make_config,
    run,
)

from byol_jax.app import build
from byol_jax.app.alarms import ALARM, WATCH, non_finite, pixel_alarms, standing
from byol_jax.app.plan import make_plan
from byol_jax.app.progress import Stopwatch
from byol_jax.input.pixels import Finding
from byol_jax.methods.base import LossScale
from byol_jax.methods.byol import Byol

# Two pending steps on simulated devices can deadlock: every step is awaited, with a time limit.
pytestmark = pytest.mark.timeout(120)


def by_name(history, config, devices=1):
    """The alarms that stand at the end of a history, by name."""
    return {alarm.name: alarm for alarm in standing(history, facts(config, devices))}


def first_step(history, config, name, severity, devices=1):
    """The step at which an alarm is first raised with this severity, or None."""
    for count in range(1, len(history) + 1):
        alarm = by_name(history[:count], config, devices).get(name)
        if alarm is not None and alarm.severity == severity:
            return alarm.step
    return None


def records(count=6, **changes):
    return [healthy(10 * (i + 1), **changes) for i in range(count)]


def test_a_healthy_run_raises_nothing_and_a_jump_of_the_learning_rate_does():
    """60 healthy steps raise nothing; at 1,000 times the learning rate, an alarm names the rate."""
    config = make_config()
    history = run(config, make_byol(), stop=90, jump=(60, 1000))
    for count in range(1, 7):
        assert by_name(history[:count], config) == {}
    alarm = by_name(history[:8], config)['learning_rate']
    assert alarm.severity == ALARM
    assert 'learning rate is too high' in alarm.cause
    assert 'optimizer.base_learning_rate=2' in alarm.remedy


def test_no_predictor_collapses_and_own_batch_norm_is_found():
    """Without a predictor all projections become alike, and a loss near 0 is not called good.

    The network also has its own batch normalisation, over 8 examples on each of two devices.
    """
    config = make_config(batch_size=16, optimizer__base_learning_rate=8.0)
    byol = make_byol(predictor=NoPredictor(), synchronised=False)
    if jax.local_device_count() < 2:
        pytest.skip('needs two devices')
    history = run(config, byol, devices=2, stop=60)
    found = by_name(history, config, devices=2)
    assert found['collapse'].severity == ALARM
    assert 'predictor does nothing' in found['collapse'].cause
    assert found['trivial_loss'].severity == ALARM
    assert 'predictor does nothing' in found['trivial_loss'].cause
    assert found['small_norm_batch'].severity == ALARM
    assert '8 of 16 examples' in found['small_norm_batch'].evidence
    assert 'not synchronised' in found['small_norm_batch'].cause
    assert found.keys() == {'collapse', 'trivial_loss', 'small_norm_batch'}


def test_no_stop_gradient_collapses():
    """With a gradient through both sides and no target network, the alarm names that cause."""
    config = make_config()
    found = by_name(run(config, make_byol(NoStopGradient), stop=60), config)
    assert found['collapse'].severity == found['trivial_loss'].severity == ALARM
    assert 'stop-gradient' in found['collapse'].cause
    assert 'jax.lax.stop_gradient' in found['collapse'].remedy


def test_a_target_without_average_collapses():
    """With tau_base 0 and a linear predictor, it collapses and the alarm names target.tau_base."""
    config = make_config(target__tau_base=0.0)
    history = run(config, make_byol(predictor=LinearPredictor()), stop=70)
    assert first_step(history, config, 'target_follows', WATCH) == 10
    found = by_name(history, config)
    assert found['collapse'].severity == ALARM
    assert 'target.tau_base=0:' in found['collapse'].cause
    assert 'target.tau_base to 0.99' in found['collapse'].remedy


@pytest.mark.slow
def test_with_a_slow_target_the_same_run_does_not_collapse():
    """With tau_base 0.999, the network that collapses with 0 raises a watch at most."""
    config = make_config(target__tau_base=0.999)
    history = run(config, make_byol(predictor=LinearPredictor()), stop=200)
    assert first_step(history, config, 'collapse', ALARM) is None
    assert first_step(history, config, 'trivial_loss', ALARM) is None
    assert history[-1]['feature_std'] > 1.2 * min(r['feature_std'] for r in history)


# What AdamW at the rate of LARS (0.5) measured in the sample run, whose weights begin at 24:
# (step, feature std x sqrt(128), parameter norm, update norm over it, RankMe, loss).
ADAM_AT_THE_RATE_OF_LARS = [
    (10, 0.449, 489.1, 0.1434, 3.44, 3.000),
    (20, 0.299, 1034.8, 0.0451, 3.23, 2.211),
    (30, 0.320, 1285.2, 0.0205, 2.70, 1.174),
    (40, 0.299, 1416.4, 0.0202, 2.72, 0.633),
    (50, 0.207, 1492.0, 0.0127, 2.93, 0.354),
    (60, 0.147, 1531.3, 0.0088, 2.86, 0.134),
]


def adam_records(every):
    return [
        healthy(
            step,
            feature_std=share / 128**0.5,
            parameter_norm=norm,
            update_norm=moved * norm,
            rankme_projection=rank,
            loss=loss,
        )
        for step, share, norm, moved, rank, loss in ADAM_AT_THE_RATE_OF_LARS
        if step % every == 0
    ]


@pytest.mark.parametrize('every', [10, 20])
@pytest.mark.parametrize('decay', [0.0, 1e-6])
def test_weights_that_blow_up_name_the_learning_rate(every, decay):
    """At every record, in the warm-up too, and the weight decay is not blamed.

    By the records of every 20th step no step is longer than 5 % of the weights: they have grown.
    """
    config = sample_config(optimizer__weight_decay=decay)
    known = facts(config)._replace(initial_norm=24.0)
    history = adam_records(every)
    for count in range(1, len(history) + 1):
        found = {alarm.name: alarm for alarm in standing(history[:count], known)}
        assert found['learning_rate'].severity == ALARM
        assert 'times as long' in found['learning_rate'].evidence
        assert 'AdamW takes a thousandth' in found['learning_rate'].remedy
        if decay == 0:
            assert found['weight_decay'].severity == WATCH
        if 'collapse' in found:
            assert 'the learning rate' in found['collapse'].cause
    assert found['collapse'].severity == ALARM
    # Weights that grow slowly, by 2 % of their first length in each step at most, are no sign.
    slow = [healthy(step, parameter_norm=24 * (1 + 0.019 * step)) for step in range(100, 600, 100)]
    assert 'learning_rate' not in {alarm.name for alarm in standing(slow, known)}


def test_a_std_that_falls_to_nothing_is_a_collapse_at_any_step():
    """0.0083 and then 0.0009 of 1/sqrt(256), in 12 steps of a warm-up of 32, is an alarm.

    One that is low from the start, as another network's may be, waits until trends are judged.
    """
    config = sample_config(warmup_steps=32)
    known = facts(config)._replace(projection_size=256)

    def found(*stds):
        history = [
            healthy(4 * (i + 1), feature_std=std, online_target_cosine=1.0)
            for i, std in enumerate(stds)
        ]
        return {alarm.name: alarm for alarm in standing(history, known)}

    falls = found(0.0083, 0.0009)
    assert falls['collapse'].severity == ALARM
    assert 'stop-gradient' not in falls['collapse'].cause
    assert found(0.03, 0.0083, 0.0009)['collapse'].severity == ALARM
    assert found(0.03, 0.0009) == {}
    assert found(0.0083, 0.0083) == {}
    assert found(0.05, 0.012, 0.011)['collapse'].severity == WATCH


def test_adam_at_the_rate_of_lars_is_provoked(monkeypatch):
    """A tiny run, past the guard: the alarm comes with the first record and names the rate."""
    monkeypatch.setattr(build, 'MOST_OF_ADAM', math.inf)
    config = make_config(optimizer__name='adamw', optimizer__base_learning_rate=2.0)
    byol = make_byol()
    params, _ = byol.init(jax.random.key(0), SIZE)
    history = run(config, byol, stop=30)
    known = facts(config)._replace(initial_norm=float(optax.tree.norm(params)))
    for count in range(1, 4):
        raised = {alarm.name: alarm for alarm in standing(history[:count], known)}
        assert raised['learning_rate'].severity == ALARM
        assert 'times as long' in raised['learning_rate'].evidence
    healthy_run = facts(make_config())._replace(initial_norm=known.initial_norm)
    assert standing(run(make_config(), byol, stop=30), healthy_run) == []


DARK = Finding('dark_pictures', True, 'the largest value is 16 of 255', '12 bits', 'scale them')


def test_odd_pixels_stand_from_the_start_to_the_end():
    """They are alarms before the first record, and no later record clears them."""
    known = facts(sample_config())._replace(
        pixels=pixel_alarms([DARK, DARK._replace(severe=False)])
    )
    (first, second) = standing([], known)
    assert (first.severity, second.severity) == (ALARM, WATCH)
    assert first.line() == (
        'ALARM at step 0: dark_pictures: the largest value is 16 of 255. Likely cause: 12 bits. '
        'What to do: scale them.'
    )
    assert standing(records(4), known) == [first, second]
    assert standing(records(4), known._replace(pixels=())) == []


def test_no_weight_decay():
    """Weight decay 0 is a watch from the first record, and an alarm if the weights have tripled."""
    config = sample_config(optimizer__weight_decay=0.0)
    found = by_name(records(1), config)
    assert found.keys() == {'weight_decay'}
    assert found['weight_decay'].severity == WATCH
    assert 'optimizer.weight_decay' in found['weight_decay'].remedy
    grown = [*records(3), healthy(40, parameter_norm=200.0)]
    assert by_name(grown, config)['weight_decay'].severity == ALARM
    assert by_name(grown, sample_config()) == {}


@pytest.mark.parametrize(
    ('batch', 'passes', 'devices', 'spread', 'expected'),
    [
        (64, 1, 8, 0.0, None),
        (64, 1, 8, 0.1, ALARM),
        (128, 1, 8, 0.1, ALARM if 128 // 8 < 16 else WATCH),
        (256, 1, 8, 0.1, None),
        (64, 8, 1, 0.0, ALARM),
        (64, 2, 1, 0.0, None),
        (8, 1, 1, 0.0, None),
        (8, 1, 1, 0.1, None),
    ],
)
def test_small_norm_batch(batch, passes, devices, spread, expected):
    """The alarm counts the examples over which statistics are taken.

    Synchronised devices count together, others separately, and microbatches always separately.
    """
    config = sample_config(batch_size=batch, accumulate_steps=passes)
    found = by_name(records(2, stats_spread=spread), config, devices)
    assert found.keys() == ({'small_norm_batch'} if expected else set())
    if expected:
        assert found['small_norm_batch'].severity == expected
        words = 'accumulate_steps' if passes > 1 else 'BatchNorm'
        assert words in found['small_norm_batch'].remedy


def test_a_slow_source_makes_a_run_input_bound():
    """A source that takes most of the time is detected; the alarm names the setting to change."""
    config = sample_config(data__workers=1)
    plan = make_plan(config, 10_000, 1)
    watch, history = Stopwatch(plan, 0), []
    for step in range(10, 50, 10):
        begun = time.perf_counter()
        time.sleep(0.02)  # The source.
        watch.waited(time.perf_counter() - begun)
        time.sleep(0.002)  # The step.
        history.append(healthy(step) | watch.lap(step))
    found = by_name(history, config)
    assert found['input_bound'].severity == ALARM
    known = facts(config)
    if known.cores > 1:
        assert 'raise data.workers=1' in found['input_bound'].remedy
    # One slow period (another job on the disk, say) is not a trend.
    assert by_name([*records(3), history[-1]], config) == {}


def test_input_bound_with_all_cores_names_other_knobs():
    """More workers are not suggested if all cores are busy."""
    config = sample_config(data__workers=0, data__tile_size=512)
    found = by_name(records(4, input_wait_fraction=0.4), config)['input_bound']
    assert found.severity == WATCH
    assert 'more cores' in found.remedy
    assert 'data.cache_gib' in found.remedy
    assert 'views.on=accelerator' in found.remedy
    config.views.on = 'accelerator'
    found = by_name(records(4, input_wait_fraction=0.4), config)['input_bound']
    assert 'views.on' not in found.remedy


def test_a_loss_near_zero_alone_is_no_alarm():
    """A small loss with different projections is the aim of training, not an alarm."""
    assert by_name(records(4, loss=0.01), sample_config()) == {}
    trivial = by_name(records(4, loss=0.01, feature_std=0.005), sample_config())
    assert trivial.keys() == {'collapse', 'trivial_loss'}


def test_few_directions_are_a_collapse_too():
    """Projections along two directions keep their std; RankMe detects the collapse."""
    found = by_name(records(4, rankme_projection=2.0), sample_config())
    assert found.keys() == {'collapse'}
    assert '2.0 of 128 directions' in found['collapse'].evidence


def test_few_rows_use_few_directions():
    """RankMe of few rows is low for any network: with 128 hosts, two devices have 4 rows."""
    config = sample_config(batch_size=2)
    assert facts(config).monitored_rows == 4
    assert by_name(records(4, rankme_projection=3.5), config) == {}
    assert 'collapse' in by_name(records(4, rankme_projection=1.0, feature_std=0.01), config)


def test_an_early_record_does_not_blame_the_stop_gradient():
    """The target starts equal to the online network: a cosine of 1 at step 1 is no evidence."""
    collapsed = records(4, rankme_projection=2.0, update_norm=20.0)
    history = [healthy(1, online_target_cosine=1.0), *collapsed]
    assert 'learning rate' in by_name(history, sample_config())['collapse'].cause
    never_apart = [{**record, 'online_target_cosine': 1.0} for record in collapsed]
    assert 'stop-gradient' in by_name(never_apart, sample_config())['collapse'].cause


def test_a_collapse_by_large_steps_names_the_learning_rate():
    """If earlier steps moved the weights by over a tenth, they are named as the likely cause."""
    history = [healthy(10, update_norm=20.0), *records(4, rankme_projection=2.0)[1:]]
    assert 'learning rate' in by_name(history, sample_config())['collapse'].cause


def test_a_loss_of_chance_names_the_learning_rate():
    """After the warm-up, a loss at the level of chance means that nothing is learned."""
    assert by_name(records(4, loss=3.9), sample_config())['learning_rate'].severity == ALARM
    warming = sample_config(warmup_steps=100)
    assert by_name(records(4, loss=3.9), warming) == {}


def test_one_record_is_no_trend():
    """A single bad record, or the first steps, raise no alarm about a trend."""
    bad = {'feature_std': 0.001, 'loss': 0.001, 'rankme_projection': 1.0, 'update_norm': 30.0}
    assert by_name([*records(3), healthy(40, **bad)], sample_config()) == {}
    assert by_name([healthy(2, **bad), healthy(4, **bad)], sample_config()) == {}


def test_non_finite_names_numbers_and_checkpoint():
    """A metric that is not finite is named, with the checkpoint that is kept."""
    known = facts(sample_config())
    alarm = non_finite(70, healthy(70, loss=float('nan')), known, saved=60)
    assert alarm.evidence.startswith('loss not finite')
    assert 'step 60' in alarm.evidence
    assert 'none was saved' in non_finite(70, healthy(70), known, saved=0).evidence


def test_lines_are_whole_sentences():
    """A line has severity, step, evidence, cause and remedy."""
    alarm = by_name(records(4, rankme_projection=2.0), sample_config())['collapse']
    line = alarm.line()
    assert line.startswith('ALARM at step 40: collapse: ')
    assert '\n' not in line
    assert alarm.evidence in line
    assert alarm.cause in line
    assert alarm.remedy in line


# A method that minimises the negative mean cosine, and one that contrasts 1,000 examples.
COSINE, CONTRAST = LossScale(-1, 0, 1), LossScale(0, 6.9, math.inf)


@pytest.mark.parametrize(
    ('scale', 'low', 'near_low', 'near_chance', 'chance'),
    [
        (Byol.loss_scale, 0.099, 0.101, 3.59, 3.61),
        (COSINE, -0.976, -0.974, -0.11, -0.09),
        (CONTRAST, 0.172, 0.173, 6.2, 6.22),
    ],
    ids=['byol', 'cosine', 'contrast'],
)
def test_the_loss_is_judged_by_the_scale_of_the_method(scale, low, near_low, near_chance, chance):
    """2.5 % of the way from the lowest loss to chance is trivial, 90 % of it is chance."""
    known = facts(sample_config())._replace(loss_scale=scale)

    def found(**changes):
        return {alarm.name: alarm for alarm in standing(records(4, **changes), known)}

    assert found(loss=low, feature_std=0.005).keys() == {'collapse', 'trivial_loss'}
    assert found(loss=near_low, feature_std=0.005).keys() == {'collapse'}
    assert found(loss=low) == {}
    assert found(loss=near_chance) == {}
    (raised,) = found(loss=chance).values()
    assert (raised.name, raised.severity) == ('learning_rate', ALARM)
    assert f'(chance: {scale.chance:g})' in raised.evidence
    trivial = found(loss=low, feature_std=0.005)['trivial_loss']
    assert f'(lowest {scale.lowest:g}, chance {scale.chance:g})' in trivial.evidence


@pytest.mark.parametrize('missing', sorted(healthy(1).keys() - {'step', 'loss'}))
@pytest.mark.parametrize('broken', [False, True], ids=['healthy', 'broken'])
def test_a_missing_metric_only_ends_the_rules_that_need_it(missing, broken):
    """A method without predictor, target or projection raises the alarms of its other metrics."""
    config = sample_config(optimizer__weight_decay=0.0, target__tau_base=0.5, batch_size=64)
    config.accumulate_steps = 8
    bad = {
        'loss': 0.01,
        'feature_std': 0.001,
        'rankme_projection': 1.0,
        'update_norm': 30.0,
        'input_wait_fraction': 0.9,
    }
    history = [
        {name: value for name, value in record.items() if name != missing}
        for record in records(4, **(bad if broken else {}))
    ]
    found = by_name(history, config)
    always = {'weight_decay', 'target_follows', 'small_norm_batch'}
    all_names = always | {'collapse', 'trivial_loss', 'learning_rate', 'input_bound'}
    lost = {
        'feature_std': {'trivial_loss'},
        'online_target_cosine': {'target_follows'},
        'parameter_norm': {'weight_decay', 'learning_rate'},
        'update_norm': {'learning_rate'},
        'stats_spread': {'small_norm_batch'},
        'input_wait_fraction': {'input_bound'},
    }.get(missing, set())
    assert found.keys() == (all_names if broken else always) - lost
    if broken:
        # If one of its two measures is missing, the other detects the collapse.
        evidence = found['collapse'].evidence
        assert ('feature std' in evidence) == (missing != 'feature_std')
        assert ('RankMe' in evidence) == (missing != 'rankme_projection')


def test_records_of_a_loss_alone():
    """With only a loss in the records, a loss at chance is an alarm, and nothing fails."""
    config = sample_config()
    bare = [{'step': 10 * n, 'loss': 3.9} for n in range(1, 5)]
    assert by_name(bare, config).keys() == {'learning_rate'}
    assert by_name([{**record, 'loss': 1.0} for record in bare], config) == {}
    nan = non_finite(10, {'loss': math.nan}, facts(config), saved=0)
    assert nan.evidence == 'loss not finite (loss nan); none was saved'


def test_a_collapse_without_a_target_blames_no_target():
    """A method that has no target network is not told to slow it down."""
    history = [
        {k: v for k, v in record.items() if k != 'online_target_cosine'}
        for record in records(4, rankme_projection=2.0)
    ]
    alarm = by_name(history, sample_config(target__tau_base=0.5))['collapse']
    assert 'target' not in alarm.cause + alarm.remedy
