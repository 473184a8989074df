"""Converts weight files: `python -m vpt_jax.convert IN OUT.safetensors`, or `... IN --check` to see what is in one.

IN is a file of any form that vpt_jax reads, and here also a PyTorch pickle (`pip install 'vpt_jax[torch]'`), which is
read by torch in its safe mode. OUT, an `.npz` or `.safetensors`, says itself what network it holds and how it is run:
`load_backbone("OUT")` needs no settings. `--form=big_vision` writes a ViT for big_vision instead.
"""

import dataclasses
import json
import math
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from vpt_jax import cli
from vpt_jax.checkpoints import containers
from vpt_jax.checkpoints import scheme as schemes
from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import catalog, converting, loading
from vpt_jax.models.families import FAMILIES, settings_of
from vpt_jax.models.pixels import PIXELS

_USAGE = 'write python -m vpt_jax.convert IN OUT.safetensors, or IN --check'
_WORDS = {'true': True, 'false': False, 'none': None}


def main(
    *paths: str, scheme: str | None, tower: str | None, dtype: str | None, form: str, set: list[str], check: bool
) -> None:
    """Converts, or tells what a file holds; the flags' help says what the arguments are."""
    if not 1 <= len(paths) <= 2 or (len(paths) == 1 and not check):
        raise UsageError(f'cannot tell what to convert to what from {" ".join(paths) or "nothing"!r}: {_USAGE}')
    path, named = containers.split_tower(paths[0])
    with containers.opened(path, pickles=True) as file:
        # As `load_backbone` does: a published file, known by its name, is run as its row of the catalog says. But what
        # the row resamples stays as it is in the file.
        name, row = (None if file.about else catalog.of_file(path)) or (None, None)
        given, conventions = read_settings(set), dict(row.conventions) if row else {}
        tower = tower or named
        hints = {**conventions, **given} | ({'tower': tower} if tower else {})
        part, ported = schemes.port(file, scheme, hints)
        if row:
            print(f'taken for {name} of the catalog ({row.note})', file=sys.stderr)
            ported = dataclasses.replace(
                ported, pixels=next(key for key, value in PIXELS.items() if value == row.pixels)
            )
            conventions = {key: conventions[key] for key in conventions if key in settings_of(FAMILIES[ported.family])}
        model = loading.network(part, ported, **conventions | given)
        if check:
            _tell(file, part, ported, model, name)
        if len(paths) == 2:
            with _bar(part, ported) as bar:
                converting.write(paths[1], part, ported, model, dtype, form, bar.update)
            print(f'wrote {paths[1]} ({os.path.getsize(paths[1]) / 1e6:.1f} MB)')


def read_settings(given: Iterable[str]) -> dict[str, Any]:
    """Settings of networks from a command line.

    Args:
      given: `heads=12`, `activation=gelu`; where a network's own value is no string, numbers, true, false, none and
        [1, 2] are what they look like.

    Raises:
      UsageError: no such setting in any network, or no value.
    """
    fields = {field.name: field for kind in FAMILIES.values() for field in dataclasses.fields(kind)
              if field.name in settings_of(kind)}  # fmt: skip
    found = {}
    for text in given:
        name, equals, value = text.partition('=')
        if name not in fields:
            raise unknown('setting', name, fields)
        if not equals:
            raise UsageError(f'cannot read the setting {text!r}: write --set NAME=VALUE')
        found[name] = value if isinstance(fields[name].default, str) else _value(value)
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _tell(file: Source, part: Source, ported: Ported, model: Any, published: str | None) -> None:
    """What a file holds, and the checksum of a forward pass."""
    types = converting.stored_types(part, ported)
    shapes = loading.shapes(model)
    counts = Counter(map(str, types.values()))
    print(f'file        {file.path}')
    print(f'sha256      {containers.fingerprint(file.files)}')
    print(f'network     {ported.family}' + (f', {published}' if published else ''))
    described = ' '.join(f'{name}={value}' for name, value in converting.described(model).items())
    print(textwrap.fill(described, 120, initial_indent='settings    ', subsequent_indent=' ' * 12,
                        break_long_words=False, break_on_hyphens=False))  # fmt: skip
    pixels = PIXELS[ported.pixels]
    mean, std = (' '.join(map(str, values)) for values in (pixels.mean, pixels.std))
    print(f'pixels      {ported.pixels}: mean {mean}, deviation {std}, resized by {pixels.resize}')
    stored = [f'{dtype} ({count})' if len(counts) > 1 else dtype for dtype, count in counts.items()]
    print(f'parameters  {sum(math.prod(shape.shape) for shape in shapes.values()):,} in {len(shapes)} arrays of '
          f'{", ".join(stored)}')  # fmt: skip
    for line in converting.tree(model, types):
        print(f'  {line}')
    for reason, names in _by_reason(ported.ignored).items():
        more = f' and {len(names) - 4} more' if len(names) > 4 else ''
        print(f'ignored     {", ".join(names[:4])}{more}: {reason}')
    with _bar(part, ported) as bar:
        params = _params(part, ported, model, bar)
    found = converting.features(model, params)
    first = ' '.join(f'{value:.5f}' for value in found[:4])
    print(f'features    {found.size} of a fixed image: mean {found.mean():.5f}, deviation {found.std():.5f}, first '
          f'{first}')  # fmt: skip


def _params(part: Source, ported: Ported, model: Any, bar: tqdm) -> dict:
    flat = {}
    for name, array in loading.arrays(part, ported, model):
        flat[name] = jax.numpy.asarray(array, np.float32)
        bar.update(array.nbytes)
    return loading.parameters(model, flat)


def _by_reason(ignored: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name in sorted(ignored, key=natural):
        reasons.setdefault(ignored[name], []).append(name)
    return reasons


def _bar(part: Source, ported: Ported) -> tqdm:
    """Progress in bytes on stderr; files that are read at once show none."""
    shapes = {name: weight.shape for name, weight in ported.weights.items()}
    types = converting.stored_types(part, ported)
    total = sum(math.prod(shape) * types[name].itemsize for name, shape in shapes.items())
    quiet = not sys.stderr.isatty()
    return tqdm(total=total, unit='B', unit_scale=True, unit_divisor=1024, desc=Path(part.path).name,
                dynamic_ncols=True, mininterval=10 if quiet else 0.1, delay=2)  # fmt: skip


def _flags() -> list[flags.FlagHolder]:
    text = flags.DEFINE_string
    return [
        text('scheme', None, "whose naming the file has (a module of vpt_jax.checkpoints.schemes, such as 'timm_vit'); "
             'by default recognised'),
        text('tower', None, "which network of a file with several, such as 'img'; IN:img likewise"),
        text('dtype', None, 'float32, float16 or bfloat16; by default as stored'),
        text('form', 'canonical', 'canonical, or big_vision for ViTs that it can hold'),
        flags.DEFINE_multi_string('set', [], 'a setting over what the file says, NAME=VALUE (heads=12); repeatable'),
        flags.DEFINE_bool('check', False, 'print what the file holds, and a checksum of its features'),
    ]  # fmt: skip


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags(), takes_arguments=True)
