"""Optimizers by name: LARS and AdamW against NumPy, own ones, and the frozen start."""

from __future__ import annotations

import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from byol_jax.errors import UserError
from byol_jax.models.network import path_name
from byol_jax.training.optimizers import build_optimizer, lars

MOMENTUM, ETA = 0.9, 1e-3
STEPS = 6

# Adapted leaves, an ordinary one and two with a norm of 0, and one excluded leaf.
SHAPES = {'kernel': (3, 4), 'still': (4, 2), 'zero': (2, 3), 'bias': (4,)}
DECAYS = {name: name != 'bias' for name in SHAPES}


def start_and_gradients():
    """float64 parameters, and float64 gradients for every step; those of 'still' are 0."""
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
    """Parameters after every step: DeepMind's byol/utils/optimizers.py, each leaf in float64."""
    params, gradients = start_and_gradients()
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = []
    for step in range(STEPS):
        for name, g in gradients[step].items():
            update = g
            if DECAYS[name]:
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
    """Six steps of LARS with a changing rate: decay, trust ratio, momentum, rate, in this order."""
    actual = run(
        lars(
            changing_rate,
            weight_decay=weight_decay,
            momentum=MOMENTUM,
            trust_coefficient=ETA,
            mask=DECAYS,
        )
    )
    for step, expected in enumerate(reference_lars(weight_decay, changing_rate)):
        for name in SHAPES:
            np.testing.assert_allclose(
                actual[step][name], expected[name], rtol=1e-5, atol=1e-7, err_msg=f'{name} {step}'
            )


def test_lars_trust_ratio_of_zero_norms_is_one():
    """Zero parameters move by the plain gradient, and zero updates do not change a leaf."""
    start, gradients = start_and_gradients()
    first = run(lars(lambda step: 0.5, mask=DECAYS))[0]
    np.testing.assert_allclose(first['zero'], -0.5 * gradients[0]['zero'], rtol=1e-6)
    np.testing.assert_array_equal(first['still'], start['still'].astype(np.float32))


def test_lars_excluded_parameters_get_plain_momentum():
    """A leaf that is not adapted follows optax.sgd: no decay, no trust ratio."""
    actual = run(lars(changing_rate, weight_decay=0.05, mask=DECAYS))
    expected = run(optax.sgd(changing_rate, MOMENTUM))
    # With the rate inside, optax.sgd's momentum is the same as ours: it also scales last.
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a['bias'], e['bias'], rtol=1e-6)


def optax_lars(rate):
    return optax.lars(
        rate,
        weight_decay=0.05,
        weight_decay_mask=DECAYS,
        trust_coefficient=ETA,
        trust_ratio_mask=DECAYS,
        momentum=MOMENTUM,
    )


