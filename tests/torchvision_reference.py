"""torchvision's ResNets rebuilt for the tests: names, weights, and two forward passes."""

from __future__ import annotations

import jax
import numpy as np
import safetensors.numpy

from byol_jax.interop.encoder import make_encoder
from byol_jax.models.registry import build_encoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# torchvision/models/resnet.py: blocks of each stage, and whether they are bottlenecks.
DEPTHS = {
    'resnet18': ((2, 2, 2, 2), False),
    'resnet34': ((3, 4, 6, 3), False),
    'resnet50': ((3, 4, 6, 3), True),
    'resnet101': ((3, 4, 23, 3), True),
    'resnet152': ((3, 8, 36, 3), True),
    'resnet200': ((3, 24, 36, 3), True),
}


def torchvision_shapes(name, width=1.0, small=False):
    """The shapes by name of a ResNet without fc, from torchvision's naming rules alone."""
    sizes, bottleneck = DEPTHS[name]
    shapes = {}

    def bn(prefix, channels):
        for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
            shapes[f'{prefix}.{leaf}'] = (channels,)
        shapes[f'{prefix}.num_batches_tracked'] = ()

    into = int(64 * width)
    shapes['conv1.weight'] = (into, 3, 3, 3) if small else (into, 3, 7, 7)
    bn('bn1', into)
    for stage, blocks in enumerate(sizes):
        inner = int(64 * 2**stage * width)
        out = inner * 4 if bottleneck else inner
        for i in range(blocks):
            block = f'layer{stage + 1}.{i}'
            convs = [(inner, into, 1), (inner, inner, 3), (out, inner, 1)]
            if not bottleneck:
                convs = [(out, into, 3), (out, out, 3)]
            for k, (o, c, side) in enumerate(convs, start=1):
                shapes[f'{block}.conv{k}.weight'] = (o, c, side, side)
                bn(f'{block}.bn{k}', o)
            if i == 0 and (stage > 0 or into != out):
                shapes[f'{block}.downsample.0.weight'] = (out, into, 1, 1)
                bn(f'{block}.downsample.1', out)
            into = out
    return shapes


def random_weights(shapes, seed=0):
    """Weights as after training: moderate activations, no statistic at its initial value."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith('num_batches_tracked'):
            weights[name] = np.array(7, np.int64)
            continue
        if len(shape) == 4:
            value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith(('running_var', '.weight')):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.2, shape)
        weights[name] = value.astype(np.float32)
    return weights


def write(path, weights, metadata=None):
    safetensors.numpy.save_file(weights, path, metadata)
    return path


def our_encoder(name, seed=0, image_size=32, hidden_layer='avgpool', step=123, **kwargs):
    module = build_encoder(name, kwargs)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32), shapes)
    return make_encoder(
        name=name,
        kwargs=kwargs,
        hidden_layer=hidden_layer,
        variables=variables,
        image_size=image_size,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        step=step,
    )


def numpy_features(weights, images, small):
    """float64 [B, C, H, W] -> float64 [B, D], with the state dict's names and layouts."""

    def conv(x, name, stride=1):
        kernel = weights[f'{name}.weight'].astype(np.float64)
        side = kernel.shape[2]
        pad = side // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(2, 3))
        windows = windows[:, :, ::stride, ::stride]
        return np.tensordot(windows, kernel, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)

    def bn(x, name):
        w, b, mean, var = (
            weights[f'{name}.{leaf}'].astype(np.float64)[:, None, None]
            for leaf in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return (x - mean) / np.sqrt(var + 1e-5) * w + b

    x = np.maximum(bn(conv(images, 'conv1', 1 if small else 2), 'bn1'), 0)
    if not small:
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))  # After a ReLU nothing is below 0.
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
        x = windows[:, :, ::2, ::2].max((4, 5))
    for stage in (1, 2, 3, 4):
        i = 0
        while f'layer{stage}.{i}.conv1.weight' in weights:
            block = f'layer{stage}.{i}'
            stride = 2 if stage > 1 and i == 0 else 1
            last = 3 if f'{block}.conv3.weight' in weights else 2
            out = x
            for k in range(1, last + 1):
                strided = k == last - 1  # The 3x3 of three, the first of two.
                out = conv(out, f'{block}.conv{k}', stride if strided else 1)
                out = bn(out, f'{block}.bn{k}')
                out = np.maximum(out, 0) if k < last else out
            if f'{block}.downsample.0.weight' in weights:
                x = bn(conv(x, f'{block}.downsample.0', stride), f'{block}.downsample.1')
            x = np.maximum(x + out, 0)
            i += 1
    return x.mean((2, 3))


def torch_resnet(torch, name, width, small):
    """torchvision.models.resnetNN() from torch.nn, with its attribute names and order."""
    nn = torch.nn
    sizes, bottleneck = DEPTHS[name]

    class Block(nn.Module):
        def __init__(self, into, inner, stride):
            super().__init__()
            out = inner * 4 if bottleneck else inner
            convs = [(into, inner, 3, stride), (inner, out, 3, 1)]
            if bottleneck:
                convs = [(into, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
            self.last = len(convs)
            for k, (c, o, side, s) in enumerate(convs, start=1):
                conv = nn.Conv2d(c, o, side, s, padding=side // 2, bias=False)
                self.add_module(f'conv{k}', conv)
                self.add_module(f'bn{k}', nn.BatchNorm2d(o))
            self.downsample = None
            if stride != 1 or into != out:
                self.downsample = nn.Sequential(
                    nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                )

        def forward(self, x):
            out = x
            for k in range(1, self.last + 1):
                out = getattr(self, f'bn{k}')(getattr(self, f'conv{k}')(out))
                out = torch.relu(out) if k < self.last else out
            return torch.relu(out + (x if self.downsample is None else self.downsample(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            into = int(64 * width)
            self.conv1 = nn.Conv2d(3, into, 7, 2, 3, bias=False)
            if small:
                self.conv1 = nn.Conv2d(3, into, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(into)
            self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
            for stage, blocks in enumerate(sizes):
                layers = []
                inner = int(64 * 2**stage * width)
                for i in range(blocks):
                    layers.append(Block(into, inner, 2 if stage and i == 0 else 1))
                    into = inner * 4 if bottleneck else inner
                self.add_module(f'layer{stage + 1}', nn.Sequential(*layers))
            self.fc = nn.Linear(into, 10)

        def forward(self, x):
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return x.mean((2, 3))

    return Net()


def pictures(side):
    return np.random.default_rng(1).integers(0, 256, (2, side, side + 6, 3), np.uint8)


def normalised(images, mean=MEAN, std=STD):
    """uint8 [B, H, W, 3] -> float64 [B, 3, H, W], as torchvision's ToTensor and Normalize."""
    return ((images / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()
