"""Weight files into the project's own form, ViTs back into big_vision's, and what a weight file holds in words."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes import big_vision, canonical
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import loading
from vpt_jax.models.families import settings_of
from vpt_jax.models.vit import ViT

FORMS = ('canonical', 'big_vision')

# How a network is run, not what it is.
_RUN = ('dtype', 'scan', 'dropout')
# What is told of a network even where it is as usual.
_TOLD = ('width', 'depth', 'depths', 'heads', 'patch_size', 'image_size', 'pool', 'posemb_rule', 'activation',
         'ln_eps')  # fmt: skip
# Settings of a ViT that big_vision's has too, whatever their value; all others must be as big_vision's is.
_SHARED = ('width', 'depth', 'mlp_dim', 'heads', 'patch_size', 'image_size', 'pool', 'posemb', 'posemb_rule',
           'cls_token', 'pre_logits', 'stem_width', *_RUN)  # fmt: skip
# What can be written differently with the same features.
_FOLDED = ('posemb_prefix', 'layer_scale', 'patch_bias')


def write(
    path: str | os.PathLike,
    source: Source,
    ported: Ported,
    model: nn.Module,
    dtype: str | None = None,
    form: str = 'canonical',
    tell: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a network's weights; in canonical form one array at a time is in memory.

    Args:
      path: the file, `.npz` or `.safetensors`; big_vision's form is always an `.npz`.
      source: the opened file (the part of it that `scheme.port` returned).
      ported: how it becomes a network.
      model: which network (`loading.network`).
      dtype: what to store in, a name of `big_vision.STORAGE`; None for what each array is stored in now.
      form: a name of `FORMS`.
      tell: called with a number of bytes whenever so many more have been read.

    Raises:
      UsageError: unknown dtype, form or suffix; a network that big_vision's ViT cannot express; a damaged source; or
        the file cannot be written.
    """
    if form not in FORMS:
        raise unknown('form', form, FORMS)
    suffix, types = canonical.container(path), stored_types(source, ported, dtype)

    def cast() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in loading.arrays(source, ported, model):
            yield name, array.astype(types[name], copy=False)
            tell(array.nbytes)

    if form == 'big_vision':
        if suffix != '.npz':
            raise UsageError(f"cannot write {path}: big_vision's files are .npz files")
        check_big_vision(model)
        types['embedding/bias'] = types['embedding/kernel']
        flat = {name: array.astype(types[name]) for name, array in _folded(dict(cast()), model).items()}
        big_vision.write(path, traverse_util.unflatten_dict(flat, sep='/'))
        return
    shapes = {name: (shape.shape, types[name]) for name, shape in loading.shapes(model).items()}
    canonical.write(path, shapes, cast(), ported.family, _settings(model), ported.pixels)


def check_big_vision(model: nn.Module) -> None:
    """Refuses a network whose features big_vision's ViT would not reproduce.

    Raises:
      UsageError: the first setting that it does not have, and how to insist where that makes sense.
    """
    if type(model) is not ViT:  # a BEiT, which is one too, has more to lose
        raise UsageError(f"big_vision's ViT cannot hold a {type(model).__name__}: convert it to the canonical form")
    like = {f.name: f.default for f in dataclasses.fields(ViT)} | {'activation': 'gelu_tanh'}
    for name in settings_of(ViT):
        value = getattr(model, name)
        if name in _SHARED + _FOLDED or value == like[name]:
            continue
        insist = f'; --set {name}={like[name]} writes it all the same' if name in ('activation', 'ln_eps') else ''
        raise UsageError(f"big_vision's ViT has {name}={like[name]!r} and this network {value!r}, so that its features "
                         f'would be others{insist}')  # fmt: skip
    if model.posemb == 'none' or model.pool == 'tok_gap' or model.posemb_prefix > model.cls_token:
        given = {'posemb': model.posemb, 'pool': model.pool, 'posemb_prefix': model.posemb_prefix}
        raise UsageError(f"big_vision's ViT has no counterpart of {', '.join(f'{k}={v}' for k, v in given.items())}: "
                         'say what the weights are for, such as --set posemb=sincos2d')  # fmt: skip


