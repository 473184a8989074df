"""ResNets with GroupNorm and standardised weights: BiT, big_vision's `bit`, and the stems of Google's hybrid ViTs.

Four spellings of `models.bit.BiT`. The pre-activated form: TensorFlow's names in the public BiT files, some with
numbered modules; big_vision's names in its own (`bit_paper`); timm's. The post-activated form: big_vision's `bit`, and
google-research/vision_transformer's hybrids, which have the same names beside those of a ViT.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vpt_jax.checkpoints.layouts import Layout, conv, reshaped, same
from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

NAME = 'bit'
ABOUT = "BiT ('resnet/root_block/...', 'root_block/conv_root/...', timm) and big_vision's GroupNorm ResNets"

_UNIT = re.compile(r'(?:resnet/)?block(\d+)/unit(\d+)/(.+)')
_TIMM_UNIT = re.compile(r'stages\.(\d+)\.blocks\.(\d+)\.(.+)')
_NUMBERED = re.compile(r'(standardized_conv2d|group_norm)_\d+')
_HEAD = {r'(resnet/)?head/.*|head\.fc\..*': 'task head'}


def _spellings() -> tuple[dict[str, str], dict[str, str]]:
    """Names outside units and inside them to ours."""
    outside = {
        'resnet/root_block/standardized_conv2d/kernel': 'conv_root/kernel',
        'root_block/conv_root/kernel': 'conv_root/kernel',
        'conv_root/kernel': 'conv_root/kernel',
        'stem.conv.weight': 'conv_root/kernel',
    }
    inside = {
        'a/proj/standardized_conv2d/kernel': 'conv_proj/kernel',
        'conv_proj/kernel': 'conv_proj/kernel',
        'downsample.conv.weight': 'conv_proj/kernel',
    }
    for tensorflow, torch, leaf in (('gamma', 'weight', 'scale'), ('beta', 'bias', 'bias')):
        outside[f'gn_root/{leaf}'] = f'gn_root/{leaf}'
        for name in (f'resnet/group_norm/{tensorflow}', f'norm-pre-head/{leaf}', f'norm.{torch}'):
            outside[name] = f'norm_pre_head/{leaf}'
        inside[f'gn_proj/{leaf}'] = f'gn_proj/{leaf}'
        for i, branch in enumerate('abc', 1):
            for name in (f'{branch}/group_norm/{tensorflow}', f'gn{i}/{leaf}', f'norm{i}.{torch}'):
                inside[name] = f'gn{i}/{leaf}'
    for i, branch in enumerate('abc', 1):
        for name in (f'{branch}/standardized_conv2d/kernel', f'conv{i}/kernel', f'conv{i}.weight'):
            inside[name] = f'conv{i}/kernel'
    return outside, inside


_OUTSIDE, _INSIDE = _spellings()


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a ResNet's, and not a hybrid ViT's."""
    found = {canonical(name) for name in names}
    return {'conv_root/kernel', 'block1_unit1/conv1/kernel'} <= found and 'embedding/kernel' not in names


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a BiT.

    Around the maps of the max-pooling, the public files and timm's get zeros, as their authors' code pads; big_vision's
    own files get its minus infinity.
    """
    plan = Plan(source, 'a BiT')
    found: dict[str, str] = {}
    for name, member in source.members.items():
        ours = canonical(name)
        if ours in found:
            raise UsageError(f'{source.path} holds both {found[ours]!r} and {name!r}, which mean the same weights')
        if ours:
            found[ours] = name
            plan.add(ours, name, len(member.shape), layout(name))
    root = found.get('conv_root/kernel')
    if root is None:
        raise UsageError(f'{source.path} is not a BiT that vpt_jax knows: it has no convolution before the blocks')
    preact = 'norm_pre_head/scale' in found
    settings = {'depths': depths(found), 'width': width(root, plan.shape(root, 4)), 'preact': preact}
    if preact:
        settings['pool_padding'] = 'inf' if root.startswith('root_block/') else 'zero'
    return dataclasses.replace(plan.ported('bit', settings, _HEAD), pixels='half')


def canonical(name: str) -> str | None:
    """`BiT`'s name for a name of any spelling; None for what is none of its weights."""
    name = _NUMBERED.sub(r'\1', name)
    for pattern, first in ((_UNIT, 1), (_TIMM_UNIT, 0)):
        if found := pattern.fullmatch(name):
            block, unit = (int(n) + 1 - first for n in found.groups()[:2])
            part = _INSIDE.get(found[3])
            return part and f'block{block}_unit{unit}/{part}'
    return _OUTSIDE.get(name)


def layout(name: str) -> Layout:
    """How an array of that name becomes ours; old files store the vectors of norms as (1, 1, 1, C)."""
    if not (canonical(name) or '').endswith('/kernel'):
        return reshaped(-1)
    return conv if name.endswith('.weight') else same


def width(name: str, shape: tuple[int, ...]) -> int:
    """Channels that the root convolution of that name gives."""
    return shape[0] if name.endswith('.weight') else shape[3]


def depths(names: Collection[str]) -> tuple[int, ...]:
    """Number of units of every stage, from canonical names."""
    units = {tuple(map(int, found.groups())) for n in names if (found := re.match(r'block(\d+)_unit(\d+)/', n))}
    stages = range(1, max((stage for stage, _ in units), default=0) + 1)
    return tuple(max((unit for s, unit in units if s == stage), default=0) for stage in stages)


def reduction(depths: Sequence[int]) -> int:
    """Pixels of the image's side that make one of the map behind stages of these depths, the root included."""
    return 4 * 2 ** max(len(depths) - 1, 0)
