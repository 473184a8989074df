"""Backbones by name: which weights, how they must be run, and what pixels they expect.

Weights do not tell their conventions, so each entry holds them. Google's ImageNet-21k ViTs appear twice: as the
published numbers of VPT (arXiv 2203.12119) and its successors were made (exact GELU, ImageNet mean and standard
deviation: that is how the PyTorch ports ran them), and under the checkpoints' own conventions (`..._tanh`: tanh GELU,
pixels in [-1, 1]), which is what they were trained with.
"""

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.checkpoints import google_npz
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.loading import match
from vpt_jax.models.transformer import stack_blocks, unstack_blocks
from vpt_jax.models.vit import VARIANTS, ViT

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What a backbone's input must look like.

    Attributes:
      mean, std: subtracted from, and divided into, the channels of images in [0, 1].
      resize: how images get their size, a name that `data.Preprocess` knows: 'vtab', 'bicubic' or 'fgvc'.
    """

    mean: Triple
    std: Triple
    resize: str


#: VPT's pixels: ImageNet's mean and standard deviation.
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 'vtab')
#: Pixels in [-1, 1], as Google's ViTs were trained.
HALF = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 'bicubic')


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table of backbones.

    Attributes:
      file: file name in the cache folder; None for the weights that come with the package.
      url: where to fetch the file; None likewise.
      license: of the weights.
      variant, patch_size: the size the file must have (`vit.VARIANTS`); None to take whatever it has.
      activation: a name of `vit.ACTIVATIONS`.
      pixels: the input's convention.
      note: one line for a table.
    """

    file: str | None
    url: str | None
    license: str
    variant: str | None
    patch_size: int | None
    activation: str
    pixels: Pixels
    note: str


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network, ready to run: `backbone.model.apply({'params': backbone.params}, images)`.

    Attributes:
      name: what `load_backbone` was given (for a path, the file's name).
      model: the network's settings and code.
      params: its parameters, nested dict of float32 arrays.
      sha256: of the weight file; for random weights a string that starts with 'random:' and says how they were drawn.
      pixels: what `images` must look like; their size is `model.image_size`.
    """

    name: str
    model: ViT
    params: dict
    sha256: str
    pixels: Pixels

    @property
    def num_params(self) -> int:
        """Number of parameters, without any task head."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def with_scan(self, scan: bool = True) -> 'Backbone':
        """The same network with its blocks scanned (compiles once whatever the depth) or unrolled."""
        if scan == self.model.scan:
            return self
        params = stack_blocks(self.params) if scan else _unstacked(self.params)
        return dataclasses.replace(self, model=self.model.clone(scan=scan), params=params)

    def describe(self) -> dict[str, Any]:
        """JSON-able {'name', 'sha256', 'settings'} for a prompt file; the settings are those of `ViT`."""
        values = {name: getattr(self.model, name) for name in _SETTINGS}
        values['dtype'] = None if values['dtype'] is None else jnp.dtype(values['dtype']).name
        return {'name': self.name, 'sha256': self.sha256, 'settings': values}


_SETTINGS = tuple(f.name for f in dataclasses.fields(ViT) if f.name not in ('parent', 'name'))
_ASSETS = Path(__file__).parent.parent / 'assets'
_BUCKET = 'https://storage.googleapis.com/vit_models'
_RANDOM = re.compile(r'random:([^/@]+)/(\d+)(?:@(\d+))?')
_OTHER_FORMATS = ('.pth', '.pt', '.bin', '.ckpt', '.pkl', '.safetensors', '.msgpack', '.h5', '.tar')
_SEED = 0

_IN21K = (('B', 16), ('B', 32), ('L', 16), ('L', 32), ('H', 14))
# The recommended ones of google-research/vision_transformer's README.
_AUGREG = {
    ('Ti', 16): 'aug_none-wd_0.03',
    ('S', 16): 'aug_light1-wd_0.03',
    ('S', 32): 'aug_none-wd_0.1',
    ('B', 16): 'aug_medium1-wd_0.1',
    ('B', 32): 'aug_light1-wd_0.1',
    ('L', 16): 'aug_strong1-wd_0.1',
}


def backbones() -> dict[str, Entry]:
    """Every backbone that `load_backbone` knows by name, in a sensible order."""
    table = {
        'tiny_vit64': Entry(
            None, None, 'Apache-2.0', None, None, 'gelu_tanh', HALF, 'small ViT for 64-pixel images, in the package'
        )
    }
    for variant, patch in _IN21K:
        file = f'ViT-{variant}_{patch}.npz'
        row = Entry(file, f'{_BUCKET}/imagenet21k/{file}', 'Apache-2.0', variant, patch, 'gelu', IMAGENET,
                    f'ViT-{variant}/{patch}, ImageNet-21k, as VPT and VAPT run it')  # fmt: skip
        name = f'vit_{variant.lower()}{patch}_in21k'
        table[name] = row
        table[f'{name}_tanh'] = dataclasses.replace(
            row, activation='gelu_tanh', pixels=HALF, note=f'ViT-{variant}/{patch}, ImageNet-21k, as it was trained'
        )
    for (variant, patch), recipe in _AUGREG.items():
        file = f'{variant}_{patch}-i21k-300ep-lr_0.001-{recipe}-do_0.0-sd_0.0.npz'
        table[f'vit_{variant.lower()}{patch}_augreg_in21k'] = Entry(
            file, f'{_BUCKET}/augreg/{file}', 'Apache-2.0', variant, patch, 'gelu_tanh', HALF,
            f'ViT-{variant}/{patch}, AugReg (arXiv 2106.10270), ImageNet-21k')  # fmt: skip
    return table


def load_backbone(
    name: str | os.PathLike = 'tiny_vit64',
    *,
    image_size: int | None = None,
    dtype: Any = None,
    pixels: Pixels | None = None,
    **settings: Any,
) -> Backbone:
    """Loads a frozen backbone.

    Args:
      name: a name of `backbones()`; or a path to a ViT `.npz` file of Google's or big_vision's, which is run with exact
        GELU on ImageNet-normalised pixels as VPT does, unless `activation` and `pixels` say otherwise; or
        `random:<variant>/<patch>[@size]` (`random:B/16`, `random:Ti/8@64`), an UNTRAINED network of a size of
        `vit.VARIANTS` from a fixed seed, for benchmarks and smoke tests.
      image_size: side of the images in pixels; the position embedding is resampled if the weights are for another.
        None: as the weights are (a remainder smaller than a patch is dropped).
      dtype: type to compute in ('bfloat16', ...); parameters are float32 always. None: float32.
      pixels: the input's convention; None: the entry's.
      **settings: any other setting of `ViT`, over what the file's shapes and the entry say (`scan=True`,
        `pool='gap'`, `posemb='sincos2d'`, `pre_logits=768` to keep that layer).

    Returns:
      The backbone.

    Raises:
      UsageError: unknown name or setting, a file that is missing, damaged, or not such a ViT, an image size
        that is not a multiple of the patch.
    """
    name = os.fspath(name)
    for key in settings:
        if key not in _SETTINGS:
            raise unknown('backbone setting', key, _SETTINGS)
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise UsageError(f'image_size must be a whole number of pixels >= 1, got {image_size!r}')
    try:
        settings['dtype'] = None if dtype is None else jnp.dtype(dtype)
        if dtype is not None and not jnp.issubdtype(settings['dtype'], jnp.floating):
            raise TypeError
    except TypeError as error:
        raise UsageError(f"dtype must be a floating-point type such as 'bfloat16', got {dtype!r}") from error
    if name.startswith('random:'):
        return _random(name, image_size, pixels or IMAGENET, settings)
    suffix = Path(name).suffix.lower()
    if suffix in _OTHER_FORMATS:
        raise UsageError(f'cannot load {name}: vpt_jax reads ViT weights from .npz files, not {suffix} files')
    if suffix == '.npz':
        row = Entry(None, None, '', None, None, 'gelu', IMAGENET, '')
        return _from_file(Path(name).expanduser(), Path(name).name, row, image_size, pixels, settings)
    table = backbones()
    if name not in table:
        raise unknown('backbone', name, table)
    row = table[name]
    return _from_file(_locate(name, row), name, row, image_size, pixels, settings)


def cache_folder() -> Path:
    """Where downloaded weights are looked for: $VPT_JAX_CACHE, else ~/.cache/vpt_jax."""
    return Path(os.environ.get('VPT_JAX_CACHE') or Path.home() / '.cache' / 'vpt_jax').expanduser()


def _locate(name: str, row: Entry) -> Path:
    path = cache_folder() / row.file if row.file else _ASSETS / f'{name}.npz'
    if not path.exists():
        if row.url:
            raise UsageError(f'the weights of {name!r} are not on this machine: download {row.url} to {path}')
        raise UsageError(f'the weights of {name!r} should be in the package, but {path} is missing: reinstall vpt_jax')
    return path


def _from_file(
    path: Path, name: str, row: Entry, image_size: int | None, pixels: Pixels | None, settings: dict[str, Any]
) -> Backbone:
    tree = google_npz.read(path, keep=('pre_logits',) if settings.get('pre_logits') else ())
    stored = google_npz.settings(tree, str(path))
    if row.variant is not None:
        for key, value in {**VARIANTS[row.variant], 'patch_size': row.patch_size}.items():
            if stored[key] != value:
                raise UsageError(f'{path} is not {name}: its {key} is {stored[key]}, expected {value}')
    values = {**stored, 'activation': row.activation, **settings}
    if image_size is not None:
        values['image_size'] = _fitting(image_size, values['patch_size'])
    model = ViT(**values)
    model.grid(model.image_size)
    channels = tree['embedding']['kernel'].shape[2]
    template = jax.eval_shape(lambda: unstack_blocks(_init(model.clone(scan=True), channels)))
    params = match(tree, template, str(path), prefix=model.posemb_prefix, rule=model.posemb_rule)
    params = jax.tree.map(jnp.asarray, params)
    params = stack_blocks(params) if model.scan else params
    with open(path, 'rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return Backbone(name, model, params, sha256, pixels or row.pixels)


def _fitting(size: int, patch: int) -> int:
    """An image size that was asked for, which must be whole patches; weights as they are may differ (So400m/14)."""
    if size % patch:
        below, above = size - size % patch, size - size % patch + patch
        near = f'{below} or {above}' if below else f'{above}'
        raise UsageError(f'an image size of {size} pixels does not fit patches of {patch} pixels: use {near}')
    return size


def _random(name: str, image_size: int | None, pixels: Pixels, settings: dict[str, Any]) -> Backbone:
    found = _RANDOM.fullmatch(name)
    if not found:
        raise UsageError(f"cannot read {name!r}: random backbones are written 'random:B/16' or 'random:Ti/8@64'")
    variant, patch, size = found[1], int(found[2]), int(found[3]) if found[3] else None
    if variant not in VARIANTS:
        raise unknown('ViT variant', variant, VARIANTS)
    if not patch:
        raise UsageError(f'{name!r} has patches of 0 pixels')
    if image_size is not None and size is not None and image_size != size:
        raise UsageError(f'{name!r} and image_size={image_size} disagree; give one of them')
    size = _fitting(image_size or size or 224, patch)
    values = {**VARIANTS[variant], 'patch_size': patch, 'image_size': size, **settings}
    model = ViT(**values)
    model.grid(model.image_size)
    # Drawn as a scan whatever the model is: same weights either way, and depth costs no compile time.
    params = _draw(model.clone(scan=True))
    params = params if model.scan else _unstacked(params)
    drawn = ','.join(f'{k}={v}' for k, v in sorted(settings.items()) if k not in ('scan', 'dtype'))
    sha256 = f'random:{variant}/{patch}@{model.image_size}:seed{_SEED}' + (f':{drawn}' if drawn else '')
    return Backbone(name, model, params, sha256, pixels)


def _unstacked(params: dict) -> dict:
    # By way of numpy, whose slices are views: jax would compile one slice for every block and parameter.
    return jax.tree.map(jnp.asarray, unstack_blocks(jax.tree.map(np.asarray, params)))


def _init(model: ViT, channels: int = 3) -> dict:
    """Initial parameters; with `scan` there is one block to trace and compile, however many the model has."""
    images = jnp.zeros((1, model.image_size, model.image_size, channels))
    return model.init({'params': jax.random.key(_SEED), 'dropout': jax.random.key(_SEED)}, images)['params']


_draw = jax.jit(_init, static_argnums=(0, 1))