def tree(model: nn.Module, types: Mapping[str, Any]) -> list[str]:
    """A line for every array of a network, consecutive blocks in one: 'NAME  [shape]  dtype'.

    Args:
      model: the network.
      types: canonical name to the type it is stored in.
    """
    groups: dict[tuple, list[str]] = {}
    for name, shape in sorted(loading.shapes(model).items(), key=lambda item: natural(item[0])):
        found = re.fullmatch(r'(.*?\D)(\d+)(/.*)', name)
        before, number, after = found.groups() if found else (name, '', '')
        key = (before, after, shape.shape, str(types[name]))
        while key in groups and int(groups[key][-1]) + 1 != int(number):  # blocks of other shapes lie between
            key = (*key, None)
        groups.setdefault(key, []).append(number)
    rows = []
    for (before, after, shape, dtype, *_), numbers in groups.items():
        middle = numbers[0] if len(numbers) == 1 else f'{{{numbers[0]}..{numbers[-1]}}}'
        rows.append((f'{before}{middle}{after}', str(list(shape)), dtype))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f'{name:{widths[0]}}  {shape:{widths[1]}}  {dtype}' for name, shape, dtype in rows]


def stored_types(source: Source, ported: Ported, dtype: str | None = None) -> dict[str, np.dtype]:
    """Canonical name to the type to store it in: `dtype`, or that of what it is made of.

    Raises:
      UsageError: `dtype` is no name of `big_vision.STORAGE`.
    """
    if dtype is not None and dtype not in big_vision.STORAGE:
        raise unknown('storage dtype', dtype, big_vision.STORAGE)

    def stored(names: tuple[str, ...]) -> np.dtype:
        if dtype is not None or not names:
            return np.dtype(big_vision.STORAGE[dtype or 'float32'])
        return functools.reduce(np.promote_types, (source.members[name].dtype.newbyteorder('=') for name in names))

    return {name: stored(weight.names) for name, weight in ported.weights.items()}


def fixed_image(size: int) -> np.ndarray:
    """An image for checksums, float32 [1, size, size, 3] in [-1, 1]: the same one everywhere."""
    row, column, channel = np.ogrid[:size, :size, :3]
    return np.sin(0.37 * row + 0.61 * column + 1.7 * channel).astype(np.float32)[None]


def features(model: nn.Module, params: dict) -> np.ndarray:
    """Features of `fixed_image` in float32 at the highest precision, flattened.

    Args:
      model: the network.
      params: its parameters, as it stores them.
    """
    if hasattr(model, 'scan') and not model.scan:  # one block to compile
        scanned = model.clone(scan=True)
        params = scanned.stored(params)
        model = scanned
    with jax.default_matmul_precision('highest'):
        found = jax.jit(model.clone(dtype=jnp.float32).apply)({'params': params}, fixed_image(model.image_size))
    return np.asarray(found, np.float32).reshape(-1)


def described(model: nn.Module) -> dict[str, Any]:
    """The settings that tell a network from others of its family, and its conventions; not what is left off or out."""
    unset = {f.name: f.default for f in dataclasses.fields(model)}
    return {name: value for name, value in _settings(model).items() if name in _TOLD or value != unset[name]}


def _settings(model: nn.Module) -> dict[str, Any]:
    return {name: getattr(model, name) for name in settings_of(type(model)) if name not in _RUN}


def _folded(flat: dict[str, np.ndarray], model: ViT) -> dict[str, np.ndarray]:
    """A ViT's weights without what big_vision's does not have: CLS's position, layer scale, a patch layer's no bias."""
    flat = dict(flat)
    if model.posemb == 'learn' and model.posemb_prefix:
        pos = _wide(flat['pos_embedding'])
        flat['cls'] = _wide(flat['cls']) + pos[:, :1]
        flat['pos_embedding'] = pos[:, 1:]
    if not model.patch_bias:
        flat['embedding/bias'] = np.zeros(model.width, flat['embedding/kernel'].dtype)
    for i in range(model.depth if model.layer_scale else 0):
        block = f'Transformer/encoderblock_{i}'
        for branch, layer in enumerate(('MultiHeadDotProductAttention_0/out', 'MlpBlock_0/Dense_1'), 1):
            gamma = _wide(flat.pop(f'{block}/layer_scale_{branch}'))
            for leaf in ('kernel', 'bias'):
                flat[f'{block}/{layer}/{leaf}'] = _wide(flat[f'{block}/{layer}/{leaf}']) * gamma
    return flat


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype in (np.float16, ml_dtypes.bfloat16) else array
