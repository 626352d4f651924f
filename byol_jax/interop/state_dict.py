"""Reads PyTorch state dicts as NumPy arrays, without running code from the file."""

from __future__ import annotations

import importlib
import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from byol_jax.errors import UserError, shown
from byol_jax.interop.unpickle import check_pickle
from byol_jax.interop.weights_file import check_memory, map_safetensors

Weights = dict[str, np.ndarray]

# The first version in which no known file can run code under weights_only=True: CVE-2025-32434 was
# fixed in 2.6, CVE-2026-24747 in 2.10.
_SAFE_TORCH = (2, 10)
# Tied weights stand in a file once and in the network twice.
_MOST_COPIES = 4
# Pickles of a file of PyTorch before 1.6: a number, the version, the system, the content, its keys.
_PICKLES = 5
# How files of PyTorch's are called; Lightning's are .ckpt, and MoCo's .pth.tar.
_PICKLED = ('.pth', '.pt', '.ckpt')
_CONVERT = (
    'convert the file where PyTorch is installed: safetensors.torch.save_file(torch.load('
    "'{name}', weights_only=True), '{stem}.safetensors')."
)


def read_state_dict(path: Path) -> tuple[Weights, Mapping[str, str]]:
    """Reads the arrays of a state dict and the file's metadata.

    Args:
      path: a .safetensors; or a .pth, .pth.tar, .pt or .ckpt with a state dict, or a dict with one
        under 'state_dict' or 'model'. These are read by PyTorch's weights-only loading, which
        builds nothing but tensors and plain containers.

    Returns:
      Arrays by name, of any dtypes (those of a .safetensors are read when they are used); and the
      metadata of a .safetensors, {} for the others.

    Raises:
      UserError: there is no such file, it is damaged or of another kind, it holds something other
        than tensors, or it needs PyTorch and PyTorch is missing or too old to be safe.
    """
    if not path.is_file():
        raise UserError(f'{path}: there is no such file.')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    if path.suffix in _PICKLED or path.name.endswith('.pth.tar'):
        return _read_torch(path), {}
    raise UserError(
        f'{path}: weights are read from files named .safetensors, .pth, .pth.tar, .pt or .ckpt.'
    )


def _read_safetensors(path: Path) -> tuple[Weights, Mapping[str, str]]:
    weights, metadata = map_safetensors(path)
    check_memory(weights, path)
    return weights, metadata


def _read_torch(path: Path) -> Weights:
    convert = _CONVERT.format(name=path.name, stem=path.stem)
    try:
        torch: Any = importlib.import_module('torch')
    except ModuleNotFoundError as error:
        raise UserError(
            f'{path}: reading a {path.suffix} needs PyTorch, which is not installed. Install torch '
            f'(pip install torch), or {convert}'
        ) from error
    if tuple(int(part) for part in re.findall(r'\d+', torch.__version__)[:2]) < _SAFE_TORCH:
        raise UserError(
            f'{path}: torch {torch.__version__} can be made to run code by a file even under '
            'weights_only=True. Install torch 2.10 or later, or, if you trust the file, '
            f'{convert}'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # About pickle protocols. Failures are reported below.
            _check_pickles(path)
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        # A damaged file raises one of a dozen types, AssertionError and struct.error among them.
        # PyTorch's message first advises how to load the file unsafely, which is not repeated; the
        # reason is in a later paragraph.
        reason = re.search(r'Trying to .*|WeightsUnpickler error.*', str(error))
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f'{path} is refused: it is damaged, or holds more than tensors and could run code '
            f'({shown(reason.group().strip() if reason else lines[0])})'
        ) from error
    for key in ('state_dict', 'model'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not a state dict of tensors.')
    weights: Weights = {}
    # A file may hold one number and declare a tensor of a million million copies of it.
    left = _MOST_COPIES * path.stat().st_size
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: '{shown(name)}' is a {type(tensor).__name__}; a state dict holds "
                'tensors only.'
            )
        try:
            left -= tensor.numel() * tensor.element_size()
            if left < 0:
                raise UserError(f"{path}: up to '{shown(name)}' it declares more than it holds.")
            wide = tensor.float() if tensor.is_floating_point() else tensor
            weights[name] = wide.detach().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"{path}: '{name}' is no plain tensor in memory ({tensor.layout}, {tensor.dtype}, "
                f'{tensor.device}).'
            ) from error
    return weights


def _check_pickles(path: Path) -> None:
    """Raises what `check_pickle` raises, or ValueError: PyTorch reads as long as a file says."""
    if not zipfile.is_zipfile(path):
        with path.open('rb') as file:
            for _ in range(_PICKLES):
                check_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # PyTorch compresses nothing; a few bytes could unpack to any number.
            if entry.file_size > entry.compress_size:
                raise ValueError(f'{shown(entry.filename)} is compressed')
            if entry.filename.endswith('.pkl'):
                check_pickle(io.BytesIO(archive.read(entry)))
