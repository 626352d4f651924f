"""The learning rate and tau by step."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from byol_jax.training.schedules import learning_rate_schedule, target_tau


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
    """After the last step, the rate does not rise along the cosine again."""
    assert float(learning_rate_schedule(3.2, 10, 110)(150)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('base', [0.99, 0.996, 1.0, 0.0])
@pytest.mark.parametrize('step', [0, 1, 500, 999, 1000])
def test_target_tau(base, step):
    """tau goes from its base to 1 along half a cosine, jitted or not."""
    expected = 1 - (1 - base) * (math.cos(math.pi * step / 1000) + 1) / 2
    jitted = jax.jit(target_tau, static_argnums=(1, 2))
    assert float(target_tau(step, 1000, base)) == pytest.approx(expected, abs=2e-7)
    assert float(jitted(jnp.int32(step), 1000, base)) == pytest.approx(expected, abs=2e-7)


def test_target_tau_known_values():
    """tau is its base at step 0, half-way to 1 in the middle and 1 at the end."""
    actual = [float(target_tau(step, 1000, 0.99)) for step in (0, 500, 1000)]
    np.testing.assert_allclose(actual, [0.99, 0.995, 1.0], atol=2e-7)
