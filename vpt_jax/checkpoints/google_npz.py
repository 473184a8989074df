"""Google's Vision Transformer `.npz` files: reading every naming scheme they come in, and writing one.

Three schemes hold the same network under different names, and all are read into the names of `models.vit.ViT`:

- Google public (google-research/vision_transformer: ImageNet-21k, AugReg, SAM): per block `LayerNorm_0`,
  `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`; `Transformer/posembed_input/pos_embedding`.
- big_vision (google-research/big_vision): the canonical names, and two older spellings that its loader repairs.
- big_vision with scanned blocks: one `Transformer/encoderblock` with a leading axis of L.

The parameters may sit under `params/` (optax), `opt/target/` (flax.optim) or nothing; bfloat16 is stored as raw
two-byte values. A CLS entry of the position embedding stays where the file has it (`ViT.posemb_prefix`): adding it to
`cls` would give the same features, but not the same full fine-tuning.

Shapes: D width, H heads, k = D / H, F MLP width, P patch side, G grid side, L blocks.
"""

import contextlib
import dataclasses
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown

#: Layers after the features; read only on request.
READOUT = ('pre_logits', 'head')

STORAGE = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}

_CONTAINERS = ('params/', 'opt/target/')
_BLOCK_NAMES = {'MultiHeadDotProductAttention_1': 'MultiHeadDotProductAttention_0', 'LayerNorm_2': 'LayerNorm_1',
                'MlpBlock_3': 'MlpBlock_0'}  # fmt: skip
_POSEMB_NAMES = ('Transformer/posembed_input/pos_embedding', 'Transformer/pos_embedding')
_MAP_HEAD = ('probe', 'LayerNorm_0', 'MultiHeadDotProductAttention_0', 'MlpBlock_0')
_BLOCK = re.compile(r'(Transformer/encoderblock(?:_\d+)?)/([^/]+)/(.+)')
_VIT = re.compile(
    r'(embedding|pre_norm|fc_norm|pre_logits|head|MAPHead_0|Transformer/encoder_norm|Transformer/encoderblock(_\d+)?)/.+'
    r'|cls|dist|registers|pos_embedding'
)
_STACKED = 'Transformer/encoderblock/'
_QUERY = 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel'
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError)


@dataclasses.dataclass(frozen=True)
class Member:
    """One array of a file.

    Attributes:
      name: its name in the file, without `.npy`.
      shape, dtype: as stored, bfloat16 recognised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds, told from its headers alone.

    Attributes:
      members: canonical name to `Member`; scanned blocks are still one entry with a leading axis.
      ignored: names in the file that are not read: optimizer state, and the readout layers that nobody asked for.
    """

    members: dict[str, Member]
    ignored: tuple[str, ...]


def read(path: str | os.PathLike, keep: Sequence[str] = ()) -> dict:
    """Reads a ViT into the parameter tree of `models.vit.ViT` with unrolled blocks.

    Only the members that are needed are read, once, without unpickling anything; scanned blocks become views.

    Args:
      path: the `.npz` file.
      keep: which of `READOUT` to read too.

    Returns:
      Nested dict of numpy arrays in the stored types; `pos_embedding` [1, prefix + G * G, D] is at the top level.

    Raises:
      UsageError: no such file; not an `.npz` file, a damaged one, or one with Python objects; another architecture;
        weights that are not finite.
    """
    flat: dict[str, np.ndarray] = {}
    with _opened(path) as archive:
        for name, member in _contents(archive, path, keep).members.items():
            array = _array(archive, path, member)
            if not name.startswith(_STACKED):
                flat[name] = array
                continue
            for i, part in enumerate(array):
                flat[f'Transformer/encoderblock_{i}/{name.removeprefix(_STACKED)}'] = part
    return traverse_util.unflatten_dict(dict(sorted(flat.items(), key=lambda item: natural(item[0]))), sep='/')


def contents(path: str | os.PathLike, keep: Sequence[str] = ()) -> Contents:
    """What `read` would read and what it would ignore; arguments and errors as there, but no weights are loaded."""
    with _opened(path) as archive:
        return _contents(archive, path, keep)


