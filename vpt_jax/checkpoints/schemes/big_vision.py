"""ViTs of Google's JAX code: google-research/vision_transformer (ImageNet-21k, AugReg, SAM) and big_vision.

Three spellings of the same network, all read into the names of `models.vit.ViT`, which are big_vision's:

- Google public: per block `LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`;
  `Transformer/posembed_input/pos_embedding`.
- big_vision: the canonical names, and older spellings that its own loader repairs.
- big_vision with scanned blocks: one `Transformer/encoderblock` with a leading axis of L.

Hybrids of the first spelling have a ResNet (`conv_root`, `gn_root`, `block1/unit1/...`), which becomes `stem/`.

A CLS entry of the position embedding stays where the file has it (`ViT.posemb_prefix`): adding it to `cls` would give
the same features, but not the same full fine-tuning.

Shapes: D width, H heads, k = D / H, F MLP width, G grid side, L blocks.
"""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from vpt_jax.checkpoints import npz
from vpt_jax.checkpoints.layouts import entry, same
from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.ported import Ported, Weight
from vpt_jax.checkpoints.schemes import bit
from vpt_jax.checkpoints.source import Member, Source
from vpt_jax.errors import UsageError, unknown

NAME = 'big_vision'
ABOUT = "ViTs of google-research/vision_transformer and big_vision ('Transformer/encoderblock_0/...')"

#: What weights may be stored in.
STORAGE = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}

_BLOCK_NAMES = {'MultiHeadDotProductAttention_1': 'MultiHeadDotProductAttention_0', 'LayerNorm_2': 'LayerNorm_1',
                'MlpBlock_3': 'MlpBlock_0'}  # fmt: skip
_POSEMB_NAMES = ('Transformer/posembed_input/pos_embedding', 'Transformer/pos_embedding')
_MAP_HEAD = ('probe', 'LayerNorm_0', 'MultiHeadDotProductAttention_0', 'MlpBlock_0')
_BLOCK = re.compile(r'(Transformer/encoderblock(?:_\d+)?)/([^/]+)/(.+)')
_VIT = re.compile(
    r'(embedding|pre_norm|fc_norm|pre_logits|proj|MAPHead_0|Transformer/encoder_norm|Transformer/encoderblock(_\d+)?)/.+'
    r'|stem/.+|cls|dist|registers|pos_embedding'
)
_STACKED = 'Transformer/encoderblock/'
_QUERY = 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel'
_HIDDEN = 'Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel'
_GATE = _HIDDEN.replace('Dense_0', 'gate')
#: What some networks are without: name, the setting that says so, its value.
_OPTIONAL = (('pos_embedding', 'posemb', 'sincos2d'), ('embedding/bias', 'patch_bias', False))
_READOUT = {'head': 'task head', 'pre_logits': 'layer behind the features; asked for with pre_logits=WIDTH'}


