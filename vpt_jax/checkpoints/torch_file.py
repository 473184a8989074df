"""PyTorch's pickles, for `vpt_jax.convert` alone: read by torch itself, and only what its safe mode lets through.

A pickle is a program. `weights_only=True` runs none of it but the making of tensors, and has no known hole since torch
2.10 (CVE-2025-32434, CVE-2026-24747); what it refuses is refused here too, without another attempt.
"""

import importlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from vpt_jax.checkpoints.source import ArraySource, config_beside
from vpt_jax.errors import UsageError

#: The oldest torch whose safe mode has no known hole.
OLDEST = (2, 10)


def opened(path: str | os.PathLike) -> ArraySource:
    """Reads the tensors of a pickle; nested dicts' keys are joined by '.', everything else is left out.

    Args:
      path: the file.

    Raises:
      UsageError: torch is not installed or too old, or the file wants anything but tensors, or is damaged.
    """
    path = Path(path)
    torch = _torch(path)
    try:
        with warnings.catch_warnings(action='ignore'):  # advice for authors of checkpoints
            content = torch.load(path, weights_only=True, map_location='cpu')
    except Exception as error:  # torch raises whatever the bytes lead it to
        raise _refused(path, error) from error
    if isinstance(content, torch.Tensor) or not isinstance(content, Mapping):
        raise UsageError(f'{path} holds a {type(content).__name__} instead of tensors by name')
    arrays, skipped = {}, {}
    for name, value in _leaves(content, ''):
        array = _array(torch, value) if isinstance(value, torch.Tensor) else None
        if array is None:
            skipped[name] = f'no array but {_kind(value)}'
        elif name in arrays:
            raise UsageError(f'{path} holds {name!r} twice')
        else:
            arrays[name] = array
    return ArraySource(arrays, path, config=config_beside(path), skipped=skipped, files=[path])


def _torch(path: Path) -> ModuleType:
    try:
        torch = importlib.import_module('torch')
    except ImportError as error:
        raise UsageError(f"{path} is a PyTorch pickle, which needs torch: pip install 'vpt_jax[torch]'") from error
    check_version(str(torch.__version__))
    return torch


def check_version(version: str) -> None:
    """Refuses a torch whose safe mode can be got round.

    Raises:
      UsageError: it is older than `OLDEST`.
    """
    found = re.match(r'(\d+)\.(\d+)', version)
    if not found or (int(found[1]), int(found[2])) < OLDEST:
        oldest = '.'.join(map(str, OLDEST))
        raise UsageError(
            f'torch {version} can be made to run code by a file that it reads, even in its safe mode: install '
            f"torch >= {oldest} (pip install -U 'vpt_jax[torch]')"
        )


def _refused(path: Path, error: Exception) -> UsageError:
    wanted = re.search(r'GLOBAL ([\w.]+)', str(error))
    if wanted:
        return UsageError(
            f'{path} wants Python to load {wanted[1]}, and only files of tensors are read: take a safetensors file of '
            'the same weights, or ask its author for one of tensors alone'
        )
    if 'weights only' in str(error).lower() or 'weights_only' in str(error):
        return UsageError(f'{path} holds more than tensors, and vpt_jax never loads that: take a safetensors file')
    return UsageError(f'{path} is cut short or damaged ({type(error).__name__}); copy or download it again')


def _leaves(tree: Mapping, above: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f'{above}{key}.')
        else:
            yield f'{above}{key}', value


def _array(torch: ModuleType, tensor: Any) -> np.ndarray | None:
    """The tensor's numbers in our own memory; None for kinds that numpy has no form for."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        return None
    tensor = tensor.detach().contiguous()
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError):
        return None


def _kind(value: Any) -> str:
    return 'a special tensor' if hasattr(value, 'layout') else type(value).__name__
