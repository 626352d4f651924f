"""Networks as a user of this package writes them, without knowing the package.

The tests name them in configs as 'own_networks:Class', with this folder on PYTHONPATH.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class ConvNet(nn.Module):
    """A Linen convnet whose batch normalisation does not know of devices."""

    norm: str = 'batch'
    width: int = 4
    rate: float = 0.0
    classes: int = 3

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in (1, 2):
            x = nn.Conv(i * self.width, (3, 3), strides=2, name=f'conv{i}')(x)
            if self.norm == 'batch':
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f'norm{i}')(x)
            elif self.norm == 'group':
                x = nn.GroupNorm(2, name=f'norm{i}')(x)
            x = nn.relu(x)
        x = nn.Dropout(self.rate, deterministic=not train, name='drop')(x)
        return nn.Dense(self.classes, name='head')(x.mean(axis=(1, 2)))


class Headless(nn.Module):
    """A later version of `ConvNet` by its author, without dropout and head."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in (1, 2):
            x = nn.Conv(4 * i, (3, 3), strides=2, name=f'conv{i}')(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f'norm{i}')(x))
        return x.mean(axis=(1, 2))


class TokenNet(nn.Module):
    """A Linen transformer: class token, attention dropout, stochastic depth with its own stream."""

    width: int = 6
    depth: int = 1
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, deterministic: bool):
        x = nn.Conv(self.width, (4, 4), strides=4, name='patches')(x)
        x = x.reshape(len(x), -1, self.width)
        first = self.param('cls', nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], axis=1)
        x = x + self.param('positions', nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.depth):
            x = TokenBlock(self.rate, name=f'block{i}')(x, deterministic)
        x = nn.LayerNorm(name='norm')(x)
        return nn.Dense(3, name='head')(x[:, 0])


class TokenBlock(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, deterministic):
        y = nn.LayerNorm(name='norm1')(x)
        attention = nn.MultiHeadDotProductAttention(
            2, dropout_rate=self.rate, deterministic=deterministic, name='attention'
        )
        x = x + self.dropped(attention(y, y), deterministic)
        y = nn.gelu(nn.Dense(8, name='fc1')(nn.LayerNorm(name='norm2')(x)))
        return x + self.dropped(nn.Dense(x.shape[-1], name='fc2')(y), deterministic)

    def dropped(self, x, deterministic):
        """Stochastic depth: drops a branch for some images."""
        if deterministic:
            return x
        kept = jax.random.bernoulli(self.make_rng('drop_path'), 1 - self.rate, (len(x), 1, 1))
        return x * kept / (1 - self.rate)


