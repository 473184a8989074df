"""ViTs in timm's names: timm itself, DeiT, MAE, MoCo v3, DINO, and DINOv2 as Facebook publishes it.

All have `blocks.I.attn.qkv` and the like. What differs is told by further names, and for MAE and MoCo v3, whose files
look like any other, by their position embedding, a fixed table:

| what a file has                        | who                     | positions resampled | heads       |
| ---                                    | ---                     | ---                 | ---         |
| MAE's table                            | MAE (arXiv 2111.06377)  | 'cubic'             | width / 64 * |
| MoCo's table, the transposed of MAE's  | MoCo v3 (2104.02057)    | 'cubic_antialias'   | 12          |
| `register_tokens`                      | DINOv2 (2304.07193)     | 'cubic_antialias'   | width / 64 * |
| `mask_token`, no registers, no decoder | DINOv2                  | 'cubic_offset'      | width / 64 * |
| `norm_pre`                             | timm's CLIP             | 'cubic_antialias'   | width / 64 * |
| `attn_pool`                            | timm's SigLIP           | 'cubic_antialias'   | width / 64 * |
| none of these                          | timm, DeiT, DINO        | 'cubic_antialias'   | width / 64 * |

(*) 16 for the widths 1152, 1280, 1408, 1664 and 1792, as in every published network. `heads=`, and
`posemb_rule='cubic_offset'` for DINO, whose files say nothing of themselves, overrule the table.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_vit import Names, ViTPlan
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

NAME = 'timm_vit'
ABOUT = "ViTs of timm, DeiT, MAE, MoCo v3, DINO and DINOv2 ('blocks.0.attn.qkv.weight')"

_NAMES = Names(
    patch='patch_embed.proj', position='pos_embed', norm='norm', block='blocks.{}.', norm1='norm1', norm2='norm2',
    qkv=('attn.qkv.',), out='attn.proj', mlp=(('mlp.fc1', 'mlp.fc2'),), gated=('mlp.w12', 'mlp.w3'),
    scales=(('ls1.gamma', 'ls2.gamma'), ('gamma_1', 'gamma_2')), cls='cls_token', dist='dist_token',
    registers='reg_token', pre_norm='norm_pre',
)  # fmt: skip
_IGNORED = {
    r'head(_dist)?\.(weight|bias)': 'task head',
    r'head\..*': 'projection head of self-supervised training',
    r'mask_token|decoder_.*': 'what masked pretraining predicts with',
    r'pre_logits\..*': 'layer behind the features',
    r'attn_pool\..*': 'attention pooling; these features are pooled otherwise',
    r'norm\.(weight|bias)': 'norm of the tokens, where these features have one after pooling',
    r'fc_norm\.(weight|bias)': 'norm after pooling, where these features have one of the tokens',
}
#: MoCo v3's networks all have as many heads, ViT-S with its width of 384 too.
_MOCO_HEADS = 12


class _Plan(ViTPlan):
    def mlp(self, canonical: str, name: str) -> None:
        """As a ViT's; timm's gated MLPs have plain names and twice the rows."""
        first, last = f'{name}mlp.fc1', f'{name}mlp.fc2'
        packed = f'{first}.weight' in self and f'{last}.weight' in self
        if packed and self.shape(f'{first}.weight', 2)[0] == 2 * self.shape(f'{last}.weight', 2)[1]:
            self.gated(canonical, first, last)
        else:
            super().mlp(canonical, name)


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a ViT's; BEiT's, which are much the same, have tables of relative positions."""
    beit = any('rel_pos_bias' in name or 'relative_position' in name or name.endswith('attn.q_bias') for name in names)
    return 'blocks.0.attn.qkv.weight' in names and any(n.startswith('patch_embed.proj.') for n in names) and not beit


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ViT.

    `fc_norm`, `final_norm` and `pool` among the hints choose the features where a file leaves the choice: with
    `fc_norm` (`models.vit.ViT`) they are the mean of the patches and then that norm.
    """
    if 'patch_embed.proj.0.weight' in source.members:
        raise UsageError(
            f'{source.path} is a MoCo v3 with a convolutional stem, which vpt_jax does not run: use one of its plain '
            'ViT-S or ViT-B files'
        )
    official = 'register_tokens' in source.members
    table = _table_of(source)
    names = dataclasses.replace(_NAMES, registers='register_tokens') if official else _NAMES
    if table == 'moco' and not hints.get('heads'):
        hints = {**hints, 'heads': _MOCO_HEADS}
    plan = _Plan(source, "a ViT in timm's names", names, hints)
    masked = 'mask_token' in plan and not any(name.startswith('decoder_') for name in source.members)
    clip, siglip = 'norm_pre.weight' in plan, 'attn_pool.latent' in plan
    settings = {
        'activation': 'quick_gelu' if clip else 'gelu_tanh' if siglip else 'gelu',
        'ln_eps': 1e-5 if clip else 1e-6,
        'posemb_rule': 'cubic' if table == 'mae' else 'cubic_offset' if masked and not official else 'cubic_antialias',
        **_norms(plan, hints),
    }
    if siglip and hints.get('pool', 'map') == 'map':
        _attention_pool(plan)
    ported = plan.ported('vit', plan.settings(**settings), _IGNORED)
    return dataclasses.replace(ported, pixels='clip' if clip else 'half' if siglip else 'imagenet')


def _norms(plan: _Plan, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Plans the norms of tokens and of features; what the choice between them makes of the settings."""
    pooled = hints.get('fc_norm', 'fc_norm.weight' in plan and 'norm.weight' not in plan)
    if hints.get('final_norm', not pooled):
        plan.norm('Transformer/encoder_norm', 'norm')
    if not pooled:
        return {}
    if pooled == 'new':
        for leaf, value in (('scale', np.ones), ('bias', np.zeros)):
            plan.made(f'fc_norm/{leaf}', value(plan.width, np.float32))
    elif pooled is True and 'fc_norm.weight' not in plan:
        raise UsageError(
            f"{plan.source.path} has no norm for pooled features: give fc_norm='new' for one without training, or "
            "fc_norm='norm' for its norm of the tokens"
        )
    else:
        plan.norm('fc_norm', 'norm' if pooled == 'norm' else 'fc_norm')
    return {'fc_norm': pooled, 'pool': 'gap'}


