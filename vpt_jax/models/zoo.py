"""Backbones, ready to run: by name, by path, by address, or untrained.

`catalog` knows which weights are published, `checkpoints.fetch` brings them here, `checkpoints.scheme` recognises whose
naming a file has, `loading` makes a network of it. Weights do not tell their conventions. A name of the catalog has its
row's; so has a path or an address whose file is published there; any other file has its scheme's home conventions.
"""

import concurrent.futures
import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.checkpoints import containers, fetch, scheme
from vpt_jax.checkpoints.fetch import cache_folder
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import catalog
from vpt_jax.models.catalog import Row
from vpt_jax.models.families import FAMILIES, family_of, settings_of
from vpt_jax.models.loading import build
from vpt_jax.models.pixels import HALF, IMAGENET, PIXELS, Pixels
from vpt_jax.models.vit import VARIANTS

__all__ = [
    'HALF',
    'IMAGENET',
    'Backbone',
    'Pixels',
    'backbones',
    'cache_folder',
    'is_named',
    'load_backbone',
    'located',
]

_ASSETS = Path(__file__).parent.parent / 'assets'
_RANDOM = re.compile(r'random:([^@]+?)(?:@(\d+))?')
_VARIANT = re.compile(r'(.+)/(\d+)')
#: What a file of weights is called, where the name alone has to tell.
_SUFFIXES = ('.npz', '.safetensors', '.msgpack', '.pth', '.pt', '.bin', '.ckpt', '.pkl', '.h5', '.tar', '.json')
_SEED = 0
_told: set[str] = set()


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What the caller of `load_backbone` wants, checked as far as it can be without the file."""

    name: str
    image_size: int | None
    param_dtype: Any
    pixels: Pixels | None
    scheme: str | None
    own_classifier: bool
    on_host: bool
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network, ready to run: `backbone.model.apply({'params': backbone.params}, images)`.

    Attributes:
      name: what `load_backbone` was given (for a path, the file's name).
      model: the network's settings and code, one of `families.FAMILIES`.
      params: its parameters, nested dict of arrays.
      sha256: of the weight file (of its files' names and digests, if there are several); for random weights a string
        that starts with 'random:' and says how they were drawn.
      pixels: what `images` must look like; their size is `model.image_size`.
    """

    name: str
    model: nn.Module
    params: dict
    sha256: str
    pixels: Pixels

    @property
    def family(self) -> str:
        """Key of `families.FAMILIES`."""
        return family_of(self.model)

    @property
    def num_params(self) -> int:
        """Number of parameters, without any task head."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def with_scan(self, scan: bool = True) -> 'Backbone':
        """The same network with its blocks scanned (compiles once whatever the depth) or unrolled.

        Raises:
          UsageError: `scan` in a network whose blocks differ, which cannot.
        """
        if scan == getattr(self.model, 'scan', False):
            return self
        _check_settings(self.family, {'scan': scan})
        model = self.model.clone(scan=scan)
        params = model.stored(self.params) if scan else _canonical(self.model, self.params)
        return dataclasses.replace(self, model=model, params=params)

    def describe(self) -> dict[str, Any]:
        """JSON-able {'name', 'sha256', 'family', 'settings'} for a prompt file; the settings are the network's."""
        values = {name: getattr(self.model, name) for name in settings_of(type(self.model))}
        values['dtype'] = None if values['dtype'] is None else jnp.dtype(values['dtype']).name
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {'name': self.name, 'sha256': self.sha256, 'family': self.family, 'settings': values}


def backbones() -> Mapping[str, Row]:
    """Every backbone that `load_backbone` knows by name, in a sensible order."""
    return catalog.rows()


