"""The convolutional image towers of OpenAI's CLIP (arXiv 2103.00020), read into `models.clip_resnet.CLIPResNet`.

Blocks are named as torchvision's, under `visual.`; `visual.attnpool` has the attention pooling.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.layouts import from_heads, into_heads, reshaped
from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_resnet import IGNORED, batch_norm, blocks, conv
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

NAME = 'clip_resnet'
ABOUT = "the ResNet image towers of OpenAI's CLIP ('visual.attnpool.q_proj.weight')"

_POOL = 'visual.attnpool'
_HEAD_WIDTH = 64


def claims(names: Collection[str]) -> bool:
    """Whether the names are a CLIP's with a convolutional image tower."""
    return 'visual.conv1.weight' in names and f'{_POOL}.q_proj.weight' in names


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for the image tower; `hints['heads']` is for widths that are no multiple of 64 a head."""
    plan = Plan(source, "the image tower of OpenAI's CLIP")
    for i in (1, 2, 3):
        conv(plan, f'conv{i}', f'visual.conv{i}')
        batch_norm(plan, f'bn{i}', f'visual.bn{i}')
    settings = blocks(plan, 'visual.')
    del settings['bottleneck'], settings['groups']
    embed, width = plan.shape(f'{_POOL}.c_proj.weight', 2)
    heads = hints.get('heads') or max(width // _HEAD_WIDTH, 1)
    if width % heads:
        raise UsageError(f'{source.path}: the width {width} of {_POOL!r} is not divisible by {heads} heads')
    for ours, theirs in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj')):
        plan.add(f'attnpool/{ours}/kernel', f'{_POOL}.{theirs}.weight', 2, into_heads(heads))
        plan.add(f'attnpool/{ours}/bias', f'{_POOL}.{theirs}.bias', 1, into_heads(heads))
    plan.add('attnpool/out/kernel', f'{_POOL}.c_proj.weight', 2, from_heads(heads))
    plan.add('attnpool/out/bias', f'{_POOL}.c_proj.bias', 1)
    count = plan.shape(f'{_POOL}.positional_embedding', 2)[0]
    side = math.isqrt(count - 1)
    if side * side + 1 != count:
        raise UsageError(f'{source.path} has {count} positions in {_POOL!r}, which is no square grid and the mean')
    plan.add('pos_embedding', f'{_POOL}.positional_embedding', 2, reshaped(1, count, width))
    settings |= {
        'stem_width': plan.shape('visual.conv3.weight', 4)[0],
        'heads': heads,
        'embed_width': embed,
        'image_size': side * 2 ** (len(settings['depths']) + 1),
    }
    ignored = {
        'input_resolution|context_length|vocab_size': 'a setting',
        r'(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection': 'text tower',
        'logit_scale': 'scale of the scores between images and texts',
    }
    ported = plan.ported('clip_resnet', settings, IGNORED | ignored)
    return dataclasses.replace(ported, pixels='clip')
