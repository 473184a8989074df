"""The networks by the names that checkpoints and prompt files call them."""

import dataclasses

import flax.linen as nn

from vpt_jax.models.beit import BEiT
from vpt_jax.models.bit import BiT
from vpt_jax.models.clip_resnet import CLIPResNet
from vpt_jax.models.convnext import ConvNeXt
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT

FAMILIES: dict[str, type[nn.Module]] = {'vit': ViT, 'swin': Swin, 'convnext': ConvNeXt, 'beit': BEiT, 'resnet': ResNet,
                                      'bit': BiT, 'clip_resnet': CLIPResNet}  # fmt: skip


def family_of(model: nn.Module) -> str:
    """The key of `FAMILIES` of a network."""
    return next(name for name, kind in FAMILIES.items() if type(model) is kind)


def settings_of(family: type[nn.Module]) -> tuple[str, ...]:
    """The names of a network's settings."""
    return tuple(f.name for f in dataclasses.fields(family) if f.name not in ('parent', 'name'))