def settings(tree: Mapping, source: str = 'the tree') -> dict[str, Any]:
    """The settings of `ViT` that shapes and names tell.

    They do not tell the activation, the epsilon, the resampling rule or the pixels' scale. `pool` is the usual one for
    the tokens there are: 'map' with a MAP head, else 'tok' with a CLS token, else 'gap'. `posemb` is 'none' without a
    `pos_embedding`, and then `image_size` is left out: such a file may be made for 'sincos2d' (big_vision's
    vit_s16_i1k).

    Args:
      tree: what `read` returned, or shapes of it.
      source: what to call it in messages.

    Returns:
      Keyword arguments for `ViT`.

    Raises:
      UsageError: the tree is not a ViT with square patches and a square grid.
    """
    flat = traverse_util.flatten_dict(dict(tree), sep='/')
    hidden = 'Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel'
    for name, rank in (('embedding/kernel', 4), (_QUERY, 3), (hidden, 2)):
        if name not in flat or len(flat[name].shape) != rank:
            raise UsageError(f'{source} is not a ViT that vpt_jax knows: it has no {name!r} with {rank} axes')
    rows, columns, _, width = flat['embedding/kernel'].shape
    if rows != columns:
        raise UsageError(f'{source} has patches of {rows}x{columns} pixels; vpt_jax knows square ones')
    blocks = {int(found[1]) for name in flat if (found := re.match(r'Transformer/encoderblock_(\d+)/', name))}
    found = {
        'width': width,
        'depth': max(blocks) + 1,
        'mlp_dim': flat[hidden].shape[1],
        'heads': flat[_QUERY].shape[1],
        'patch_size': rows,
        'pool': 'map' if 'MAPHead_0' in tree else 'tok' if 'cls' in tree else 'gap',
        'posemb': 'learn' if 'pos_embedding' in tree else 'none',
        'cls_token': 'cls' in tree,
        'dist_token': 'dist' in tree,
        'registers': tree['registers'].shape[1] if 'registers' in tree else 0,
        'patch_bias': 'embedding/bias' in flat,
        'pre_norm': 'pre_norm' in tree,
        'final_norm': 'Transformer/encoder_norm/scale' in flat,
        'fc_norm': 'fc_norm' in tree,
        'layer_scale': 'Transformer/encoderblock_0/layer_scale_1' in flat,
        'pre_logits': flat['pre_logits/kernel'].shape[1] if 'pre_logits/kernel' in flat else 0,
    }
    if found['posemb'] == 'learn':
        count = tree['pos_embedding'].shape[1]
        # Two positive squares never differ by 1 or 2, so the prefix is certain.
        prefixes = [p for p in range(1 + found['cls_token'] + found['dist_token']) if _side(count - p)]
        if not prefixes:
            raise UsageError(f'{source} has {count} position embeddings, which is no square grid of patches')
        found |= {'posemb_prefix': prefixes[0], 'image_size': _side(count - prefixes[0]) * rows}
    return found


def write(path: str | os.PathLike, params: Mapping, dtype: str | None = None) -> None:
    """Writes a parameter tree so that `read` gives it back: canonical names, blocks one by one, atomically.

    The same parameters always give the same bytes.

    Args:
      path: the file to write; missing folders are made.
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
        # numpy has no bfloat16 of its own; raw bytes are the form that Google's files use.
        array = array.view('V2') if array.dtype == ml_dtypes.bfloat16 else array
        if name.startswith(_STACKED):
            inside = name.removeprefix(_STACKED)
            flat |= {f'Transformer/encoderblock_{i}/{inside}': part for i, part in enumerate(array)}
        else:
            flat[name] = array
    with atomic.replacing(path) as file:
        np.savez(file, **dict(sorted(flat.items(), key=lambda item: natural(item[0]))))


def _side(count: int) -> int:
    """Side of a square grid of `count` patches, 0 if there is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def natural(name: str) -> list:
    """Sort key that puts `encoderblock_2` before `encoderblock_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """The file as a zip archive of `.npy` members."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f'{path} is a folder; give the .npz file itself')
    if not path.exists():
        raise UsageError(f'there is no file {path} (looked for {path.absolute()})')
    try:
        with open(path, 'rb') as file:
            start = file.read(4)
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        if not start:
            raise UsageError(f'{path} is empty; copy or download it again') from error
        if start.startswith(b'PK'):
            raise UsageError(f'{path} is cut short or damaged; copy or download it again') from error
        raise UsageError(f'{path} is not an .npz file, whatever its name says; give a ViT in .npz form') from error
    except OSError as error:
        raise UsageError(f'cannot read {path}: {error.strerror or error}') from error
    with archive:
        yield archive


