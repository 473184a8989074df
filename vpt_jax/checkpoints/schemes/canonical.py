"""Our own files, which say what they hold: npz or safetensors in the networks' own names, written by `vpt_jax.convert`.

What a file says of itself is `Source.about`, JSON of `FORMAT`: the family of the network, its settings, its usual
pixels. So nothing has to be guessed, and no convention given again.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpt_jax.checkpoints import npz, safetensors_file
from vpt_jax.checkpoints.ported import Ported, Weight
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

NAME = 'canonical'
ABOUT = 'files of vpt_jax.convert, which say themselves what they hold'
FORMAT = 1

_SUFFIXES = ('.npz', '.safetensors')
# Larger than any setting of a network, small enough to try.
_LARGEST = 1 << 16


def claims(names: Collection[str]) -> bool:
    """Never by names: such a file is known by `Source.about`."""
    return False


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan that the file itself states.

    Raises:
      UsageError: the file says nothing, was written by a later version, or says what cannot be.
    """
    about = source.about
    if not about:
        raise UsageError(f'{source.path} does not say what it holds: it is no file of vpt_jax.convert')
    if about.get('format') != FORMAT:
        raise UsageError(
            f'{source.path} has format {about.get("format")!r} (written by vpt_jax {about.get("vpt_jax", "unknown")}) '
            f'and this vpt_jax reads format {FORMAT}: install a version that reads it'
        )
    family, settings, pixels = about.get('family'), about.get('settings'), about.get('pixels')
    if not isinstance(family, str) or not isinstance(settings, dict) or not isinstance(pixels, str):
        raise UsageError(f'{source.path} is damaged: it does not say family, settings and pixels of its network')
    settings = {name: _tuples(value) for name, value in settings.items()}
    blocks = sum(_numbers(settings.get('depth', settings.get('depths'))))
    if blocks > len(source.members) or any(n > _LARGEST for n in _numbers(tuple(settings.values()))):
        raise UsageError(f'{source.path} is damaged: it describes a larger network than it holds')
    weights = {name: Weight(member.shape, (name,)) for name, member in source.members.items()}
    return Ported(family, settings, weights, {}, pixels)


def write(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[tuple[str, np.ndarray]],
    family: str,
    settings: Mapping[str, Any],
    pixels: str,
) -> None:
    """Writes a network, one array at a time.

    Args:
      path: a `.npz` or `.safetensors` file; its name says which of the two it becomes.
      shapes: canonical name to (shape, type) of everything that will come.
      arrays: pairs of canonical name and array.
      family: a key of `models.families.FAMILIES`.
      settings: of the network: numbers, strings, booleans, None and tuples of them.
      pixels: a key of `models.pixels.PIXELS`.

    Raises:
      UsageError: another suffix, or the file cannot be written.
    """
    about = {'format': FORMAT, 'vpt_jax': _version(), 'family': family, 'settings': dict(settings), 'pixels': pixels}
    text = json.dumps(about, sort_keys=True, allow_nan=False).encode()
    if container(path) == '.npz':
        npz.write(path, arrays, text)
    else:
        safetensors_file.write(path, shapes, arrays, text)


def container(path: str | os.PathLike) -> str:
    """The suffix of a file to write.

    Raises:
      UsageError: none that can be written.
    """
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise UsageError(f'cannot write {path}: the name must end in {" or ".join(_SUFFIXES)}')
    return suffix


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)):
        yield math.inf if value != value else value


def _version() -> str:
    try:
        return importlib.metadata.version('vpt_jax')
    except importlib.metadata.PackageNotFoundError:
        return 'unknown'
