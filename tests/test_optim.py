"""LARS, its exclusions and the learning-rate schedule."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from byol_jax.errors import UserError
from byol_jax.optim import adapted_params, describe_excluded, lars, learning_rate_schedule

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


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    'conv': {'kernel': shaped(3, 3, 4, 8)},
    'bn': {'scale': shaped(8), 'bias': shaped(8)},
    'group_norm': {'gamma': shaped(1, 1, 1, 8), 'beta': shaped(1, 1, 1, 8)},
    'attention': {'query': {'kernel': shaped(8, 2, 4), 'bias': shaped(2, 4)}},
    'positions': shaped(1, 16, 8),
    'temperature': shaped(),
    'layer_scale': shaped(8),
    'score': {'kernel': shaped(8, 1), 'bias': shaped(1)},
    'head': {'kernel': shaped(8, 10), 'bias': shaped(10)},
}


def test_adapted_params_by_structure():
    """Biases, scales and vectors of any layout are excluded; every kernel is kept, even [D, 1]."""
    assert adapted_params(PARAMS) == {
        'conv': {'kernel': True},
        'bn': {'scale': False, 'bias': False},
        'group_norm': {'gamma': False, 'beta': False},
        'attention': {'query': {'kernel': True, 'bias': False}},
        'positions': True,
        'temperature': False,
        'layer_scale': False,
        'score': {'kernel': True, 'bias': False},
        'head': {'kernel': True, 'bias': False},
    }


def test_adapted_params_behind_the_tap():
    """A parameter behind the tap is excluded although it is a kernel."""
    adapted = adapted_params(PARAMS, frozenset({'head/kernel', 'head/bias'}))
    assert adapted['head'] == {'kernel': False, 'bias': False}
    assert adapted['conv']['kernel']


def test_nothing_excluded_is_an_error():
    """A network in which no bias or norm is recognised is refused, naming its parameters."""
    params = {'dense': {'kernel': shaped(3, 4), 'offset': shaped(2, 2)}}
    with pytest.raises(UserError, match=r'(?s)excluded from.*dense/kernel, dense/offset'):
        adapted_params(params)


def test_nothing_left_is_an_error():
    """A network in which everything would be excluded is refused, naming its parameters."""
    with pytest.raises(UserError, match=r'(?s)left for.*dense/bias, dense/w'):
        adapted_params({'dense': {'w': shaped(3), 'bias': shaped(3)}})


def test_describe_excluded_counts():
    """The line a run prints counts parameters exactly and leaves by kind."""
    params = {
        'a': {'bn': {'scale': shaped(8), 'bias': shaped(8)}, 'conv': {'kernel': shaped(10, 100)}},
        'b': {'bn': {'scale': shaped(4), 'bias': shaped(4)}, 'conv': {'bias': shaped(1000)}},
    }
    assert describe_excluded(params, adapted_params(params)) == (
        '1,024 of 2,024 parameters get no weight decay and no LARS adaptation: '
        'bn/bias x2, bn/scale x2, conv/bias x1'
    )