def load_backbone(
    name: str | os.PathLike = 'tiny_vit64',
    *,
    image_size: int | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    pixels: Pixels | None = None,
    scheme: str | None = None,
    own_classifier: bool = False,
    on_host: bool = False,
    **settings: Any,
) -> Backbone:
    """Loads a frozen backbone; what is published is downloaded once, into $VPT_JAX_CACHE or ~/.cache/vpt_jax.

    Args:
      name: one of
        - a name of `backbones()`;
        - a path: a file or directory of any container and naming that vpt_jax reads; `FILE:img` for one of several
          networks in it;
        - an address: `hf:OWNER/NAME[:FILE]`, `gs://BUCKET/FILE` or `https://...`, `:img` likewise;
        - `random:NAME` or `random:VARIANT/PATCH`, with `@SIZE` behind it if wanted (`random:resnet50_tv`,
          `random:Ti/8@64`): an UNTRAINED network of the catalog, or of a size of `vit.VARIANTS`, from a fixed seed,
          for benchmarks and smoke tests.
      image_size: side of the images in pixels; the position embedding is resampled if the weights are for another.
        None: the catalog's, else as the weights are (a remainder smaller than a patch is dropped).
      dtype: type to compute in ('bfloat16', ...); None: the parameters'.
      param_dtype: type to store the parameters in; None: float32.
      pixels: the input's convention; None: the catalog's, else the naming scheme's.
      scheme: name of the naming scheme (`checkpoints.schemes`); None to recognise it.
      own_classifier: keep the classifier that the weights came with, behind the features, which then are its scores.
      on_host: give the parameters as numpy arrays, for one who lays them on devices himself (`Recipe.shard_backbone`).
      **settings: any other setting of the network, over what the file, its scheme and the catalog say (`scan=True`,
        `pool='gap'`, `activation='gelu'`, `heads=12`, `pre_logits=768` to keep that layer).

    Returns:
      The backbone.

    Raises:
      UsageError: unknown name or setting; a file that is missing and cannot be fetched (the message says which file to
        put where), is damaged, or is not what it should be; an image size that does not fit.
    """
    name = os.fspath(name)
    choice = _Choice(name, image_size, _floating('param_dtype', param_dtype or jnp.float32), pixels, scheme,
                     own_classifier, on_host, _checked(image_size, dtype, settings))  # fmt: skip
    if name.startswith('random:'):
        return _random(choice)
    if name in catalog.rows():
        return _from_file(located(name), choice, name)
    address, tower = containers.split_tower(name)
    if fetch.is_address(address):
        published = catalog.of_address(address)
        if published:
            return _from_file(located(published[0]), choice, published[0], tower)
        return _from_file(fetch.present(address), choice, None, tower, fetch.pin_of(fetch.cached(address)))
    path = Path(address).expanduser()
    if os.sep not in address and not address.lower().endswith(_SUFFIXES) and not path.exists():
        raise catalog.unknown_name(name)
    return _from_file(path, dataclasses.replace(choice, name=path.name), None, tower)


def is_named(name: str) -> bool:
    """Whether `load_backbone` takes it for a name of the catalog, an untrained network or an address, not a path."""
    path, _ = containers.split_tower(name)
    return name in catalog.rows() or name.startswith('random:') or fetch.is_address(path)


def located(name: str) -> Path:
    """The weights of a name of the catalog on this machine, downloaded if need be.

    Raises:
      UsageError: they are not here and cannot be fetched; the message says which file to put where.
    """
    row = catalog.rows()[name]
    if row.how == catalog.PACKAGE:
        path = _ASSETS / f'{name}.npz'
        if not path.exists():
            raise UsageError(f'the weights of {name!r} should be in the package, but {path} is missing: reinstall '
                             'vpt_jax')  # fmt: skip
        return path
    if row.noncommercial and name not in _told:
        _told.add(name)
        print(f'warning: the weights of {name} are under {row.license}: no commercial use', file=sys.stderr)
    path = row.path
    if path.exists():
        return path
    what = f'the weights of {name!r} are not on this machine'
    if row.how == catalog.CONVERT:
        file, known = row.url.rsplit('/', 1)[-1], ' starts with '.join(row.known.split(':'))
        raise UsageError(f'{what} and are published as a PyTorch pickle, which vpt_jax never opens by itself: download '
                         f'{row.url}{f" (its {known})" if known else ""}, then run python -m vpt_jax.convert {file} '
                         f'{path}')  # fmt: skip
    if row.how == catalog.BY_HAND:
        raise UsageError(f'{what}: accept the {row.license} at {row.url} and put the file {path.name} at {path}')
    size = f'{row.mib:,} MiB, ' if row.mib else ''
    about = f'{name}: {row.note}\nfetching {row.url} ({size}{row.license})'
    return fetch.present(row.source, path, row.known, about)


