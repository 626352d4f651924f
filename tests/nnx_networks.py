"""NNX networks with one peculiarity each, with the same names as in `linen_networks.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from own_networks import NarrowNnxConvNet as PartialConvNet  # noqa: F401
from own_networks import NnxConfigured as Configured  # noqa: F401
from own_networks import NnxConvNet as ConvNet  # noqa: F401
from own_networks import NnxEverything as Everything  # noqa: F401
from own_networks import NnxKeep
from own_networks import NnxMlp as Mlp  # noqa: F401
from own_networks import NnxViT as TokenNet  # noqa: F401
from packed import PACKED


class Containers(nnx.Module):
    """Layers in an nnx.List, an nnx.Dict and an nnx.Sequential."""

    def __init__(self, *, rngs: nnx.Rngs):
        dense = lambda size: nnx.Linear(6, size, rngs=rngs)  # noqa: E731
        self.stem = nnx.Linear(3, 6, rngs=rngs)
        self.blocks = nnx.List([dense(6), dense(6)])
        self.sides = nnx.Dict(left=dense(6), right=dense(6))
        self.end = nnx.Sequential(dense(5), nnx.relu, nnx.Linear(5, 4, rngs=rngs))

    def __call__(self, x):
        x = nnx.relu(self.stem(x.mean(axis=(1, 2))))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.end(self.sides['left'](x) * self.sides['right'](x))


class Twice(nnx.Module):
    """Calls the same layer twice, under two names."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 3, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)
        self.zz_shared = self.fc

    def __call__(self, x):
        return self.last(self.zz_shared(nnx.tanh(self.fc(x.mean(axis=(1, 2))))))


# Networks that are told whether they train.


class SeveralWords(nnx.Module):
    """Told by arguments and by .train() and .eval() at once."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 6, rngs=rngs)
        self.bn = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train, *, use_running_average=False, is_training=None):
        assert train is is_training is (not use_running_average) is (not self.drop.deterministic)
        x = self.bn(self.fc(x.mean(axis=(1, 2))), use_running_average=use_running_average)
        return self.drop(x, deterministic=not train)


class Methods(SeveralWords):
    """Told only by .train() and .eval()."""

    def __call__(self, x):
        return self.drop(self.bn(self.fc(x.mean(axis=(1, 2)))))


class Listening(SeveralWords):
    """Has its own .train() and .eval()."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.learning = False

    def train(self, **attributes):
        self.learning = True

    def eval(self, **attributes):
        self.learning = False

    def __call__(self, x):
        x = self.bn(self.fc(x.mean(axis=(1, 2))), use_running_average=not self.learning)
        return self.drop(x, deterministic=not self.learning)


class Flagged(nnx.Module):
    """Has a switch that is not about training, and does the same in both modes."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, x, all_tokens: bool = False):
        x = self.norm(self.fc(x.reshape(len(x), -1, 3)))
        return x if all_tokens else x.mean(axis=1)


# Networks that draw random numbers.


class Streams(nnx.Module):
    """Returns what it draws: twice from one stream, from another, a fork, and an inner layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 2, rngs=rngs)
        self.rngs = rngs
        self.forked = rngs.fork()
        self.inner = nnx.List([Drawing(rngs=rngs) for _ in range(2)])

    def __call__(self, x, train):
        x = self.fc(x.mean(axis=(1, 2)))
        if not train:
            return x
        keys = [self.rngs.a(), self.rngs.a(), self.rngs.b(), self.forked.a()]
        draws = [jax.random.uniform(key, (len(x), 2)) for key in keys]
        return jnp.concatenate([x, *draws, *(layer(x) for layer in self.inner)], axis=1)


