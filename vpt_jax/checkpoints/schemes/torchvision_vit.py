"""ViTs of torchvision.

Files of its early versions number the MLP's layers (`mlp.linear_1`), later ones give them their places in a sequence
(`mlp.0`, `mlp.3`); both are read.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_vit import Names, ViTPlan
from vpt_jax.checkpoints.source import Source

NAME = 'torchvision_vit'
ABOUT = "ViTs of torchvision ('encoder.layers.encoder_layer_0.self_attention.in_proj_weight')"

_NAMES = Names(
    patch='conv_proj', position='encoder.pos_embedding', norm='encoder.ln', block='encoder.layers.encoder_layer_{}.',
    norm1='ln_1', norm2='ln_2', qkv=('self_attention.in_proj_',), out='self_attention.out_proj',
    mlp=(('mlp.0', 'mlp.3'), ('mlp.linear_1', 'mlp.linear_2')), cls='class_token',
)  # fmt: skip


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a ViT's."""
    return {'conv_proj.weight', 'encoder.layers.encoder_layer_0.ln_1.weight'} <= set(names)


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ViT; positions are resampled as timm does it with other PyTorch files."""
    plan = ViTPlan(source, 'a ViT of torchvision', _NAMES, hints)
    plan.norm('Transformer/encoder_norm', _NAMES.norm)
    settings = plan.settings('gelu', 1e-6, 'cubic_antialias')
    return plan.ported('vit', settings, {r'heads\..*': 'task head'})