class Mlp(nn.Module):
    """Takes pictures as vectors and has no training mode."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name='hidden1')(x.reshape(len(x), -1)))
        return nn.Dense(3, name='head')(nn.relu(nn.Dense(6, name='hidden2')(x)))


class Configured(nn.Module):
    """Takes a list of dicts and a dict, and needs them to be dicts."""

    stages: Any = ()
    options: Any = None

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Mapping), stage
            x = nn.Dense(stage['width'], name=f'stage{i}')(x)
        assert isinstance(self.options, Mapping), self.options
        return nn.Dense(**self.options, name='out')(x)


# A network with its arguments, one of which is a list.
WideConvNet = functools.partial(ConvNet, 'group', width=6)
Stack = functools.partial(
    nn.Sequential, [nn.Conv(4, (3, 3), strides=2), nn.relu, nn.Conv(6, (3, 3), strides=2)]
)


class Keep(nn.Module):
    """A place to tap."""

    @nn.compact
    def __call__(self, x):
        return x


class Everything(nn.Module):
    """All that a user may do and that matters to the training step, in one small network.

    A norm passed in; a norm made inside; its own statistic, the running peak; both kinds of random
    layers; a head. 'seen/masks' keeps the masks of the last passes, for tests.
    """

    norm: nn.Module = nn.BatchNorm(momentum=0.9)

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), strides=2, name='conv')(x)
        x = nn.relu(self.norm(x, use_running_average=not train)).mean(axis=(1, 2))
        x = nn.Dense(6, name='fc')(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='bn')(x)
        peak = self.variable('own', 'peak', jnp.zeros, 6)
        masks = self.variable('seen', 'masks', jnp.zeros, (4, 2, 32))
        # Used as zeros, so that they are not behind the tap.
        y = x / (2 + peak.value) + 0 * masks.value.sum()
        if train:
            peak.value = 0.5 * peak.value + 0.5 * x.max(axis=0)
            dropped = nn.Dropout(0.5, deterministic=False)(jnp.ones(32))
            kept = jax.random.bernoulli(self.make_rng('drop_path'), 0.5, (32,))
            mask = jnp.stack([dropped > 0, kept]).astype(jnp.float32)
            masks.value = jnp.concatenate([masks.value[1:], mask[None]])
            y = y * (0.5 + mask.sum(axis=0)[:6])
        return nn.Dense(5, name='head')(Keep(name='features')(y))


class NnxConvNet(nnx.Module):
    """An NNX convnet: nnx.BatchNorm and nnx.Dropout, told by .train() and .eval()."""

    def __init__(self, width: int = 4, rate: float = 0.2, norm: str = 'batch', *, rngs: nnx.Rngs):
        stages, size = [], 3
        for i in (1, 2):
            conv = nnx.Conv(size, i * width, (3, 3), strides=2, rngs=rngs)
            size = i * width
            layers = [conv]
            if norm == 'batch':
                layers.append(nnx.BatchNorm(size, momentum=0.9, rngs=rngs))
            elif norm == 'group':
                layers.append(nnx.GroupNorm(size, num_groups=2, rngs=rngs))
            stages.append(nnx.Sequential(*layers, nnx.relu))
        self.stages = nnx.List(stages)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(size, 3, rngs=rngs)

    def __call__(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(self.drop(x).mean(axis=(1, 2)))


class NnxViT(nnx.Module):
    """An NNX vision transformer with a class token."""

    def __init__(
        self,
        image_size: int = 8,
        patch: int = 4,
        width: int = 6,
        depth: int = 1,
        rate: float = 0.1,
        *,
        rngs: nnx.Rngs,
    ):
        tokens = 1 + (image_size // patch) ** 2
        self.patches = nnx.Conv(3, width, (patch, patch), strides=patch, rngs=rngs)
        self.cls = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)) * 0.02)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, tokens, width)) * 0.02)
        self.blocks = nnx.List([NnxTokenBlock(width, rate, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        first = jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class NnxTokenBlock(nnx.Module):
    """Its stochastic depth draws from its own stream."""

    def __init__(self, width: int, rate: float, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, width, dropout_rate=rate, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 2 * width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(2 * width, width, rngs=rngs),
        )
        self.rate = rate
        self.rngs = rngs.fork()
        self.deterministic = False

    def __call__(self, x):
        x = x + self.dropped(self.attention(self.norm1(x)))
        return x + self.dropped(self.mlp(self.norm2(x)))

    def dropped(self, x):
        if self.deterministic or self.rate == 0:
            return x
        kept = jax.random.bernoulli(self.rngs.drop_path(), 1 - self.rate, (len(x), 1, 1))
        return x * kept / (1 - self.rate)


class NnxMlp(nnx.Module):
    """Takes pictures of 8x8 pixels as vectors; has neither modes nor random streams."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(192, 8, rngs=rngs)
        self.hidden2 = nnx.Linear(8, 6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x.reshape(len(x), -1)))
        return self.head(nnx.relu(self.hidden2(x)))


class NnxConfigured(nnx.Module):
    """Takes a list of dicts and a dict."""

    def __init__(self, stages, options, *, rngs: nnx.Rngs):
        size = 3
        layers = []
        for stage in stages:
            layers.append(nnx.Linear(size, stage['width'], rngs=rngs))
            size = stage['width']
        self.stages = nnx.List(layers)
        self.out = nnx.Linear(size, **options, rngs=rngs)

    def __call__(self, x):
        x = x.mean(axis=(1, 2))
        for stage in self.stages:
            x = stage(x)
        return self.out(x)


NarrowNnxConvNet = functools.partial(NnxConvNet, width=2)


class Peak(nnx.Variable):
    """A user's own kind of statistic."""


class Seen(nnx.Variable):
    """Values that tests read."""


class NnxEverything(nnx.Module):
    """The NNX counterpart of `Everything`."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.fc = nnx.Linear(4, 6, rngs=rngs)
        self.bn = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.peak = Peak(jnp.zeros(6))
        self.masks = Seen(jnp.zeros((4, 2, 32)))
        self.features = NnxKeep()
        self.head = nnx.Linear(6, 5, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x, train: bool):
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        x = self.bn(self.fc(x))
        y = x / (2 + self.peak[...]) + 0 * self.masks[...].sum()
        if train:
            self.peak[...] = 0.5 * self.peak[...] + 0.5 * x.max(axis=0)
            dropped = self.drop(jnp.ones(32))
            kept = jax.random.bernoulli(self.rngs.drop_path(), 0.5, (32,))
            mask = jnp.stack([dropped > 0, kept]).astype(jnp.float32)
            self.masks[...] = jnp.concatenate([self.masks[...][1:], mask[None]])
            y = y * (0.5 + mask.sum(axis=0)[:6])
        return self.head(self.features(y))


class NnxKeep(nnx.Module):
    def __call__(self, x):
        return x