class Drawing(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.rngs = rngs.fork()

    def __call__(self, x):
        return jax.random.uniform(self.rngs.a(), (len(x), 2))


class AlwaysNoisy(nnx.Module):
    """Draws in training and in evaluation."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 6, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        x = self.fc(x.mean(axis=(1, 2)))
        return x + jax.random.normal(self.rngs.noise(), x.shape)


# Networks with variables of their own.


class Power(nnx.Variable):
    """A user's own kind of variable."""


class Statistics(nnx.Module):
    """Keeps a running mean, a count of passes, a power iteration, and constants."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.bn = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 6)))
        self.u = Power(jnp.ones(6) / jnp.sqrt(6.0))
        self.mean = nnx.BatchStat(jnp.zeros(6))
        self.passes = nnx.Variable(jnp.zeros((), jnp.int32))
        self.order = nnx.Variable(jnp.array([5, 4, 3, 2, 1, 0]))

    def __call__(self, x, train: bool):
        kernel = self.kernel[...]
        v = kernel @ self.u[...] / jnp.linalg.norm(kernel @ self.u[...])
        sigma = jnp.linalg.norm(kernel.T @ v)
        x = self.bn(x).mean(axis=(1, 2)) @ (kernel / sigma)
        y = x[:, self.order[...]] - self.mean[...] + 0 * self.passes[...]
        if train:
            self.u[...] = jax.lax.stop_gradient(kernel.T @ v / sigma)
            self.mean[...] = 0.75 * self.mean[...] + 0.25 * x.mean(axis=0)
            self.passes[...] += 1
        return y


class Sowing(nnx.Module):
    """Sows its inputs as Flax's kind of variable and as its own."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.bn = nnx.BatchNorm(3, rngs=rngs)
        self.fc = nnx.Linear(3, 6, rngs=rngs)

    def __call__(self, x):
        x = self.fc(self.bn(x.mean(axis=(1, 2))))
        self.sow(nnx.Intermediate, 'hidden', x)
        self.sow(Power, 'reports', x)
        return nnx.relu(x)


# Networks with transformations.


class Block(nnx.Module):
    """Dense, norm, dropout."""

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(6, 6, rngs=rngs)
        self.bn = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.relu(self.bn(self.fc(x))))


class RematBlock(Block):
    """Rematerialises its own call."""

    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


class JitBlock(Block):
    """Compiles its own call."""

    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class Blocks(nnx.Module):
    """Two blocks, under one of NNX's transformations or under none."""

    def __init__(self, transformation: str = 'plain', rate: float = 0.2, *, rngs: nnx.Rngs):
        self.stem = nnx.Linear(3, 6, rngs=rngs)
        kind = {'plain': Block, 'remat': RematBlock, 'jit': JitBlock}[transformation]
        self.blocks = nnx.List([kind(rate, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x.mean(axis=(1, 2)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scanned(nnx.Module):
    """Three blocks made by nnx.vmap and run by nnx.scan."""

    def __init__(self, rate: float = 0.2, *, rngs: nnx.Rngs):
        self.stem = nnx.Linear(3, 6, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rate, rngs=rngs)

        self.blocks = make(rngs)
        self.after = NnxKeep()

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.after(run(self.stem(x.mean(axis=(1, 2))), self.blocks))


class Functional(nnx.Module):
    """Passes its blocks to functions under nnx.remat and nnx.jit."""

    def __init__(self, rate: float = 0.2, *, rngs: nnx.Rngs):
        self.stem = nnx.Linear(3, 6, rngs=rngs)
        self.first = Block(rate, rngs=rngs)
        self.second = Block(rate, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        call = lambda block, x: block(x)  # noqa: E731
        x = nnx.remat(call)(self.first, self.stem(x.mean(axis=(1, 2))))
        return self.head(nnx.jit(call)(self.second, x))


# Networks with several outputs.


class Packing(nnx.Module):
    """Its block and the network itself return two arrays in a container."""

    def __init__(self, container: str, *, rngs: nnx.Rngs):
        self.block = PackingBlock(container, rngs=rngs)

    def __call__(self, x):
        return self.block(x.mean(axis=(1, 2)))


class PackingBlock(nnx.Module):
    def __init__(self, container: str, *, rngs: nnx.Rngs):
        self.container = container
        self.fc1 = nnx.Linear(3, 6, rngs=rngs)
        self.fc2 = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = self.fc1(x)
        return PACKED[self.container].pack(x, self.fc2(x))


class NamedOutput(nnx.Module):
    """Has a layer named 'output', and returns something else."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.output = nnx.Linear(3, 5, rngs=rngs)
        self.after = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.after(self.output(x.mean(axis=(1, 2))))


# Networks that are refused.


class FailsInTraining(nnx.Module):
    """Works except in training."""

    def __init__(self, error: str, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3, 6, rngs=rngs)
        self.error = error

    def __call__(self, x, train: bool):
        x = self.fc(x.mean(axis=(1, 2)))
        if train and self.error == 'shape':
            return x.reshape(5, 7)
        if train and self.error == 'axis':
            return jax.lax.pmean(x, 'batch')
        if train:
            raise NotImplementedError('training is for another day')
        return x


class Windows(nnx.Module):
    """Cuts pictures into four windows, stacked along the batch axis."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.tapped = nnx.Linear(3, 6, rngs=rngs)

    def __call__(self, x):
        return self.tapped(x.reshape(4 * len(x), -1, 3)).reshape(len(x), -1, 6)


class Backwards(nnx.Module):
    """Returns the axis of tokens before that of images."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.tapped = nnx.Linear(3, 6, rngs=rngs)

    def __call__(self, x):
        return self.tapped(x.reshape(len(x), -1, 3).swapaxes(0, 1)).mean(axis=0)
