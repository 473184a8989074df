"""The plan of how a weight file becomes a network of ours."""

import dataclasses
from typing import Any

from vpt_jax.checkpoints.layouts import Layout, same


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of a network and how it comes out of a file.

    Attributes:
      shape: ours.
      names: the members of the file that it is made of, usually one.
      layout: makes the array from them.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    layout: Layout = same


@dataclasses.dataclass(frozen=True)
class Ported:
    """How a file becomes a network of ours; nothing is read yet.

    Attributes:
      family: which network it is, a key of `models.families.FAMILIES`.
      settings: the network's settings, as far as names, shapes and the scheme's conventions tell.
      weights: canonical name ('Transformer/encoder_norm/scale') to `Weight`.
      ignored: name in the file to the reason why it is not read.
      pixels: the scheme's usual input, a key of `models.pixels.PIXELS`.
    """

    family: str
    settings: dict[str, Any]
    weights: dict[str, Weight]
    ignored: dict[str, str]
    pixels: str = 'imagenet'