def claims(names: Collection[str]) -> bool:
    """Whether the names are a ViT's of Google's JAX code."""
    return 'embedding/kernel' in names and any(name.startswith('Transformer/encoderblock') for name in names)


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ViT.

    The settings follow the code that wrote such files: tanh GELU, pixels in [-1, 1], positions resampled with aligned
    corners. `pool` is the usual one for the tokens there are: 'map' with a MAP head, else 'tok' with a CLS token, else
    'gap'. A file without `pos_embedding` may be made for fixed positions (big_vision's vit_s16_i1k) or lack what it
    should have: the hint `posemb` tells, and then `image_size` is left out. So does `patch_bias` for its bias.
    """
    members, ignored = _canonical_members(source, hints)
    _check(source.path, members)
    for name, setting, value in _OPTIONAL:
        if name not in members and setting not in hints:
            raise UsageError(f'{source.path} has no {name!r}: give {setting}={value!r} if it is meant to have none')
    weights = {}
    for name, member in members.items():
        if name.startswith(_STACKED):
            inside = name.removeprefix(_STACKED)
            for i in range(member.shape[0]):
                weights[f'Transformer/encoderblock_{i}/{inside}'] = Weight(member.shape[1:], (member.name,), entry(i))
        else:
            weights[name] = _weight(name, member)
    return Ported('vit', settings(weights, source.path), weights, ignored, 'half')


def _weight(name: str, member: Member) -> Weight:
    if name.startswith('stem/') and len(member.shape) == 4 and not name.endswith('/kernel'):
        return Weight(member.shape[3:], (member.name,), bit.layout(member.name))
    return Weight(member.shape, (member.name,), same)


def settings(weights: Mapping[str, Weight], path: str) -> dict[str, Any]:
    """The settings of `ViT` that canonical names and shapes tell, with big_vision's conventions for the rest.

    Args:
      weights: canonical names to anything with a `shape`.
      path: what to call them in messages.

    Raises:
      UsageError: not a ViT with square patches and a square grid.
    """
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, rank in (('embedding/kernel', 4), (_QUERY, 3), (_HIDDEN, 2)):
        if len(shapes.get(name, ())) != rank:
            raise UsageError(f'{path} is not a ViT that vpt_jax knows: it has no {name!r} with {rank} axes')
    rows, columns, _, width = shapes['embedding/kernel']
    if rows != columns:
        raise UsageError(f'{path} has patches of {rows}x{columns} pixels; vpt_jax knows square ones')
    blocks = {int(found[1]) for name in shapes if (found := re.match(r'Transformer/encoderblock_(\d+)/', name))}
    tops = {name.split('/')[0] for name in shapes}
    found = {
        'width': width,
        'depth': max(blocks) + 1,
        'mlp_dim': shapes[_HIDDEN][1],
        'heads': shapes[_QUERY][1],
        'patch_size': rows,
        'pool': 'map' if 'MAPHead_0' in tops else 'tok' if 'cls' in tops else 'gap',
        'posemb': 'learn' if 'pos_embedding' in tops else 'none',
        'cls_token': 'cls' in tops,
        'dist_token': 'dist' in tops,
        'registers': shapes['registers'][1] if 'registers' in tops else 0,
        'patch_bias': 'embedding/bias' in shapes,
        'pre_norm': 'pre_norm' in tops,
        'final_norm': 'Transformer/encoder_norm/scale' in shapes,
        'fc_norm': 'fc_norm' in tops,
        'layer_scale': 'Transformer/encoderblock_0/layer_scale_1' in shapes,
        'pre_logits': shapes['pre_logits/kernel'][1] if 'pre_logits/kernel' in shapes else 0,
        'projection': shapes['proj/kernel'][1] if 'proj/kernel' in shapes else 0,
        'activation': 'swiglu' if _GATE in shapes else 'gelu_tanh',
    }
    if 'stem' in tops:
        names = [name.removeprefix('stem/') for name in shapes]
        found |= {'stem_depths': bit.depths(names), 'stem_width': shapes.get('stem/conv_root/kernel', (0,))[-1]}
        found['patch_size'] = rows * bit.reduction(found['stem_depths'])  # in pixels of the image
    if found['posemb'] == 'learn':
        first = found['cls_token'] + found['dist_token']
        prefixes = (*range(1 + first), first + found['registers'])
        prefix, side = posemb_grid(shapes['pos_embedding'][1], prefixes, path)
        found |= {'posemb_prefix': prefix, 'image_size': side * found['patch_size']}
    return found


def posemb_grid(count: int, prefixes: Iterable[int], path: str) -> tuple[int, int]:
    """How `count` position embeddings split into prefix entries (one of `prefixes`) and a square grid's side."""
    for prefix in prefixes:
        side = math.isqrt(max(count - prefix, 0))
        # Two positive squares never differ by 1 or 2: without entries of registers, the prefix is certain.
        if side and side * side == count - prefix:
            return prefix, side
    raise UsageError(f'{path} has {count} position embeddings, which is no square grid of patches')


def write(path: str | os.PathLike, params: Mapping, dtype: str | None = None) -> None:
    """Writes a ViT's parameters in big_vision's form: canonical names, blocks one by one.

    Args:
      path: the `.npz` file to write.
      params: the parameters of a `ViT`, scanned or not.
      dtype: a name of `STORAGE` to store in; None stores each array as it is.

    Raises:
      UsageError: unknown dtype, or the file cannot be written.
    """
    if dtype is not None and dtype not in STORAGE:
        raise unknown('storage dtype', dtype, STORAGE)
    flat = {}
    for name, leaf in traverse_util.flatten_dict(dict(params), sep='/').items():
        array = np.asarray(leaf)
        array = array if dtype is None else array.astype(STORAGE[dtype], copy=False)
        if name.startswith(_STACKED):
            inside = name.removeprefix(_STACKED)
            flat |= {f'Transformer/encoderblock_{i}/{inside}': part for i, part in enumerate(array)}
        else:
            flat[name] = array
    npz.write(path, flat)


def _canonical_members(source: Source, hints: Mapping[str, Any]) -> tuple[dict[str, Member], dict[str, str]]:
    """Members by `ViT`'s names (stacked blocks still one entry), and what is left out."""
    members: dict[str, Member] = {}
    ignored = {}
    inlined_map_head = 'probe' in source.members
    for name, member in source.members.items():
        top = name.split('/')[0]
        if top in _READOUT and not hints.get(top):
            ignored[name] = _READOUT[top]
            continue
        canonical = _canonical(name, inlined_map_head)
        if canonical.startswith('MAPHead_0/') and hints.get('pool', 'map') != 'map':
            ignored[name] = 'attention pooling; these features are pooled otherwise'
            continue
        if canonical in members:
            held = members[canonical].name
            raise UsageError(f'{source.path} holds both {held!r} and {name!r}, which mean the same weights')
        members[canonical] = Member(name, member.shape, member.dtype)
    return members, ignored


def _canonical(name: str, inlined_map_head: bool) -> str:
    """`ViT`'s name for a name of any spelling."""
    if name in _POSEMB_NAMES:
        return 'pos_embedding'
    if inlined_map_head and name.split('/')[0] in _MAP_HEAD:
        return f'MAPHead_0/{name}'
    if found := _BLOCK.fullmatch(name):
        block, part, rest = found.groups()
        return f'{block}/{_BLOCK_NAMES.get(part, part)}/{rest}'
    if ours := bit.canonical(name):  # a hybrid's ResNet
        return f'stem/{ours}'
    return name


def _check(path: str, members: dict[str, Member]) -> None:
    query = _QUERY if _QUERY in members else _QUERY.replace('encoderblock_0', 'encoderblock')
    missing = [name for name in ('embedding/kernel', query) if name not in members]
    unexpected = sorted((name for name in members if not _VIT.fullmatch(name)), key=natural)
    if missing or unexpected:
        facts = [f'it has no {missing[0]!r}'] if missing else []
        facts += [f'it holds {unexpected[0]!r} and {len(unexpected)} such names in all'] if unexpected else []
        raise UsageError(f"{path} is not a plain ViT of Google's or big_vision's: {', and '.join(facts)}")
    if len(members['embedding/kernel'].shape) == 2:
        raise UsageError(f'{path} is a NaFlex ViT (patches of any aspect as a dense layer), which vpt_jax does not run')
    pos = members.get('pos_embedding')
    if pos is not None and (len(pos.shape) != 3 or pos.shape[0] != 1):
        raise UsageError(f'{path}: {pos.name!r} has shape {list(pos.shape)}, expected [1, entries, width]')
    depths = {m.shape[:1]: m.name for name, m in members.items() if name.startswith(_STACKED)}
    if len(depths) > 1:
        raise UsageError(f'{path} stacks different numbers of blocks in {" and ".join(map(repr, depths.values()))}')
    if depths and any(name.startswith('Transformer/encoderblock_') for name in members):
        raise UsageError(f'{path} holds blocks both stacked (Transformer/encoderblock) and one by one')
