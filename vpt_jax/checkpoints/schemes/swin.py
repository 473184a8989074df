"""Swin Transformers of Microsoft and of timm (arXiv 2103.14030), read into the names of `models.swin.Swin`.

Both name blocks `layers.S.blocks.J`. Microsoft puts the patch merging at the end of a stage (`layers.S.downsample`),
timm since 0.9 at the start of the next one. One scheme reads both.

Heads and windows come from the relative-position tables [(2w - 1)^2, H]. No name or shape tells the image size except
Microsoft's masks; without them it is taken that the last map is one window, as in every release.

Shapes: w window side, H heads, C channels.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

NAME = 'swin'
ABOUT = "Swin Transformers of Microsoft and timm ('layers.0.blocks.0.attn.relative_position_bias_table')"

_TABLE = 'attn.relative_position_bias_table'
_IGNORED = {
    r'head\.(fc\.)?(weight|bias)': 'task head',
    r'layers\.\d+\.blocks\.\d+\.attn\.relative_position_index': 'buffer, recomputed',
    r'layers\.\d+\.blocks\.\d+\.attn_mask': 'buffer, recomputed',
}


def claims(names: Collection[str]) -> bool:
    """Whether the names are a Swin's."""
    return f'layers.0.blocks.0.{_TABLE}' in names


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a Swin."""
    plan = Plan(source, 'a Swin Transformer')
    width, _, patch, other = plan.shape('patch_embed.proj.weight', 4)
    if patch != other:
        raise UsageError(f'{source.path} has patches of {patch}x{other} pixels; vpt_jax knows square ones')
    plan.conv('embedding', 'patch_embed.proj')
    plan.norm('embedding_norm', 'patch_embed.norm')
    depths, heads, windows = _stages(plan)
    timm = not any(name.startswith('layers.0.downsample.') for name in source.members)
    index = 0
    for stage, depth in enumerate(depths):
        if stage:
            name = f'layers.{stage if timm else stage - 1}.downsample'
            plan.norm(f'merging_{stage}/LayerNorm_0', f'{name}.norm')
            plan.linear(f'merging_{stage}/reduction', f'{name}.reduction', bias=False)
        for j in range(depth):
            _block(plan, f'block_{index}', f'layers.{stage}.blocks.{j}', heads[stage])
            index += 1
    plan.norm('norm', 'norm')
    settings = {
        'embed_dim': width,
        'depths': depths,
        'heads': heads,
        'windows': windows,
        'patch_size': patch,
        'mlp_ratio': plan.shape('layers.0.blocks.0.mlp.fc1.weight', 2)[0] / width,
        'image_size': _first_side(plan, windows) * patch,
        'pad_windows': timm,
        'activation': 'gelu',
        'ln_eps': 1e-5,
    }
    return plan.ported('swin', settings, _IGNORED)


def _block(plan: Plan, canonical: str, name: str, heads: int) -> None:
    plan.norm(f'{canonical}/LayerNorm_0', f'{name}.norm1')
    plan.attention(f'{canonical}/MultiHeadDotProductAttention_0', f'{name}.attn', heads)
    plan.add(f'{canonical}/relative_bias', f'{name}.{_TABLE}', 2)
    plan.norm(f'{canonical}/LayerNorm_1', f'{name}.norm2')
    plan.linear(f'{canonical}/MlpBlock_0/Dense_0', f'{name}.mlp.fc1')
    plan.linear(f'{canonical}/MlpBlock_0/Dense_1', f'{name}.mlp.fc2')


def _stages(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Depths, heads and windows of the stages."""
    counts: dict[int, int] = {}
    for name in plan.source.members:
        if found := re.match(r'layers\.(\d+)\.blocks\.(\d+)\.', name):
            stage, j = int(found[1]), int(found[2])
            counts[stage] = max(counts.get(stage, 0), j + 1)
    heads, windows = [], []
    for stage in range(max(counts, default=0) + 1):
        name = f'layers.{stage}.blocks.0.{_TABLE}'
        count, h = plan.shape(name, 2)
        side = math.isqrt(count)
        if side * side != count or side % 2 == 0 or not h:
            raise UsageError(f'{plan.source.path}: {name!r} has shape {[count, h]}, which is no square window')
        heads.append(h)
        windows.append((side + 1) // 2)
    return tuple(counts[stage] for stage in sorted(counts)), tuple(heads), tuple(windows)


def _first_side(plan: Plan, windows: tuple[int, ...]) -> int:
    """Side of the first stage's map: from a mask [maps' windows, w * w, w * w] of any stage, else a guess."""
    for stage, window in enumerate(windows):
        name = f'layers.{stage}.blocks.1.attn_mask'
        if name in plan:
            return math.isqrt(plan.shape(name, 3)[0]) * window * 2**stage
    return windows[-1] * 2 ** (len(windows) - 1)
