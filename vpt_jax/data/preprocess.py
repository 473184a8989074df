"""From an image file's pixels to the uint8 square that a network is fed, as the published protocols do it.

An image is decoded once (`Preprocess.decode`) and kept as uint8; every epoch then takes a view of it (`train_view`,
`eval_view`), and the subtraction of the mean happens on the device, inside jit (`normalise`). EXIF orientation is not
applied: neither of the published input pipelines applies it.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vpt_jax.errors import UsageError, unknown

Triple = tuple[float, float, float]

#: Mean and standard deviation of ImageNet's channels on the [0, 1] scale: what VPT's VTAB and FGVC runs subtract.
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: Maps [0, 1] to [-1, 1]: what Google's ViT checkpoints were trained with.
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
#: Mean and standard deviation of CLIP's pixels (arXiv 2103.00020).
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
STATISTICS = {'imagenet': IMAGENET, 'half': HALF, 'clip': CLIP}

RESIZES = ('vtab', 'fgvc', 'bicubic', 'bilinear', 'crop_bicubic', 'crop_bilinear')
AUGMENTS = ('none', 'flip', 'fgvc', 'pretrain')
_FILTERS = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The pixels that a benchmark's published numbers were made with; fields as in `Preprocess`."""

    resize: str
    augment: str
    mean: Triple
    std: Triple


