"""LARS, AdamW, the frozen start and the learning-rate schedule."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from byol_jax.errors import UserError
from byol_jax.models.tap import path_name
from byol_jax.training.optimizers import (
    adamw,
    lars,
    learning_rate_schedule,
    make_optimizer,
)

MOMENTUM, ETA = 0.9, 1e-3
STEPS = 6

# Adapted leaves, an ordinary one and two with a norm of 0 somewhere, and one excluded leaf.
SHAPES = {'kernel': (3, 4), 'still': (4, 2), 'zero': (2, 3), 'bias': (4,)}
ADAPTED = {name: name != 'bias' for name in SHAPES}


def start_and_gradients():
    """float64 parameters, and for every step float64 gradients: of 'still' they are 0."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    params['zero'][:] = 0
    gradients = [
        {name: rng.normal(size=shape) * (name != 'still') for name, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]
    return params, gradients


def changing_rate(step):
    return 0.5 / (1 + step)


def reference_lars(weight_decay, rate):
    """Parameters after every step: DeepMind's byol/utils/optimizers.py, leaf by leaf in float64."""
    params, gradients = start_and_gradients()
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = []
    for step in range(STEPS):
        for name, g in gradients[step].items():
            update = g
            if ADAPTED[name]:
                update = g + weight_decay * params[name]
                w, u = np.linalg.norm(params[name]), np.linalg.norm(update)
                update = update * (ETA * w / u if w > 0 and u > 0 else 1)
            momentum[name] = MOMENTUM * momentum[name] + update
            params[name] = params[name] - rate(step) * momentum[name]
        history.append(dict(params))
    return history


def run(optimizer):
    params, gradients = jax.tree.map(jnp.float32, start_and_gradients())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    history = []
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


@pytest.mark.parametrize('weight_decay', [0.05, 0.0])
def test_lars_matches_numpy(weight_decay):
    """Six steps of LARS with a changing rate are decay, trust ratio, momentum, rate, in order."""
    actual = run(
        lars(
            changing_rate,
            ADAPTED,
            weight_decay=weight_decay,
            momentum=MOMENTUM,
            trust_coefficient=ETA,
        )
    )
    for step, expected in enumerate(reference_lars(weight_decay, changing_rate)):
        for name in SHAPES:
            np.testing.assert_allclose(
                actual[step][name], expected[name], rtol=1e-5, atol=1e-7, err_msg=f'{name} {step}'
            )


def test_lars_trust_ratio_of_zero_norms_is_one():
    """Zero parameters move by the plain gradient, and zero updates leave a leaf as it is."""
    start, gradients = start_and_gradients()
    first = run(lars(lambda step: 0.5, ADAPTED, weight_decay=0.0))[0]
    np.testing.assert_allclose(first['zero'], -0.5 * gradients[0]['zero'], rtol=1e-6)
    np.testing.assert_array_equal(first['still'], start['still'].astype(np.float32))


def test_lars_excluded_parameters_get_plain_momentum():
    """A leaf that is not adapted follows optax.sgd: no decay, no trust ratio."""
    actual = run(lars(changing_rate, ADAPTED, weight_decay=0.05))
    expected = run(optax.sgd(changing_rate, MOMENTUM))
    # With the rate inside, optax.sgd's momentum is the same as ours: it too scales last.
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a['bias'], e['bias'], rtol=1e-6)


def optax_lars(rate):
    return optax.lars(
        rate,
        weight_decay=0.05,
        weight_decay_mask=ADAPTED,
        trust_coefficient=ETA,
        trust_ratio_mask=ADAPTED,
        momentum=MOMENTUM,
    )


