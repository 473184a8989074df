"""ConvNeXts of Facebook and of timm (arXiv 2201.03545), read into the names of `models.convnext.ConvNeXt`.

Facebook: `downsample_layers.0` is the stem, `downsample_layers.S` comes before stage S, blocks are `stages.S.J`. timm:
`stem`, `stages.S.downsample`, `stages.S.blocks.J`, and the last norm belongs to the head. One scheme reads both.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.source import Source

NAME = 'convnext'
ABOUT = "ConvNeXts of Facebook ('downsample_layers.0.0.weight') and timm ('stages.0.blocks.0.conv_dw.weight')"

_FACEBOOK = {'stem': 'downsample_layers.0', 'downsample': 'downsample_layers.{}', 'block': 'stages.{}.{}',
             'depthwise': 'dwconv', 'fc1': 'pwconv1', 'fc2': 'pwconv2', 'norm': 'norm'}  # fmt: skip
_TIMM = {'stem': 'stem', 'downsample': 'stages.{}.downsample', 'block': 'stages.{}.blocks.{}',
         'depthwise': 'conv_dw', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2', 'norm': 'head.norm'}  # fmt: skip
_IGNORED = {r'head\.(fc\.)?(weight|bias)': 'task head'}


def claims(names: Collection[str]) -> bool:
    """Whether the names are a ConvNeXt's."""
    return 'stages.0.0.dwconv.weight' in names or 'stages.0.blocks.0.conv_dw.weight' in names


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ConvNeXt."""
    plan = Plan(source, 'a ConvNeXt')
    names = _FACEBOOK if 'stages.0.0.dwconv.weight' in plan else _TIMM
    depths = _depths(plan, names['block'])
    plan.conv('embedding', f'{names["stem"]}.0')
    plan.norm('embedding_norm', f'{names["stem"]}.1')
    dims, index = [], 0
    for stage, depth in enumerate(depths):
        if stage:
            name = names['downsample'].format(stage)
            plan.norm(f'downsample_{stage}/LayerNorm_0', f'{name}.0')
            plan.conv(f'downsample_{stage}/Conv_0', f'{name}.1')
        for j in range(depth):
            block, name = f'block_{index}', names['block'].format(stage, j)
            plan.conv(f'{block}/depthwise', f'{name}.{names["depthwise"]}')
            plan.norm(f'{block}/LayerNorm_0', f'{name}.norm')
            plan.linear(f'{block}/MlpBlock_0/Dense_0', f'{name}.{names["fc1"]}')
            plan.linear(f'{block}/MlpBlock_0/Dense_1', f'{name}.{names["fc2"]}')
            if f'{name}.gamma' in plan:
                plan.add(f'{block}/layer_scale', f'{name}.gamma', 1)
            index += 1
        dims.append(plan.shape(f'{names["block"].format(stage, 0)}.norm.weight', 1)[0])
    plan.norm('norm', names['norm'])
    settings = {
        'depths': depths,
        'dims': tuple(dims),
        'layer_scale': f'{names["block"].format(0, 0)}.gamma' in plan,
        'activation': 'gelu',
        'ln_eps': 1e-6,
    }
    return plan.ported('convnext', settings, _IGNORED)


def _depths(plan: Plan, block: str) -> tuple[int, ...]:
    """Number of blocks of every stage."""
    pattern = re.compile(re.escape(block).replace(r'\{\}', r'(\d+)') + r'\.')
    counts: dict[int, int] = {}
    for name in plan.source.members:
        if found := pattern.match(name):
            stage, j = int(found[1]), int(found[2])
            counts[stage] = max(counts.get(stage, 0), j + 1)
    return tuple(counts.get(stage, 0) for stage in range(max(counts) + 1))