def _contents(archive: zipfile.ZipFile, path: str | os.PathLike, keep: Sequence[str]) -> Contents:
    for name in keep:
        if name not in READOUT:
            raise unknown('readout layer to keep', name, READOUT)
    stored = archive.namelist()
    foreign = [name for name in stored if not name.endswith('.npy')]
    if any(name.endswith('data.pkl') for name in foreign):
        raise UsageError(f'{path} is a PyTorch pickle, which vpt_jax never unpickles; convert it to .npz first')
    if foreign or not stored:
        held = repr(foreign[0]) if foreign else 'nothing'
        raise UsageError(f'{path} is a zip archive but not an .npz file: it holds {held}')
    stored = [name.removesuffix('.npy') for name in stored]
    container = next((c for c in _CONTAINERS if any(name.startswith(c) for name in stored)), '')
    members: dict[str, Member] = {}
    ignored = []
    inlined_map_head = f'{container}probe' in stored
    for name in stored:
        inside = name.removeprefix(container)
        if not name.startswith(container) or (inside.split('/')[0] in READOUT and inside.split('/')[0] not in keep):
            ignored.append(name)
            continue
        canonical = _canonical(inside, inlined_map_head)
        if canonical in members:
            raise UsageError(f'{path} holds both {members[canonical].name!r} and {name!r}, which mean the same weights')
        members[canonical] = _header(archive, path, name)
    _check_architecture(path, members)
    return Contents(members, tuple(ignored))


def _canonical(name: str, inlined_map_head: bool) -> str:
    """`ViT`'s name for a name of any scheme, container stripped."""
    if name in _POSEMB_NAMES:
        return 'pos_embedding'
    if inlined_map_head and name.split('/')[0] in _MAP_HEAD:
        return f'MAPHead_0/{name}'
    if found := _BLOCK.fullmatch(name):
        block, part, rest = found.groups()
        return f'{block}/{_BLOCK_NAMES.get(part, part)}/{rest}'
    return name


def _check_architecture(path: str | os.PathLike, members: dict[str, Member]) -> None:
    tops = {name.split('/')[0] for name in members}
    if tops & {'img', 'txt', 'llm'}:
        towers = ', '.join(sorted(tops & {'img', 'txt', 'llm'}))
        raise UsageError(f'{path} holds several towers ({towers}), which vpt_jax cannot read yet; give a plain ViT')
    query = _QUERY if _QUERY in members else _QUERY.replace('encoderblock_0', 'encoderblock')
    missing = [name for name in ('embedding/kernel', query) if name not in members]
    unexpected = sorted((name for name in members if not _VIT.fullmatch(name)), key=natural)
    if missing or unexpected:
        facts = [f'it has no {missing[0]!r}'] if missing else []
        facts += [f'it holds {unexpected[0]!r} and {len(unexpected)} such names in all'] if unexpected else []
        raise UsageError(f"{path} is not a plain ViT of Google's or big_vision's: {', and '.join(facts)}")
    if len(members['embedding/kernel'].shape) == 2:
        raise UsageError(f'{path} is a NaFlex ViT (patches as a dense layer), which vpt_jax cannot read yet')
    pos = members.get('pos_embedding')
    if pos is not None and (len(pos.shape) != 3 or pos.shape[0] != 1):
        raise UsageError(f'{path}: {pos.name!r} has shape {list(pos.shape)}, expected [1, entries, width]')
    depths = {m.shape[:1]: m.name for name, m in members.items() if name.startswith(_STACKED)}
    if len(depths) > 1:
        raise UsageError(f'{path} stacks different numbers of blocks in {" and ".join(map(repr, depths.values()))}')
    if depths and any(name.startswith('Transformer/encoderblock_') for name in members):
        raise UsageError(f'{path} holds blocks both stacked (Transformer/encoderblock) and one by one')


def _header(archive: zipfile.ZipFile, path: str | os.PathLike, name: str) -> Member:
    """Shape and type of a member, without its data."""
    try:
        with archive.open(f'{name}.npy') as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
    except _UNREADABLE as error:
        raise _damaged(path, name) from error
    if dtype.hasobject:
        raise UsageError(f'{path}: {name!r} holds Python objects, which vpt_jax never unpickles; save plain arrays')
    if dtype == np.dtype('V2'):
        dtype = np.dtype(ml_dtypes.bfloat16)
    elif dtype.kind != 'f':
        raise UsageError(f'{path}: {name!r} holds {dtype}, not floating-point weights')
    # A header that promises more than the archive holds must not make numpy reserve the memory.
    if math.prod(shape) * dtype.itemsize > archive.getinfo(f'{name}.npy').file_size:
        raise _damaged(path, name)
    return Member(name, tuple(shape), dtype)


def _array(archive: zipfile.ZipFile, path: str | os.PathLike, member: Member) -> np.ndarray:
    """The data of a member, checked to be finite."""
    try:
        with archive.open(f'{member.name}.npy') as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except _UNREADABLE as error:
        raise _damaged(path, member.name) from error
    if array.dtype.kind == 'V':
        array = array.view(ml_dtypes.bfloat16)
    if not np.isfinite(array).all():
        raise UsageError(f'{path}: {member.name!r} holds values that are not finite; these weights are unusable')
    return array


def _damaged(path: str | os.PathLike, name: str) -> UsageError:
    return UsageError(f'{path} is damaged: {name!r} cannot be read; copy or download it again')
