"""Reads PyTorch state dicts as NumPy arrays, without running code from the file."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from byol_jax.errors import UserError

Weights = dict[str, np.ndarray]

# The first version in which no known file can run code under weights_only=True: CVE-2025-32434 was
# fixed in 2.6, CVE-2026-24747 in 2.10.
_SAFE_TORCH = (2, 10)
_CONVERT = (
    'convert the file where PyTorch is installed: safetensors.torch.save_file(torch.load('
    "'{name}', weights_only=True), '{stem}.safetensors')."
)


def read_state_dict(path: Path) -> tuple[Weights, Mapping[str, str]]:
    """Reads the arrays of a state dict and the file's metadata.

    Args:
      path: a .safetensors; or a .pth or .pt with a state dict, or a dict with one under
        'state_dict' or 'model'. These are read by PyTorch's weights-only loading, which builds
        nothing but tensors and plain containers.

    Returns:
      Arrays by name, floats of any width as float32, others unchanged; and the metadata of a
      .safetensors, {} for a .pth or .pt.

    Raises:
      UserError: there is no such file, it is damaged or of another kind, it holds something other
        than tensors, or it needs PyTorch and PyTorch is missing or too old to be safe.
    """
    if not path.is_file():
        raise UserError(f'{path}: there is no such file.')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    if path.suffix in ('.pth', '.pt'):
        return _read_torch(path), {}
    raise UserError(f'{path}: weights are read from .safetensors, .pth or .pt files.')


def _read_safetensors(path: Path) -> tuple[Weights, Mapping[str, str]]:
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            weights = {name: _float32(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no iteration)
            return weights, file.metadata() or {}
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise UserError(f'{path} is damaged or holds types unknown here: {error}') from error


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
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        # A damaged file raises one of a dozen types, AssertionError and struct.error among them.
        # PyTorch's message first advises how to load the file unsafely, which is not repeated; the
        # reason is in a later paragraph.
        reason = re.search(r'Trying to .*|WeightsUnpickler error.*', str(error))
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f'{path} is refused: it is damaged, or holds more than tensors and could run code '
            f'({reason.group().strip() if reason else lines[0]})'
        ) from error
    for key in ('state_dict', 'model'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not a state dict of tensors.')
    weights = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: '{name}' is a {type(tensor).__name__}; a state dict holds tensors only."
            )
        try:
            wide = tensor.float() if tensor.is_floating_point() else tensor
            weights[name] = wide.detach().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"{path}: '{name}' is no plain tensor in memory ({tensor.layout}, {tensor.dtype}, "
                f'{tensor.device}).'
            ) from error
    return weights


def _float32(array: np.ndarray) -> np.ndarray:
    # JAX's issubdtype, because NumPy's does not know bfloat16 and 8-bit floats.
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