#: VPT's VTAB-1k pipeline: legacy resize, nothing else (KMnP/vpt, `src/data/datasets/tf_dataset.py`).
VTAB = Protocol('vtab', 'none', *IMAGENET)
#: VPT's FGVC pipeline: 256, crop 224, flip (KMnP/vpt, `src/data/transforms.py`).
FGVC = Protocol('fgvc', 'fgvc', *IMAGENET)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How images become network inputs; static, hashable, and a JSON dict by `to_dict`.

    Attributes:
      size: side of the network's input in pixels, >= 1.
      resize: `'vtab'`: straight to size x size by `legacy_bilinear`, aspect ratio lost, as VPT's VTAB-1k pipeline does
        (KMnP/vpt, `src/data/datasets/tf_dataset.py`). `'fgvc'`: the smaller edge to `resize_edge`, PIL bilinear; the
        decoded images are ragged and a size x size crop is taken at each view (KMnP/vpt, `src/data/transforms.py`).
        `'bicubic'`, `'bilinear'`: straight to size x size with PIL's antialiased filters, the modern choice.
        `'crop_bicubic'`, `'crop_bilinear'`: the shorter edge to `size` with these, then the centre: CLIP's and SPT's
        (arXiv 2402.02382) transform, and that of PGN's evaluation (arXiv 2210.06466).
      augment: `'none'`; `'flip'`: horizontal flip with probability 0.5; `'fgvc'`: random crop of the resized image and
        flip, only with `resize='fgvc'`; `'pretrain'`: nothing here, `vpt_jax.data.augment.pretrain` on the device.
      mean: what is subtracted from each channel, on the [0, 1] scale.
      std: what each channel is then divided by, > 0.

    Raises:
      UsageError: for a value outside these.
    """

    size: int
    resize: str = 'vtab'
    augment: str = 'none'
    mean: Triple = IMAGENET[0]
    std: Triple = IMAGENET[1]

    def __post_init__(self):
        if not isinstance(self.size, numbers.Integral) or isinstance(self.size, bool) or self.size < 1:
            raise UsageError(f'preprocess size must be a whole number of pixels >= 1, got {self.size!r}')
        if self.resize not in RESIZES:
            raise unknown('resize', self.resize, RESIZES)
        if self.augment not in AUGMENTS:
            raise unknown('augment', self.augment, AUGMENTS)
        if self.augment == 'fgvc' and self.resize != 'fgvc':
            raise UsageError(
                f"augment 'fgvc' crops from an image larger than the input, which resize {self.resize!r} does not "
                "make: use resize 'fgvc', or augment 'flip'"
            )
        # JSON and numpy hand over lists and numpy scalars; tuples of floats keep the object hashable and comparable.
        object.__setattr__(self, 'size', int(self.size))
        object.__setattr__(self, 'mean', _triple('mean', self.mean))
        object.__setattr__(self, 'std', _triple('std', self.std))
        if min(self.std) <= 0:
            raise UsageError(f'preprocess std must be three numbers > 0, got {self.std}')

    @property
    def fixed_size(self) -> bool:
        """Whether every decoded image is size x size, so that a split is one array."""
        return self.resize != 'fgvc'

    @property
    def resize_edge(self) -> int:
        """Smaller edge of an `'fgvc'` image before the crop: size * 256 / 224, cut to a whole number.

        Gives the published 224 -> 256, 384 -> 438 and 448 -> 512.
        """
        return self.size * 256 // 224

    def decode(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """The uint8 form of an image that is kept in memory.

        Args:
          image: uint8 [H, W], [H, W, 1] or [H, W, 3], or a PIL image of any mode (see `to_rgb`).

        Returns:
          uint8 [size, size, 3]; for `resize='fgvc'` [H', W', 3] whose smaller edge is `resize_edge`. With `'vtab'` the
          reference's float32 pixels are rounded to whole grey levels, which costs at most half a level (0.002 of
          [0, 1]); an image that already has the right size is kept as it is by every resize.

        Raises:
          UsageError: for another dtype or shape.
        """
        rgb = to_rgb(image)
        height, width = rgb.shape[:2]
        if self.resize == 'fgvc':
            return _pil_resize(rgb, _shorter_edge(width, height, self.resize_edge), Image.Resampling.BILINEAR)
        if (height, width) == (self.size, self.size):
            return rgb
        if self.resize == 'vtab':
            return np.rint(legacy_bilinear(rgb, self.size)).astype(np.uint8)
        kind, _, name = self.resize.rpartition('_')
        target = _shorter_edge(width, height, self.size) if kind == 'crop' else (self.size, self.size)
        return np.ascontiguousarray(_centre(_pil_resize(rgb, target, _FILTERS[name]), self.size))

    def train_view(self, decoded: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One training view of a decoded image: the host's part of the augmentation.

        Args:
          decoded: uint8 [H, W, 3] from `decode`.
          rng: source of the crop and the flip; untouched by `'none'` and `'pretrain'`.

        Returns:
          uint8 [size, size, 3], possibly a view of `decoded`: do not write to it.
        """
        if self.augment == 'fgvc':
            height, width = decoded.shape[:2]
            top = rng.integers(height - self.size + 1)
            left = rng.integers(width - self.size + 1)
            view = decoded[top : top + self.size, left : left + self.size]
        else:
            view = self.eval_view(decoded)
        if self.augment in ('flip', 'fgvc') and rng.random() < 0.5:
            view = view[:, ::-1]
        return view

    def eval_view(self, decoded: np.ndarray) -> np.ndarray:
        """The one evaluation view of a decoded image: itself, or for `'fgvc'` its centre crop.

        Args:
          decoded: uint8 [H, W, 3] from `decode`.

        Returns:
          uint8 [size, size, 3], possibly a view of `decoded`: do not write to it.
        """
        return _centre(decoded, self.size)

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types from which `from_dict` makes an equal object."""
        return {
            'size': self.size,
            'resize': self.resize,
            'augment': self.augment,
            'mean': list(self.mean),
            'std': list(self.std),
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> 'Preprocess':
        """The object that `to_dict` described; settings left out take their defaults.

        Raises:
          UsageError: for a setting that does not exist, a value that is not allowed, or a missing size.
        """
        if not isinstance(settings, Mapping):
            raise UsageError(f'preprocess settings must be a dict, got {type(settings).__name__}')
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown('preprocess setting', name, known)
        if 'size' not in settings:
            raise UsageError("preprocess settings lack 'size', the side of the network's input in pixels")
        return cls(**settings)


def to_rgb(image: np.ndarray | Image.Image) -> np.ndarray:
    """An image as uint8 [H, W, 3]: grey is repeated, palettes are looked up, transparency is dropped.

    Args:
      image: uint8 [H, W], [H, W, 1] or [H, W, 3], or a PIL image; 16-bit grey is scaled to 8 bits.

    Returns:
      uint8 [H, W, 3], C-contiguous.

    Raises:
      UsageError: for another dtype or shape, or an image without pixels.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith('I'):
            # PIL's own conversion of 16-bit grey clips everything above 255 to white.
            deep = np.clip(np.asarray(image, np.int64), 0, 65535)
            image = ((deep * 255 + 32767) // 65535).astype(np.uint8)
        else:
            image = np.asarray(image.convert('RGB'))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        given = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(f'an image must be uint8 with values 0..255, got {given}')
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise UsageError(f'an image must have the shape [H, W], [H, W, 1] or [H, W, 3], got {list(image.shape)}')
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def legacy_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize, which the VTAB-1k numbers of VPT and its successors were made with.

    Output pixel i reads source coordinate i * in / out: no half-pixel centres, no antialiasing. `jax.image.resize`,
    PIL and TensorFlow 2 give visibly other pixels.

    Args:
      image: [H, W, C], any real dtype.
      size: side of the result, >= 1.

    Returns:
      float32 [size, size, C] on the scale of `image` (0..255 for uint8), not rounded.
    """
    height, width, channels = image.shape
    top, bottom, down = _legacy_taps(height, size)
    left, right, across = _legacy_taps(width, size)
    # Rows of [W * C] numbers: NumPy is slow along an axis of three.
    image = image.reshape(height, width * channels)
    left, right = ((index[:, None] * channels + np.arange(channels)).ravel() for index in (left, right))
    across, down = np.repeat(across, channels), down[:, None]

    def between(start: np.ndarray, end: np.ndarray, weight: np.ndarray) -> np.ndarray:
        end -= start
        end *= weight
        end += start
        return end

    def rows(index: np.ndarray) -> np.ndarray:
        picked = image[index]
        start, end = (np.take(picked, columns, axis=1).astype(np.float32) for columns in (left, right))
        return between(start, end, across)

    return between(rows(top), rows(bottom), down).reshape(size, size, channels)


def normalise(images: jax.Array, mean: Triple, std: Triple) -> jax.Array:
    """Network inputs from pixels; pure, meant to run inside jit.

    Args:
      images: [..., 3], uint8 in 0..255, or floating point already on the [0, 1] scale (after `augment.pretrain`).
      mean: subtracted from each channel, on the [0, 1] scale.
      std: divisor of each channel.

    Returns:
      float32 [..., 3]: (images - mean) / std.
    """
    images = jnp.asarray(images)
    scale = 1.0 if jnp.issubdtype(images.dtype, jnp.floating) else 255.0
    unit = images.astype(jnp.float32) / scale
    return (unit - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def _legacy_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower index, upper index and float32 weight of the upper one, each [target]; all in float32 as the original."""
    coordinate = np.arange(target, dtype=np.float32) * (np.float32(source) / np.float32(target))
    lower = np.floor(coordinate)
    low = np.minimum(lower.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), coordinate - lower


def _shorter_edge(width: int, height: int, edge: int) -> tuple[int, int]:
    """Width and height with the shorter one `edge`; the longer is cut, not rounded, as torchvision's Resize does."""
    return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    """The size x size centre of [H, W, C], H and W >= size."""
    # torchvision's CenterCrop: halves go to the even side, as Python's round does.
    top, left = (round((edge - size) / 2) for edge in image.shape[:2])
    return image[top : top + size, left : left + size]


def _pil_resize(rgb: np.ndarray, width_height: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    if (rgb.shape[1], rgb.shape[0]) == width_height:
        return rgb
    return np.array(Image.fromarray(rgb).resize(width_height, resample))


def _triple(name: str, values: Any) -> Triple:
    try:
        numbers_ = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers_ = ()
    if len(numbers_) != 3 or not all(map(math.isfinite, numbers_)):
        raise UsageError(f'preprocess {name} must be three numbers, one a channel, got {values!r}')
    return numbers_
