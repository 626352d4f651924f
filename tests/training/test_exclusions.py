"""Which parameters get no weight decay and no LARS adaptation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from byol_jax.errors import UserError
from byol_jax.training.optimizers import decay_mask, describe_excluded


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    'conv': {'kernel': shaped(3, 3, 4, 8)},
    'bn': {'scale': shaped(8), 'bias': shaped(8)},
    'group_norm': {'gamma': shaped(1, 1, 1, 8), 'beta': shaped(1, 1, 1, 8)},
    'attention': {'query': {'kernel': shaped(8, 2, 4), 'bias': shaped(2, 4)}},
    'positions': shaped(1, 16, 8),
    'pos_embedding': shaped(1, 16, 8),
    'temperature': shaped(),
    'layer_scale': shaped(8),
    'score': {'kernel': shaped(8, 1), 'bias': shaped(1)},
    'head': {'kernel': shaped(8, 10), 'bias': shaped(10)},
}


def test_decay_mask_by_structure():
    """Biases, scales, positions and vectors are excluded; every kernel is kept, even [D, 1]."""
    assert decay_mask(PARAMS) == {
        'conv': {'kernel': True},
        'bn': {'scale': False, 'bias': False},
        'group_norm': {'gamma': False, 'beta': False},
        'attention': {'query': {'kernel': True, 'bias': False}},
        'positions': True,
        'pos_embedding': False,
        'temperature': False,
        'layer_scale': False,
        'score': {'kernel': True, 'bias': False},
        'head': {'kernel': True, 'bias': False},
    }


def test_decay_mask_of_a_transformer():
    """With blocks numbered by strings, as in NNX: kernels decay, class token and scales do not."""
    block = {
        'norm1': {'scale': shaped(8), 'bias': shaped(8)},
        'attn': {
            'query': {'kernel': shaped(8, 2, 4), 'bias': shaped(2, 4)},
            'out': {'kernel': shaped(2, 4, 8), 'bias': shaped(8)},
        },
        'layer_scale': {'gamma': shaped(8)},
    }
    encoder = {'cls_token': shaped(1, 1, 8), 'blocks': {'0': block, '1': block}}
    frozen = frozenset({'encoder/blocks/0/attn/query/kernel'})
    mask = decay_mask({'encoder': encoder}, frozen)['encoder']
    assert not mask['cls_token']
    for number, query in (('0', False), ('1', True)):
        assert mask['blocks'][number] == {
            'norm1': {'scale': False, 'bias': False},
            'attn': {
                'query': {'kernel': query, 'bias': False},
                'out': {'kernel': True, 'bias': False},
            },
            'layer_scale': {'gamma': False},
        }


def test_decay_mask_untrained():
    """A parameter that is not trained is excluded even if it is a kernel."""
    mask = decay_mask(PARAMS, frozenset({'head/kernel', 'head/bias'}))
    assert mask['head'] == {'kernel': False, 'bias': False}
    assert mask['conv']['kernel']


def test_nothing_excluded_is_an_error():
    """A network without a recognised bias or norm is refused, with its parameters' names."""
    params = {'dense': {'kernel': shaped(3, 4), 'offset': shaped(2, 2)}}
    with pytest.raises(UserError, match=r'(?s)excluded from.*dense/kernel, dense/offset'):
        decay_mask(params)


def test_nothing_left_is_an_error():
    """A network of which everything would be excluded is refused, with its parameters' names."""
    with pytest.raises(UserError, match=r'(?s)left for.*dense/bias, dense/w'):
        decay_mask({'dense': {'w': shaped(3), 'bias': shaped(3)}})


def test_describe_excluded_counts():
    """The line a run prints counts parameters exactly and leaves by kind."""
    params = {
        'a': {'bn': {'scale': shaped(8), 'bias': shaped(8)}, 'conv': {'kernel': shaped(10, 100)}},
        'b': {'bn': {'scale': shaped(4), 'bias': shaped(4)}, 'conv': {'bias': shaped(1000)}},
    }
    assert describe_excluded(params, decay_mask(params)) == (
        '1,024 of 2,024 parameters get no weight decay and no LARS adaptation: '
        'bn/bias x2, bn/scale x2, conv/bias x1'
    )
    assert describe_excluded(params, decay_mask(params), 'adamw').startswith(
        '1,024 of 2,024 parameters get no weight decay: bn/bias x2'
    )
