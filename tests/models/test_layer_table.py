"""The table from which a user chooses the layer to tap."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from byol_jax.models.layer_table import layer_table
from byol_jax.models.tap import TappedEncoder

SIZE = 8


class Trunk(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name='first')(x)
        return nn.Conv(6, (1, 1), name='second')(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Trunk(name='trunk')(x)
        nn.Dense(3, name='aside')(x)
        x = nn.LayerNorm(name='norm')(x)
        x = nn.Dropout(0.5, deterministic=True, name='drop')(x)
        return nn.Dense(5, name='head')(x.mean(axis=(1, 2)))


def table(hidden_layer, frozen=()):
    """The table as {path: words after the path}, and its last lines."""
    encoder = TappedEncoder(Net(), hidden_layer)
    images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
    encoder = dataclasses.replace(
        encoder,
        behind=encoder.find_behind(variables, images),
        frozen=encoder.find_frozen(frozen, variables),
    )
    rows, sums = layer_table(encoder, SIZE).split('\n\n')
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in rows.splitlines()}, sums


def test_every_layer_has_a_row_in_the_order_they_finish():
    """A row has class, shape, parameters and operations, which are counted here by hand."""
    rows, _ = table('norm')
    paths = ['layer', 'trunk/first', 'trunk/second', 'trunk', 'aside', 'norm', 'drop', 'head']
    assert list(rows) == [*paths, 'output']
    # 64 places, 3 -> 4 channels; a multiply-add counts 2, the bias 1.
    assert rows['trunk/first'].split() == ['Conv', '8x8x4', '16', '1.79', 'k']
    assert 64 * (2 * 3 * 4 + 4) == 1792
    assert rows['trunk'].split()[:3] == ['Trunk', '8x8x6', str(16 + 30)]
    assert rows['head'].split()[:5] == ['Dense', '5', '35', '65', '(behind']
    assert 2 * 6 * 5 + 5 == 65


def test_what_is_tapped_and_what_lies_behind():
    """One layer is marked as tapped; later layers, and those that feed nothing, are not trained."""
    rows, sums = table('norm')
    marked = {path: row.partition('(')[2].rstrip(')') for path, row in rows.items() if '(' in row}
    behind = 'behind the tap: not trained'
    assert marked == {'aside': behind, 'drop': behind, 'head': behind}
    assert rows['norm'].endswith('<- tapped: the representation')
    assert sums.startswith('114 parameters: 58 trained, 56 behind the tap\n6 features, ')


def test_layers_around_the_tap_are_not_behind_it():
    """A module that contains the tapped layer, and so ends after it, is partly behind the tap."""
    rows, sums = table('trunk/first')
    assert rows['trunk'].endswith('(partly behind the tap)')
    assert rows['trunk/second'].endswith('(behind the tap: not trained)')
    assert '16 trained' in sums
    # The layer, and its mean over 64 places.
    assert 1792 + 64 * 4 + 4 == 2052
    assert '4 features, 2.05 k FLOPs a picture' in sums


def test_frozen_layers_are_marked():
    """Layers that are frozen, completely or partly, are marked."""
    rows, sums = table('norm', frozen=('trunk/first',))
    assert rows['trunk/first'].endswith('(frozen: not trained)')
    assert rows['trunk'].endswith('(partly frozen)')
    assert sums.startswith('114 parameters: 42 trained, 56 behind the tap, 16 frozen\n')
