"""ResNets and ResNeXts of torchvision and timm, which share their names, read into those of `models.resnet.ResNet`.

Per block `conv1`, `bn1` and so on, `downsample.0` (convolution) and `downsample.1` (BatchNorm); the running statistics
of BatchNorm are weights here. Shapes tell the kind of block, the widths and the groups.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.layouts import conv as torch_conv
from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.source import Source

NAME = 'torch_resnet'
ABOUT = "ResNets and ResNeXts of torchvision and timm ('layer1.0.conv1.weight')"

_STATISTICS = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
#: What no network of this naming reads.
IGNORED = {r'.*\.num_batches_tracked': 'counter of training steps'}


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a ResNet's."""
    return {'conv1.weight', 'bn1.running_mean', 'layer1.0.conv1.weight', 'layer1.0.bn1.running_mean'} <= set(names)


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ResNet."""
    plan = Plan(source, 'a ResNet')
    conv(plan, 'conv1', 'conv1')
    batch_norm(plan, 'bn1', 'bn1')
    settings = {'stem_width': plan.shape('conv1.weight', 4)[0], **blocks(plan)}
    return plan.ported('resnet', settings, IGNORED | {r'fc\..*': 'task head'})


def conv(plan: Plan, canonical: str, name: str) -> None:
    """A convolution without bias."""
    plan.add(f'{canonical}/kernel', f'{name}.weight', 4, torch_conv)


def batch_norm(plan: Plan, canonical: str, name: str) -> None:
    """A BatchNorm with its running statistics."""
    for ours, theirs in _STATISTICS.items():
        plan.add(f'{canonical}/{ours}', f'{name}.{theirs}', 1)


def blocks(plan: Plan, prefix: str = '') -> dict[str, Any]:
    """Plans all residual blocks.

    Args:
      plan: the plan to add to.
      prefix: what comes before 'layer1' in the file.

    Returns:
      The settings of `ResNet` that they tell.
    """
    pattern = re.compile(re.escape(prefix) + r'layer(\d+)\.(\d+)\.')
    places = {(int(found[1]), int(found[2])) for name in plan.source.members if (found := pattern.match(name))}
    stages = range(1, max(stage for stage, _ in places) + 1)
    depths = tuple(1 + max((j for s, j in places if s == stage), default=-1) for stage in stages)
    bottleneck = f'{prefix}layer1.0.conv3.weight' in plan
    for stage, depth in zip(stages, depths, strict=True):
        for j in range(depth):
            ours, theirs = f'layer{stage}_{j}', f'{prefix}layer{stage}.{j}'
            for i in range(1, 4 if bottleneck else 3):
                conv(plan, f'{ours}/conv{i}', f'{theirs}.conv{i}')
                batch_norm(plan, f'{ours}/bn{i}', f'{theirs}.bn{i}')
            if f'{theirs}.downsample.0.weight' in plan:
                conv(plan, f'{ours}/conv_proj', f'{theirs}.downsample.0')
                batch_norm(plan, f'{ours}/bn_proj', f'{theirs}.downsample.1')
    first = [f'{prefix}layer{stage}.0' for stage in stages]
    width, share = plan.shape(f'{first[0]}.conv2.weight', 4)[:2]
    return {
        'depths': depths,
        'inner': tuple(plan.shape(f'{name}.conv1.weight', 4)[0] for name in first),
        'outer': tuple(plan.shape(f'{name}.conv{3 if bottleneck else 2}.weight', 4)[0] for name in first),
        'bottleneck': bottleneck,
        'groups': max(width // max(share, 1), 1) if bottleneck else 1,
    }