def test_lars_equals_optax_while_the_rate_is_constant():
    """With a constant learning rate, the order does not matter, and optax.lars agrees."""
    actual = run(lars(0.5, weight_decay=0.05, mask=DECAYS))
    expected = run(optax_lars(0.5))
    for a, e in zip(actual, expected, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(a[name], e[name], rtol=1e-5, atol=1e-7)


def test_lars_differs_from_optax_when_the_rate_changes():
    """A lower rate also acts at once on the momentum; in optax.lars, old rates linger in it."""
    ours = run(lars(changing_rate, weight_decay=0.05, mask=DECAYS))
    theirs = run(optax_lars(changing_rate))
    moved = [np.linalg.norm(h[-1]['bias'] - h[-2]['bias']) for h in (ours, theirs)]
    assert moved[0] < 0.7 * moved[1]


B1, B2, EPSILON = 0.8, 0.95, 1e-3


def reference_adamw(weight_decay, rate):
    """Parameters after every step: arXiv:1711.05101, Algorithm 2, decay times rate, float64."""
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
            decay = weight_decay * params[name] * DECAYS[name]
            params[name] = params[name] - rate(step) * (unbiased / (root + EPSILON) + decay)
        history.append(dict(params))
    return history


def torch_adamw(weight_decay, rate):
    """The same by torch.optim.AdamW in float64."""
    torch = pytest.importorskip('torch')
    params, gradients = start_and_gradients()
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    options = [
        {'params': [tensor], 'weight_decay': weight_decay * DECAYS[name]}
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
        build_optimizer(
            'adamw',
            {'b1': B1, 'b2': B2, 'epsilon': EPSILON},
            learning_rate=changing_rate,
            weight_decay=weight_decay,
            decay_mask=DECAYS,
        )
    )
    for step, expected in enumerate(reference(weight_decay, changing_rate)):
        for name in SHAPES:
            np.testing.assert_allclose(
                actual[step][name], expected[name], rtol=1e-5, atol=1e-6, err_msg=f'{name} {step}'
            )


def test_adamw_leaves_untrained_parameters():
    """A leaf without gradient and decay keeps its bits: 0 / epsilon, not 0 / 0."""
    untrained = DECAYS | {'still': False}
    adamw = build_optimizer(
        'adamw', {}, learning_rate=changing_rate, weight_decay=0.3, decay_mask=untrained
    )
    last = run(adamw)[-1]
    start = start_and_gradients()[0]['still'].astype(np.float32)
    np.testing.assert_array_equal(last['still'], start)


PARTS = ('encoder', 'projector', 'predictor')
FROZEN = 3


KWARGS = {
    'lars': {'momentum': MOMENTUM, 'trust_coefficient': ETA},
    'adamw': {'b1': B1, 'b2': B2, 'eps': EPSILON},
    'optax:sgd': {'momentum': MOMENTUM, 'nesterov': True},
    'optax:lamb': {},
}


def run_parts(name, freeze_steps, rate=changing_rate, skip=0):
    """Parameters of a whole network after every step, and the last state.

    The first `skip` gradients are left out; the schedule continues as if they had been used.
    """
    params, gradients = jax.tree.map(jnp.float32, start_and_gradients())
    params = {part: jax.tree.map(lambda x, i=i: x + i, params) for i, part in enumerate(PARTS)}
    optimizer = build_optimizer(
        name,
        KWARGS[name],
        learning_rate=lambda step: rate(step + skip),
        weight_decay=0.0 if name == 'optax:sgd' else 0.05,
        decay_mask=dict.fromkeys(PARTS, DECAYS),
        freeze_steps=freeze_steps,
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    history = [params]
    for g in gradients[skip:]:
        updates, state = update(dict.fromkeys(PARTS, g), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def assert_same(actual, expected, rtol=1e-6):
    """Trees are equal, up to the rounding of two programs; with rtol=0 bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol)


@pytest.mark.parametrize('name', KWARGS)
def test_frozen_start(name):
    """The encoder keeps its bits for freeze_steps; then it starts as under a new optimizer.

    Momentum, moments and bias correction are new, for any optimizer; the learning rate is the
    schedule's for that step.
    """
    history, _ = run_parts(name, FROZEN)
    for params in history[: FROZEN + 1]:
        assert_same(params['encoder'], history[0]['encoder'], rtol=0)
    fresh, _ = run_parts(name, 0, skip=FROZEN)
    for params, expected in zip(history[FROZEN:], fresh, strict=True):
        assert_same(params['encoder'], expected['encoder'])
    moved = history[FROZEN + 1]['encoder']['kernel'] != history[0]['encoder']['kernel']
    assert moved.all()


@pytest.mark.parametrize('name', KWARGS)
def test_frozen_start_leaves_the_heads_alone(name):
    """Projector and predictor train from the first step as if nothing were frozen."""
    frozen, free = run_parts(name, FROZEN)[0], run_parts(name, 0)[0]
    for params, expected in zip(frozen, free, strict=True):
        for part in ('projector', 'predictor'):
            assert_same(params[part], expected[part])


def test_frozen_start_withstands_gradients_that_are_not_finite():
    """The encoder's gradients do not matter while it is frozen."""
    params = {part: {'kernel': jnp.ones((2, 2))} for part in PARTS}
    optimizer = build_optimizer(
        'adamw',
        {},
        learning_rate=changing_rate,
        weight_decay=0.1,
        decay_mask={part: {'kernel': True} for part in PARTS},
        freeze_steps=1,
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
    """With freeze_steps=0 the state has the paths of saved checkpoints."""
    _, state = run_parts(name, 0)
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert sorted({'/'.join(path.split('/')[:2]) for path in paths}) == expected


def test_what_is_built_is_what_the_factory_makes():
    """It equals optax's own factory, called with schedule, decay, mask and arguments."""
    given = {'weight_decay': 0.05}
    for name, kwargs, made in (
        ('lars', KWARGS['lars'], lars(changing_rate, mask=DECAYS, **given)),
        ('optax:lars', {'momentum': MOMENTUM}, optax_lars(changing_rate)),
        ('adamw', {'b1': B1}, optax.adamw(changing_rate, b1=B1, mask=DECAYS, **given)),
        ('optax:lion', {}, optax.lion(changing_rate, mask=DECAYS, **given)),
        ('optax:adam', {'b2': B2}, optax.adam(changing_rate, b2=B2)),
    ):
        asked = build_optimizer(
            name,
            kwargs,
            learning_rate=changing_rate,
            weight_decay=0.0 if name == 'optax:adam' else 0.05,
            decay_mask=DECAYS,
        )
        assert_same(run(asked)[-1], run(made)[-1])


@pytest.fixture
def own(monkeypatch):
    """A user's own factories, importable as 'own_optimizers'."""

    def clipped(learning_rate, norm=1.0, weight_decay=0.0, decay_mask=None):
        return optax.chain(
            optax.clip_by_global_norm(norm),
            optax.add_decayed_weights(weight_decay, decay_mask),
            optax.sgd(learning_rate),
        )

    def decays_all(learning_rate, weight_decay):
        return optax.adamw(learning_rate, weight_decay=weight_decay)

    module = types.ModuleType('own_optimizers')
    module.clipped, module.decays_all = clipped, decays_all
    module.nothing = lambda learning_rate: None
    monkeypatch.setitem(sys.modules, 'own_optimizers', module)


@pytest.mark.usefixtures('own')
def test_an_optimizer_of_ones_own():
    """SGD with clipping, named by its module: it gets the schedule, the decay and the mask."""
    optimizer = build_optimizer(
        'own_optimizers:clipped',
        {'norm': 0.1},
        learning_rate=changing_rate,
        weight_decay=0.05,
        decay_mask=DECAYS,
    )
    params, gradients = start_and_gradients()
    for step, (actual, g) in enumerate(zip(run(optimizer), gradients, strict=True)):
        length = math.sqrt(sum(np.sum(x**2) for x in g.values()))
        for name, x in g.items():
            update = x * 0.1 / length + 0.05 * params[name] * DECAYS[name]
            params[name] = params[name] - changing_rate(step) * update
            np.testing.assert_allclose(actual[name], params[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures('own')
@pytest.mark.parametrize(
    ('name', 'kwargs', 'says'),
    [
        ('adam', {}, ["optimizer.name='adam' is not a known", "mean 'adamw'?", 'lars, adamw']),
        ('optax:adamv', {}, ["module 'optax' has no 'adamv'", "Did you mean 'adam"]),
        ('lars', {'momentun': 1}, ["'lars' takes no argument 'momentun'", "mean 'momentum'?"]),
        ('adamw', {'momentum': 1}, ["optimizer.kwargs: 'adamw' takes no", 'It takes: ', 'eps']),
        ('adamw', {'weight_decay': 1}, ["takes no argument 'weight_decay'"]),
        ('optax:sgd', {}, ["weight_decay=0.1: 'optax:sgd' has no argument 'weight_decay'", '0,']),
        ('own_optimizers:decays_all', {}, ["has no argument 'mask'"]),
    ],
)
def test_what_cannot_be_built(name, kwargs, says):
    """A line says what was given, what exists, and the nearest of it."""
    with pytest.raises(UserError) as caught:
        build_optimizer(
            name, kwargs, learning_rate=changing_rate, weight_decay=0.1, decay_mask=DECAYS
        )
    assert '\n' not in str(caught.value)
    for words in says:
        assert words in str(caught.value)


@pytest.mark.usefixtures('own')
def test_a_factory_that_makes_something_else():
    """A result that is not an optax transformation is refused before anything is compiled."""
    with pytest.raises(UserError, match=re.escape('makes a NoneType, not an optax.Gradient')):
        build_optimizer(
            'own_optimizers:nothing',
            {},
            learning_rate=changing_rate,
            weight_decay=0.0,
            decay_mask=DECAYS,
        )
