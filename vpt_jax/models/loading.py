"""From a weight file to a network: settings, parameters in the right shapes, the position embedding's grid."""

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import patches, posemb
from vpt_jax.models.families import FAMILIES, settings_of
from vpt_jax.models.pixels import PIXELS


def build(
    source: Source, ported: Ported, param_dtype: Any = jnp.float32, on_host: bool = False, **settings: Any
) -> tuple[nn.Module, dict]:
    """A network with the weights of a file in it.

    Arrays are read, cast and, unless they are to stay `on_host`, put on the device one by one, so that little more than
    the weights themselves is ever in memory.

    Args:
      source: the opened file (the part of it that `scheme.port` returned).
      ported: how it becomes a network.
      param_dtype: what to store the parameters in.
      on_host: whether they are to be numpy arrays.
      **settings: settings of the network over what the file and its scheme say.

    Returns:
      (module, its parameters as the module stores them).

    Raises:
      UsageError: settings or names or shapes that do not fit.
    """
    model = network(source, ported, **settings)
    # Cast by numpy and put as it is: jax would compile a program for every shape, `jnp.asarray` too.
    cast = ((name, np.asarray(array).astype(param_dtype, copy=False)) for name, array in arrays(source, ported, model))
    flat = {name: array if on_host else jax.device_put(array) for name, array in cast}
    return model, parameters(model, flat)


def parameters(model: nn.Module, flat: Mapping[str, Any]) -> dict:
    """Arrays by canonical name as the network stores its parameters."""
    ordered = {name: flat[name] for name in sorted(flat, key=natural)}
    return model.stored(traverse_util.unflatten_dict(ordered, sep='/'))


def network(source: Source, ported: Ported, **settings: Any) -> nn.Module:
    """The network that a plan speaks of, without weights; `arrays` reads them.

    Raises:
      UsageError: settings that are unknown or make no network, names or shapes that do not fit.
    """
    if ported.family not in FAMILIES:
        raise unknown(f'family of the network in {source.path}', ported.family, FAMILIES)
    if ported.pixels not in PIXELS:
        raise unknown(f'convention for pixels in {source.path}', ported.pixels, PIXELS)
    kind, values = FAMILIES[ported.family], {**ported.settings, **settings}
    for name in values:
        if name not in settings_of(kind):
            raise unknown(f'setting of the network {ported.family!r}', name, settings_of(kind))
    try:
        model = kind(**values)
        template = shapes(model)
    except UsageError:
        raise
    # What jax and flax raise for settings of other types, and for sizes that cannot be.
    except (TypeError, ValueError, ArithmeticError, AttributeError, flax.errors.FlaxError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UsageError(f'no network can be made with the settings of {source.path}: {reason}') from error
    resizable = ('pos_embedding', 'embedding/kernel') if 'patch_size' in settings else ('pos_embedding',)
    check_names(ported.weights, template, source.path, resizable)
    return model


def arrays(source: Source, ported: Ported, model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """The network's weights one at a time, (canonical name, array) in the file's order and its types.

    A resampled position embedding or patch kernel is float32.

    Raises:
      UsageError: the file is damaged, or its position embedding cannot be resampled to the network's.
    """
    template = shapes(model)
    prefix, rule = getattr(model, 'posemb_prefix', 0), getattr(model, 'posemb_rule', '')
    for name, array in scheme.arrays(source, ported):
        want = template[name].shape
        if name == 'pos_embedding' and array.shape != want and array.shape[::2] == want[::2]:
            array = np.asarray(_resampled(array, want[1], source.path, prefix, rule))
        if name == 'embedding/kernel' and array.shape != want:
            array = np.asarray(patches.resample(array, want[0]))
        yield name, array


@functools.lru_cache(maxsize=64)
def shapes(model: nn.Module) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Canonical names to the shapes of a network's parameters."""
    # Scanned, there is one block to trace, however many the model has.
    model = model.clone(scan=True) if hasattr(model, 'scan') else model

    def initial(images: jax.Array) -> dict:
        # The keys are made in here, where nothing is computed: outside, a program would be compiled for them.
        keys = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
        return model.canonical(model.init(keys, images)['params'])

    size = model.image_size
    tree = jax.eval_shape(initial, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return traverse_util.flatten_dict(tree, sep='/')


def check_names(
    weights: Mapping[str, Any], template: Mapping[str, Any], path: str, resizable: Collection[str] = ('pos_embedding',)
) -> None:
    """Refuses a file whose names or shapes are not the network's.

    Args:
      weights: canonical name to anything with a `shape`.
      template: likewise, the network's own.
      path: what to call the file in messages.
      resizable: what may have another size, of `pos_embedding` (number of entries) and `embedding/kernel` (patches).

    Raises:
      UsageError: the first name that is missing, unexpected or misshaped, and how many there are.
    """
    faults = [_first(template.keys() - weights.keys(), 'lacks', '')]
    faults += [_first(weights.keys() - template.keys(), 'holds', ' that the model has no place for')]
    if any(faults):
        raise UsageError(f'{path} does not fit the model: it {"; it ".join(filter(None, faults))}')
    wrong = []
    for name in sorted(template, key=natural):
        have, want = tuple(weights[name].shape), tuple(template[name].shape)
        kept = slice(2, None) if name == 'embedding/kernel' else slice(None, None, 2)
        if have != want and not (name in resizable and have[kept] == want[kept]):
            wrong.append(f'{name!r} has shape {list(have)} where the model has {list(want)}')
    if wrong:
        more = f' (and {len(wrong) - 1} more such shapes)' if len(wrong) > 1 else ''
        raise UsageError(f'{path} does not fit the model: {wrong[0]}{more}')


def _first(names: Iterable[str], verb: str, why: str) -> str:
    names = sorted(names, key=natural)
    if not names:
        return ''
    return f'{verb} {names[0]!r}' + (f' and {len(names) - 1} more' if len(names) > 1 else '') + why


def _resampled(pos: np.ndarray, count: int, path: str, prefix: int, rule: str) -> Any:
    """`pos` for `count` entries; both counts are a prefix and a square grid."""
    old, new = (math.isqrt(max(n - prefix, 0)) for n in (pos.shape[1], count))
    if not new or old**2 + prefix != pos.shape[1] or new**2 + prefix != count:
        raise UsageError(
            f'{path} has {pos.shape[1]} position embeddings where the model has {count}; they cannot be resampled, '
            f'because with posemb_prefix={prefix} that is no square grid'
        )
    return posemb.resample(jnp.asarray(pos, jnp.float32), (new, new), prefix, rule)
