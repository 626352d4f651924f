"""Linen networks with one peculiarity each; `nnx_networks.py` has NNX networks of the same names.

Both modules show what a user may write; the tests find a network by its name in either.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from own_networks import Configured as Configured
from own_networks import ConvNet as ConvNet
from own_networks import Everything as Everything
from own_networks import Keep
from own_networks import Mlp as Mlp
from own_networks import TokenNet as TokenNet
from own_networks import WideConvNet as PartialConvNet  # noqa: F401
from packed import PACKED


class Containers(nn.Module):
    """A list, a dict and a Sequential of layers, made in setup()."""

    def setup(self):
        self.stem = nn.Dense(6)
        self.blocks = [nn.Dense(6) for _ in range(2)]
        self.sides = {'left': nn.Dense(6), 'right': nn.Dense(6)}
        self.end = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4)])

    def __call__(self, x):
        x = nn.relu(self.stem(x.mean(axis=(1, 2))))
        for block in self.blocks:
            x = nn.relu(block(x))
        return self.end(self.sides['left'](x) * self.sides['right'](x))


class Twice(nn.Module):
    """Calls the same layer twice."""

    def setup(self):
        self.fc = nn.Dense(3)
        self.last = nn.Dense(2)

    def __call__(self, x):
        return self.last(self.fc(nn.tanh(self.fc(x.mean(axis=(1, 2))))))


# Networks that are told whether they train.


class SeveralWords(nn.Module):
    """Told by several arguments at once."""

    @nn.compact
    def __call__(self, x, train, *, deterministic, use_running_average=False, is_training=None):
        assert train is is_training is (not deterministic) is (not use_running_average)
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        x = nn.BatchNorm(use_running_average, momentum=0.9, name='bn')(x)
        return nn.Dropout(0.5, deterministic=deterministic, name='drop')(x)


class Attribute(nn.Module):
    """Told by an attribute."""

    deterministic: bool = True

    def setup(self):
        self.fc = nn.Dense(6)
        self.bn = nn.BatchNorm(use_running_average=self.deterministic, momentum=0.9)
        self.drop = nn.Dropout(0.5, deterministic=self.deterministic)

    def __call__(self, x):
        return self.drop(self.bn(self.fc(x.mean(axis=(1, 2)))))


class Merged(nn.Module):
    """Told by an attribute or by an argument, like Flax's own layers."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        quiet = nn.merge_param('deterministic', self.deterministic, deterministic)
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        x = nn.BatchNorm(use_running_average=quiet, momentum=0.9, name='bn')(x)
        return nn.Dropout(0.5, name='drop')(x, deterministic=quiet)


class Both(nn.Module):
    """The norm is told by an argument, the dropout by an attribute."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
        return nn.Dropout(0.5, deterministic=self.deterministic, name='drop')(x)


class Flagged(nn.Module):
    """Has a switch that is not about training, and does the same in both modes."""

    @nn.compact
    def __call__(self, x, all_tokens: bool = False):
        x = nn.LayerNorm(name='norm')(nn.Dense(6, name='fc')(x.reshape(len(x), -1, 3)))
        return x if all_tokens else x.mean(axis=1)


# Networks that draw random numbers.


class Streams(nn.Module):
    """Returns what it draws: two layers from one stream, one from another."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(2, name='fc')(x.mean(axis=(1, 2)))
        if not train:
            return x
        draws = [jax.random.uniform(self.make_rng(name), (len(x), 2)) for name in 'aab']
        return jnp.concatenate([x, *draws, Drawing(name='inner')(x)], axis=1)


class Drawing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.random.uniform(self.make_rng('a'), (len(x), 2))