def _attention_pool(plan: _Plan) -> None:
    head = 'MAPHead_0/MultiHeadDotProductAttention_0'
    plan.tokens('MAPHead_0/probe', 'attn_pool.latent')
    plan.into(f'{head}/query', 'attn_pool.q')
    plan.fused(head, 'attn_pool.kv.', ('key', 'value'))
    plan.out(head, 'attn_pool.proj')
    plan.norm('MAPHead_0/LayerNorm_0', 'attn_pool.norm')
    plan.linear('MAPHead_0/MlpBlock_0/Dense_0', 'attn_pool.mlp.fc1')
    plan.linear('MAPHead_0/MlpBlock_0/Dense_1', 'attn_pool.mlp.fc2')


def sincos(side: int, width: int, first: str) -> np.ndarray:
    """The fixed position table of MAE (`first` = 'column') or MoCo v3 (`first` = 'row'), with zeros for CLS.

    Half of the channels holds sine and cosine of one coordinate, the other half of the other, with frequencies
    10000^(-4 k / width), k = 0 .. width / 4 - 1; patches row by row.

    Returns:
      float64 [1, 1 + side * side, width]; width must be a multiple of 4.
    """
    row, column = (axis.reshape(-1, 1) for axis in np.mgrid[:side, :side])
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    axes = (column, row) if first == 'column' else (row, column)
    table = np.concatenate([f(axis * omega) for axis in axes for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, width)), table])[None]


def _table_of(source: Source) -> str | None:
    """'mae' or 'moco' if the position embedding is their table."""
    member = source.members.get('pos_embed')
    if member is None or len(member.shape) != 3 or member.shape[2] % 4:
        return None
    side = math.isqrt(max(member.shape[1] - 1, 0))
    if side < 2 or side**2 + 1 != member.shape[1]:
        return None
    held = source.read('pos_embed').astype(np.float32)
    for who, first in (('mae', 'column'), ('moco', 'row')):
        if np.allclose(held, sincos(side, member.shape[2], first), atol=1e-2):  # half precision rounds to 1e-3
            return who
    return None