def _checked(image_size: int | None, dtype: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of any network as they are kept: tuples, not the lists of a JSON file."""
    every = {setting for family in FAMILIES.values() for setting in settings_of(family)}
    for key in settings:
        if key not in every:
            raise unknown('backbone setting', key, every)
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise UsageError(f'image_size must be a whole number of pixels >= 1, got {image_size!r}')
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return kept if dtype is None else {**kept, 'dtype': _floating('dtype', dtype)}


def _from_file(
    path: Path, choice: _Choice, published: str | None, tower: str | None = None, pin: Path | None = None
) -> Backbone:
    """A file, with the conventions of a row if it is known to be the row's, or is called like it."""
    row = catalog.rows()[published] if published else None
    with containers.opened(path) as file, concurrent.futures.ThreadPoolExecutor(1) as beside:
        sha256 = beside.submit(containers.fingerprint, file.files)
        like = (published, row) if row else None if file.about else catalog.of_file(path)
        conventions = {**like[1].conventions, **like[1].resized} if like else {}
        tower = tower or (row.tower if row else None)
        hints = {**conventions, **choice.settings} | ({'tower': tower} if tower else {})
        hints |= {'own_classifier': True} if choice.own_classifier else {}
        part, ported = scheme.port(file, choice.scheme or (row.scheme if row else None), hints)
        if row:
            check_row(path, published, row, ported)
        _check_settings(ported.family, choice.settings)
        known = settings_of(FAMILIES[ported.family])
        values = {key: value for key, value in hints.items() if key in known}
        if choice.image_size is not None:
            values['image_size'] = _fitting(choice.image_size, ported.family, {**ported.settings, **values})
        model, params = build(part, ported, choice.param_dtype, choice.on_host, **values)
    if row and row.how != catalog.PACKAGE:
        # Here and not beside the file: one of the hub may lie in that library's own cache.
        fetch.check(path, sha256.result(), row.known if row.how == catalog.DOWNLOAD else '', fetch.pin_of(row.path))
    elif pin:
        fetch.check(path, sha256.result(), pin=pin)
    pixels = choice.pixels or (like[1].pixels if like else PIXELS[ported.pixels])
    return Backbone(choice.name, model, params, sha256.result(), pixels)


def check_row(path: Path | str, name: str, row: Row, ported: Ported) -> None:
    """Refuses a file that is not the row's."""
    if ported.family != row.family:
        raise UsageError(f'{path} is not {name}: it holds a {ported.family}, expected a {row.family}')
    for key, value in row.network.items():
        found = ported.settings.get(key, value)
        if (list(found) if isinstance(found, tuple) else found) != (list(value) if isinstance(value, tuple) else value):
            raise UsageError(f'{path} is not {name}: its {key} is {found}, expected {value}')


def _check_settings(family: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings that a network of this family does not have, and what is no backbone (a tokenizer's file)."""
    if family not in FAMILIES:
        raise unknown('family of backbones', family, FAMILIES)
    known = settings_of(FAMILIES[family])
    for key, value in settings.items():
        if key not in known and not (key == 'scan' and not value):
            raise UsageError(f'a {family} has no setting {key!r}: it has {", ".join(known)}')


def _fitting(size: int, family: str, values: Mapping[str, Any]) -> int:
    """An image size that was asked for: whole patches, or what the network is run at anyway (So400m/14 at 384)."""
    patch = values.get('patch_size') or FAMILIES[family].patch_size
    if size % patch and size != values.get('image_size'):
        below, above = size - size % patch, size - size % patch + patch
        near = f'{below} or {above}' if below else f'{above}'
        raise UsageError(f'an image size of {size} pixels does not fit patches of {patch} pixels: use {near}')
    return size


def _floating(what: str, dtype: Any) -> Any:
    try:
        found = jnp.dtype(dtype)
        if jnp.issubdtype(found, jnp.floating):
            return found
    except TypeError:
        pass
    raise UsageError(f"{what} must be a floating-point type such as 'bfloat16', got {dtype!r}")


def _random(choice: _Choice) -> Backbone:
    if choice.own_classifier:
        raise UsageError(f'{choice.name!r} is untrained and came with no classifier: give its number of classes=')
    found = _RANDOM.fullmatch(choice.name)
    what, given = (found[1], int(found[2]) if found[2] else None) if found else ('', None)
    if choice.image_size is not None and given is not None and choice.image_size != given:
        raise UsageError(f'{choice.name!r} and image_size={choice.image_size} disagree; give one of them')
    size = choice.image_size or given
    family, values, pixels = _untrained(choice.name, what)
    _check_settings(family, choice.settings)
    values = {**values, **choice.settings}
    if size is not None or 'image_size' not in values:
        values['image_size'] = _fitting(size or 224, family, values)
    model = FAMILIES[family](**values)
    # Drawn as a scan whatever the model is: same weights either way, and depth costs no compile time.
    drawn = model.clone(scan=True) if hasattr(model, 'scan') else model
    params = _draw(drawn)
    params = _canonical(drawn, params) if drawn is not model and not model.scan else params
    params = jax.tree.map(lambda leaf: leaf.astype(choice.param_dtype), params)
    params = jax.device_get(params) if choice.on_host else params
    changed = ','.join(f'{k}={v}' for k, v in sorted(choice.settings.items()) if k not in ('scan', 'dtype'))
    sha256 = f'random:{what}@{model.image_size}:seed{_SEED}' + (f':{changed}' if changed else '')
    return Backbone(choice.name, model, params, sha256, choice.pixels or pixels)


def _untrained(name: str, what: str) -> tuple[str, dict[str, Any], Pixels]:
    """(Family, settings, input) of 'B/16' or of a name of the catalog."""
    if found := _VARIANT.fullmatch(what):
        if found[1] not in VARIANTS:
            raise unknown('ViT variant', found[1], VARIANTS)
        if not int(found[2]):
            raise UsageError(f'{name!r} has patches of 0 pixels')
        return 'vit', {**VARIANTS[found[1]], 'patch_size': int(found[2])}, IMAGENET
    rows = catalog.rows()
    if what in rows:
        return rows[what].family, rows[what].settings, rows[what].pixels
    if what in VARIANTS or not what:
        raise UsageError(f"cannot read {name!r}: random backbones are written 'random:B/16', 'random:Ti/8@64' or "
                         "'random:resnet50_tv'")  # fmt: skip
    raise catalog.unknown_name(what)


def _canonical(model: nn.Module, params: dict) -> dict:
    # By way of numpy, whose slices are views: jax would compile one slice for every block and parameter.
    return jax.tree.map(jnp.asarray, model.canonical(jax.tree.map(np.asarray, params)))


def initial(model: nn.Module) -> dict:
    """A network's initial parameters, from the one seed."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return model.init({'params': jax.random.key(_SEED), 'dropout': jax.random.key(_SEED)}, images)['params']


def _draw(model: nn.Module) -> dict:
    # The program runs once and is all random bits: what XLA's CPU backend spends on optimizing it is not won back.
    quick = {'xla_backend_optimization_level': 1} if jax.default_backend() == 'cpu' else None
    return jax.jit(initial, static_argnums=0, compiler_options=quick)(model)