class AlwaysNoisy(nn.Module):
    """Draws in training and in evaluation."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        return nn.Dropout(0.5, deterministic=False, name='drop')(x)


# Networks with variables of their own.


class Statistics(nn.Module):
    """Keeps a running mean, a count of passes, a power iteration, and constants."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
        x = x.mean(axis=(1, 2))
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (3, 6))
        u = self.variable('power', 'u', lambda: jnp.ones(6) / jnp.sqrt(6.0))
        v = kernel @ u.value / jnp.linalg.norm(kernel @ u.value)
        sigma = jnp.linalg.norm(kernel.T @ v)
        x = x @ (kernel / sigma)
        mean = self.variable('centre', 'mean', jnp.zeros, 6)
        passes = self.variable('centre', 'passes', jnp.zeros, (), jnp.int32)
        order = self.variable('constants', 'order', lambda: jnp.array([5, 4, 3, 2, 1, 0]))
        y = x[:, order.value] - mean.value + 0 * passes.value
        if train:
            u.value = jax.lax.stop_gradient(kernel.T @ v / sigma)
            mean.value = 0.75 * mean.value + 0.25 * x.mean(axis=0)
            passes.value += 1
        return y


class Sowing(nn.Module):
    """Sows its inputs into Flax's collection and into its own."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name='bn')(x.mean(axis=(1, 2)))
        x = nn.Dense(6, name='fc')(x)
        self.sow('intermediates', 'hidden', x)
        self.sow('reports', 'hidden', x)
        return nn.relu(x)


# Networks with transformations.


class Block(nn.Module):
    """Dense, norm, dropout."""

    rate: float = 0.2

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name='fc')(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
        return nn.Dropout(self.rate, deterministic=not train, name='drop')(nn.relu(x))


class Blocks(nn.Module):
    """Two blocks, under one of Flax's transformations or under none."""

    transformation: str = 'plain'
    rate: float = 0.2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='stem')(x.mean(axis=(1, 2)))
        wrap = {'plain': lambda kind: kind, 'remat': _static(nn.remat), 'jit': _static(nn.jit)}
        for i in (0, 1):
            x = wrap[self.transformation](Block)(self.rate, name=f'block{i}')(x, train)
        return nn.Dense(3, name='head')(x)


def _static(transformation):
    return functools.partial(transformation, static_argnums=(2,))


class Scanned(nn.Module):
    """Three blocks in one nn.scan, each rematerialised."""

    noting: bool = False
    rate: float = 0.2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='stem')(x.mean(axis=(1, 2)))
        axes = {'params': 0, 'batch_stats': 0, **({'intermediates': 0} if self.noting else {})}
        blocks = nn.scan(
            nn.remat(Round, static_argnums=(2,)),
            variable_axes=axes,
            split_rngs={'params': True, 'dropout': True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = blocks(self.rate, name='blocks')(x, train)
        return Keep(name='after')(x)


class Round(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train):
        return Block(self.rate, name='block')(x, train), None


# Networks with several outputs.


class Packing(nn.Module):
    """Its block and the network itself return two arrays in a container."""

    container: str

    @nn.compact
    def __call__(self, x):
        return PackingBlock(self.container, name='block')(x.mean(axis=(1, 2)))


class PackingBlock(nn.Module):
    container: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name='fc1')(x)
        return PACKED[self.container].pack(x, nn.Dense(4, name='fc2')(x))


class NamedOutput(nn.Module):
    """Has a layer named 'output', and returns something else."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name='output')(x.mean(axis=(1, 2)))
        return nn.Dense(4, name='after')(x)


# Networks that are refused.


class FailsInTraining(nn.Module):
    """Works except in training."""

    error: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name='fc')(x.mean(axis=(1, 2)))
        if train and self.error == 'shape':
            return x.reshape(5, 7)
        if train and self.error == 'parameter':
            return nn.Dense(6, name='only_in_training')(x)
        if train and self.error == 'axis':
            return jax.lax.pmean(x, 'batch')
        if train:
            raise NotImplementedError('training is for another day')
        return x


class Windows(nn.Module):
    """Cuts pictures into four windows, stacked along the batch axis."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(4 * len(x), -1, 3)
        x = nn.Dense(6, name='tapped')(x)
        return nn.Dense(4, name='head')(x.reshape(len(x) // 4, -1, 6).mean(axis=1))


class Backwards(nn.Module):
    """Returns the axis of tokens before that of images."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name='tapped')(x.reshape(len(x), -1, 3).swapaxes(0, 1))
        return nn.Dense(4, name='head')(x.mean(axis=0))