def test_lars_equals_optax_while_the_rate_is_constant():
    """With a constant learning rate the order does not matter, and optax.lars agrees."""
    actual = run(lars(lambda step: 0.5, ADAPTED, weight_decay=0.05))
    expected = run(optax_lars(0.5))
    for a, e in zip(actual, expected, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(a[name], e[name], rtol=1e-5, atol=1e-7)


def test_lars_differs_from_optax_when_the_rate_changes():
    """A lower rate acts at once on the momentum too; in optax.lars old rates linger there."""
    ours = run(lars(changing_rate, ADAPTED, weight_decay=0.05))
    theirs = run(optax_lars(changing_rate))
    moved = [np.linalg.norm(h[-1]['bias'] - h[-2]['bias']) for h in (ours, theirs)]
    assert moved[0] < 0.7 * moved[1]


B1, B2, EPSILON = 0.8, 0.95, 1e-3


def reference_adamw(weight_decay, rate):
    """Parameters after every step: arXiv:1711.05101, Algorithm 2, decay times the rate, float64."""
    params, gradients = start_and_gradients()
    mean = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    square = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = []
    for step in range(STEPS):
        for name, g in gradients[step].items():
            mean[name] = B1 * mean[name] + (1 - B1) * g
            square[name] = B2 * square[name] + (1 - B2) * g**2
            unbiased = mean[name] / (1 - B1 ** (step + 1))
            root = np.sqrt(square[name] / (1 - B2 ** (step + 1)))
            decay = weight_decay * params[name] * ADAPTED[name]
            params[name] = params[name] - rate(step) * (unbiased / (root + EPSILON) + decay)
        history.append(dict(params))
    return history


def torch_adamw(weight_decay, rate):
    """The same by torch.optim.AdamW in float64."""
    torch = pytest.importorskip('torch')
    params, gradients = start_and_gradients()
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    options = [
        {'params': [tensor], 'weight_decay': weight_decay * ADAPTED[name]}
        for name, tensor in tensors.items()
    ]
    optimizer = torch.optim.AdamW(options, lr=1.0, betas=(B1, B2), eps=EPSILON)
    history = []
    for step, g in enumerate(gradients):
        for group in optimizer.param_groups:
            group['lr'] = rate(step)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(g[name])
        optimizer.step()
        history.append({name: x.detach().numpy().copy() for name, x in tensors.items()})
    return history


@pytest.mark.parametrize('weight_decay', [0.3, 0.0])
@pytest.mark.parametrize('reference', [reference_adamw, torch_adamw])
def test_adamw_matches(reference, weight_decay):
    """Six steps with a changing rate equal float64 NumPy and PyTorch, decay on kernels only."""
    actual = run(
        adamw(changing_rate, ADAPTED, weight_decay=weight_decay, b1=B1, b2=B2, epsilon=EPSILON)
    )
    for step, expected in enumerate(reference(weight_decay, changing_rate)):
        for name in SHAPES:
            np.testing.assert_allclose(
                actual[step][name], expected[name], rtol=1e-5, atol=1e-6, err_msg=f'{name} {step}'
            )


def test_adamw_leaves_untrained_parameters():
    """A leaf without gradient that does not decay keeps its bits: 0 / epsilon, not 0 / 0."""
    untrained = ADAPTED | {'still': False}
    last = run(adamw(changing_rate, untrained, weight_decay=0.3))[-1]
    start = start_and_gradients()[0]['still'].astype(np.float32)
    np.testing.assert_array_equal(last['still'], start)


PARTS = ('encoder', 'projector', 'predictor')
FROZEN = 3


def options(name, **more):
    given = {'weight_decay': 0.05, 'momentum': MOMENTUM, 'trust_coefficient': ETA}
    return SimpleNamespace(name=name, b1=B1, b2=B2, epsilon=EPSILON, **given, **more)


def run_parts(name, freeze_steps, rate=changing_rate, skip=0):
    """Parameters of a whole network after every step, and the last state; `skip` leaves out steps.

    The first `skip` gradients are left out, and the schedule goes on as if they had been there.
    """
    params, gradients = jax.tree.map(jnp.float32, start_and_gradients())
    params = {part: jax.tree.map(lambda x, i=i: x + i, params) for i, part in enumerate(PARTS)}
    optimizer = make_optimizer(
        options(name), lambda step: rate(step + skip), dict.fromkeys(PARTS, ADAPTED), freeze_steps
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    history = [params]
    for g in gradients[skip:]:
        updates, state = update(dict.fromkeys(PARTS, g), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def assert_same(actual, expected, rtol=1e-6):
    """Equal trees, up to how two programs round; with rtol=0 bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol)


@pytest.mark.parametrize('name', ['lars', 'adamw'])
def test_frozen_start(name):
    """For freeze_steps the encoder keeps its bits; then it starts as under a fresh optimizer.

    Fresh are LARS's momentum, AdamW's moments and its bias correction; the learning rate is the
    schedule's own for that step.
    """
    history, _ = run_parts(name, FROZEN)
    for params in history[: FROZEN + 1]:
        assert_same(params['encoder'], history[0]['encoder'], rtol=0)
    fresh, _ = run_parts(name, 0, skip=FROZEN)
    for params, expected in zip(history[FROZEN:], fresh, strict=True):
        assert_same(params['encoder'], expected['encoder'])
    moved = history[FROZEN + 1]['encoder']['kernel'] != history[0]['encoder']['kernel']
    assert moved.all()


@pytest.mark.parametrize('name', ['lars', 'adamw'])
def test_frozen_start_leaves_the_heads_alone(name):
    """Projector and predictor train from the first step as if nothing were frozen."""
    frozen, free = run_parts(name, FROZEN)[0], run_parts(name, 0)[0]
    for params, expected in zip(frozen, free, strict=True):
        for part in ('projector', 'predictor'):
            assert_same(params[part], expected[part])


def test_frozen_start_withstands_gradients_that_are_not_finite():
    """What the encoder's gradients are while it is held does not matter at all."""
    params = {part: {'kernel': jnp.ones((2, 2))} for part in PARTS}
    optimizer = make_optimizer(
        options('adamw'), changing_rate, {part: {'kernel': True} for part in PARTS}, 1
    )
    start = optimizer.init(params)
    bad = {**params, 'encoder': {'kernel': jnp.full((2, 2), jnp.nan)}}
    updates, state = optimizer.update(bad, start, params)
    assert not np.any(updates['encoder']['kernel'])
    updates, _ = optimizer.update(params, state, params)
    assert np.isfinite(updates['encoder']['kernel']).all()


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('lars', ['[2]/trace', '[3]/count']),
        ('adamw', ['[0]/count', '[0]/mu', '[0]/nu', '[2]/count']),
    ],
)
def test_state_without_a_frozen_start(name, expected):
    """With freeze_steps=0 the state has the paths that checkpoints were saved under."""
    _, state = run_parts(name, 0)
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert sorted({'/'.join(path.split('/')[:2]) for path in paths}) == expected


def test_make_optimizer_hands_the_options_on():
    """The config's keys reach LARS and AdamW under their names."""
    given = {'weight_decay': 0.05}
    whole = {'encoder': ADAPTED}
    for name, made in (
        ('lars', lars(changing_rate, whole, **given, momentum=MOMENTUM, trust_coefficient=ETA)),
        ('adamw', adamw(changing_rate, whole, **given, b1=B1, b2=B2, epsilon=EPSILON)),
    ):
        params, gradients = jax.tree.map(jnp.float32, start_and_gradients())
        asked = make_optimizer(options(name), changing_rate, whole, 0)
        results = []
        for optimizer in (asked, made):
            state = optimizer.init({'encoder': params})
            for g in gradients[:2]:
                updates, state = optimizer.update({'encoder': g}, state, {'encoder': params})
            results.append((updates, state))
        assert_same(*results)


def test_unknown_optimizer():
    """A name that is not known is answered with the nearest one and with all."""
    with pytest.raises(UserError, match=r"'adam': .*Did you mean 'adamw'\? There are: 'lars', 'ad"):
        make_optimizer(options('adam'), changing_rate, ADAPTED, 0)


@pytest.mark.parametrize(
    ('warmup', 'step', 'expected'),
    [
        (10, 0, 0.0),
        (10, 1, 0.32),
        (10, 9, 2.88),
        (10, 10, 3.2),
        (10, 11, 3.2 * (1 + math.cos(math.pi / 100)) / 2),
        (10, 60, 1.6),
        (10, 109, 3.2 * (1 + math.cos(math.pi * 0.99)) / 2),
        (10, 110, 0.0),
        (0, 0, 3.2),
        (0, 1, 3.2 * (1 + math.cos(math.pi / 110)) / 2),
        (0, 55, 1.6),
        (0, 110, 0.0),
    ],
)
def test_learning_rate_schedule(warmup, step, expected):
    """Linear from 0 to the peak over the warm-up, then half a cosine to 0, jitted or not."""
    schedule = learning_rate_schedule(3.2, warmup, 110)
    assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_learning_rate_stays_at_zero_behind_the_end():
    """A step behind the last one does not go up the cosine again."""
    assert float(learning_rate_schedule(3.2, 10, 110)(150)) == pytest.approx(0, abs=1e-6)
