"""From the names in a weight file to a network of ours: which scheme it is, and how each array comes out of it.

Every source family is one file of `schemes/`, a module with

- `NAME`: what a user calls it; `ABOUT`: whose files those are, in a line;
- `claims(names)`: whether these names, container prefixes stripped, are certainly its own;
- `port(source, hints)`: the plan, a `Ported`. `hints` are settings that the caller insists on, such as `heads` where
  weights do not tell them; it raises `UsageError` for names that are missing or shapes that cannot be.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from vpt_jax.checkpoints.classifier import with_classifier
from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.ported import Ported, Weight
from vpt_jax.checkpoints.schemes import SCHEMES
from vpt_jax.checkpoints.source import Part, Source
from vpt_jax.errors import UsageError, unknown

# Where trainers put the weights in what they save. The first that leaves names of a known scheme counts.
_CONTAINERS = ('', 'params/', 'opt/target/', 'model.', 'state_dict.', 'module.', 'state_dict.module.',
               'module.base_encoder.', 'state_dict.module.base_encoder.', 'module.encoder_q.',
               'state_dict.module.encoder_q.', 'teacher.backbone.',
               'teacher.module.backbone.', 'student.backbone.', 'student.module.backbone.', 'backbone.',
               'module.backbone.', 'model.module.')  # fmt: skip
#: The image tower of files that hold several.
TOWER = 'img'


def port(source: Source, scheme: str | None = None, hints: Mapping[str, Any] | None = None) -> tuple[Source, Ported]:
    """Recognises whose file it is and plans how to read it.

    Args:
      source: the opened file.
      scheme: the name of a scheme; None to tell it from the names.
      hints: settings that the caller insists on; 'tower' picks one of several networks in a file ('img'), and
        'own_classifier', or a setting 'classes', reads the task head, which is left out otherwise.

    Returns:
      (the part of the file that `Ported.weights` speaks of, the plan).

    Raises:
      UsageError: unknown scheme, names of no known scheme, or a file that its scheme finds wrong.
    """
    hints = dict(hints or {})
    tower = hints.pop('tower', None)
    own_classifier = hints.pop('own_classifier', False) or hints.get('classes')
    module, part, prefix = _recognised(source, scheme, tower)
    ported = module.port(part, hints)
    ported = with_classifier(part, ported) if own_classifier else ported
    for weight in ported.weights.values():
        for name in weight.names:
            if not _floating(part.members[name].dtype):
                raise UsageError(
                    f'{source.path}: {name!r} holds {part.members[name].dtype}, not floating-point weights'
                )
    ignored = {name: _outside(name) for name in source.members if not name.startswith(prefix)}
    ignored |= {prefix + name: reason for name, reason in ported.ignored.items()} | source.skipped
    return part, dataclasses.replace(ported, ignored=ignored)


def load(source: Source, ported: Ported) -> dict:
    """Reads what a plan needs as a nested dict of numpy arrays in the stored types, keys in natural order."""
    flat = dict(arrays(source, ported))
    return traverse_util.unflatten_dict({name: flat[name] for name in sorted(flat, key=natural)}, sep='/')


def arrays(source: Source, ported: Ported) -> Iterator[tuple[str, np.ndarray]]:
    """Reads what a plan needs one array at a time, each member once: (canonical name, array).

    They come in the file's order, so that a member of which many arrays are made (stacked blocks, fused layers) is
    let go of before the next one is read.

    Raises:
      UsageError: a member is damaged, or becomes another shape than the plan says.
    """
    uses = Counter(name for weight in ported.weights.values() for name in weight.names)
    order = {name: i for i, name in enumerate(source.members)}
    held: dict[str, np.ndarray] = {}
    for canonical in sorted(ported.weights, key=lambda name: _first(ported.weights[name], order)):
        weight = ported.weights[canonical]
        parts = []
        for name in weight.names:
            parts.append(held[name] if name in held else source.read(name))
            uses[name] -= 1
            if uses[name]:
                held[name] = parts[-1]
            else:
                held.pop(name, None)
        array = weight.layout(*parts)
        if array.shape != weight.shape:
            raise UsageError(f'{source.path}: {weight.names[0]!r} becomes {list(array.shape)} instead of '
                             f'{list(weight.shape)}')  # fmt: skip
        yield canonical, array


def _first(weight: Weight, order: Mapping[str, int]) -> int:
    return min((order[name] for name in weight.names), default=-1)


def _recognised(source: Source, scheme: str | None, tower: str | None) -> tuple[ModuleType, Source, str]:
    """The scheme of a file, and the part of it that holds the network."""
    known = {module.NAME: module for module in SCHEMES}
    if scheme is not None and scheme not in known:
        raise unknown('checkpoint scheme', scheme, known)
    if source.about and tower is None and scheme in (None, 'canonical'):
        return known['canonical'], source, ''
    modules = known.values() if scheme is None else [known[scheme]]
    towers = [f'{tower}/'] if tower else ['', f'{TOWER}/']
    for container in _CONTAINERS:
        for prefix in (container + t for t in towers):
            part = Part(source, prefix) if prefix else source
            for module in modules:
                if part.members and module.claims(part.members.keys()):
                    return module, part, prefix
    if tower and not any(f'{tower}/' in name for name in source.members):
        tops = sorted({name.split('/')[0] for name in source.members})
        raise UsageError(f'{source.path} holds no {tower!r}: its top-level names are {", ".join(tops[:8])}')
    first = min(source.members, key=natural, default='nothing')
    which = f'of the scheme {scheme!r}' if scheme else 'of any scheme that vpt_jax knows'
    raise UsageError(
        f'{source.path} does not hold a network {which}: it has {len(source.members)} arrays, the first is {first!r}'
    )


def _floating(dtype: np.dtype) -> bool:
    return dtype.kind == 'f' or dtype == ml_dtypes.bfloat16


def _outside(name: str) -> str:
    tops = {'opt': 'optimizer state', 'optimizer': 'optimizer state', 'chrono': 'training clock', 'txt': 'text tower',
            'llm': 'language model'}  # fmt: skip
    parts = name.replace('.', '/').split('/')
    return next((tops[p] for p in parts[:2] if p in tops), 'not part of the network')
