"""The checkpoint directories of big_vision's trainers: one zarr array per weight, `~` for `/` in its folder's name.

`NAME.bv-000000003` is such a directory; `NAME.bv-LAST` is a text file with the suffix of the last complete one, so that
`NAME.bv` means that one.
"""

import itertools
import math
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

from vpt_jax.checkpoints.source import Member, Source, json_object
from vpt_jax.errors import UsageError

_HEADER = '.zarray'
_LAST = '-LAST'
#: numpy's limit on axes, and more entries than any array of a checkpoint has.
_AXES, _SIZE = 64, 1 << 40


class TensorstoreSource(Source):
    """A directory with one zarr array per weight.

    Args:
      path: the directory.

    Raises:
      UsageError: the directory is incomplete or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        folder = Path(path)
        self._folders: dict[str, str] = {}
        members, files = {}, []
        try:
            for part in sorted(folder.iterdir()):
                if part.is_dir():
                    name = part.name.replace('~', '/')
                    self._folders[name] = part.name
                    members[name] = _member(part, name, sorted(part.iterdir()))
                    files += sorted(part.iterdir())
        except OSError as error:
            raise UsageError(f'cannot read {folder}: {error.strerror or error}') from error
        super().__init__(folder, members, files=files)

    def _array(self, member: Member) -> np.ndarray:
        folder = Path(self.path).resolve() / self._folders[member.name]  # the driver takes no ".."
        spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{folder}/'}}
        try:
            array = np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())
        except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
            raise _damaged(folder, 'its numbers cannot be read') from error
        if (array.shape, array.dtype) != (member.shape, member.dtype):
            raise _damaged(folder, f'it holds {array.dtype} {list(array.shape)}')
        return array


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds zarr arrays."""
    try:
        return any((part / _HEADER).is_file() for part in folder.iterdir())
    except OSError:
        return False


def last(path: Path) -> Path | None:
    """The directory that `NAME.bv` or its pointer `NAME.bv-LAST` means; None if `path` is neither.

    Raises:
      UsageError: the pointer says what cannot be, or the directory is not there.
    """
    pointer = path if path.name.endswith(_LAST) else path.with_name(path.name + _LAST)
    if not pointer.is_file():
        return None
    try:
        suffix = pointer.read_bytes()[:64].decode('ascii', 'replace').strip()
    except OSError as error:
        raise UsageError(f'cannot read {pointer}: {error.strerror or error}') from error
    if not re.fullmatch(r'\w+', suffix):
        raise UsageError(f'{pointer} should hold the suffix of a checkpoint, such as 000000003, not {suffix!r}')
    folder = pointer.with_name(f'{pointer.name.removesuffix(_LAST)}-{suffix}')
    if not folder.is_dir():
        raise UsageError(f'{pointer} says that the last checkpoint is {folder.name}, which is not there')
    return folder


def _member(folder: Path, name: str, files: list[Path]) -> Member:
    """Shape and type of an array, whose chunks must all be there: missing ones would be read as zeros."""
    header = folder / _HEADER
    if header not in files:
        raise _damaged(folder, f'it has no {_HEADER}')
    note = json_object(header.read_bytes(), header)
    shape, chunks = _sizes(note, 'shape'), _sizes(note, 'chunks')
    if shape is None or chunks is None or len(shape) != len(chunks) or 0 in chunks:
        raise _damaged(folder, f'{_HEADER} has no sensible shape')
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    held = {file.name for file in files} - {_HEADER}
    if math.prod(counts) != len(held):
        raise _damaged(folder, f'{math.prod(counts)} pieces should be in it, and {len(held)} are')
    wanted = ('.'.join(map(str, at)) or '0' for at in itertools.product(*map(range, counts)))
    if absent := next((piece for piece in wanted if piece not in held), None):
        raise _damaged(folder, f'its piece {absent} is missing')
    return Member(name, shape, _dtype(folder, note.get('dtype')))


def _sizes(note: dict[str, Any], key: str) -> tuple[int, ...] | None:
    sizes = note.get(key)
    if not isinstance(sizes, list) or len(sizes) > _AXES or not all(type(n) is int and n >= 0 for n in sizes):
        return None
    return tuple(sizes) if math.prod(sizes) <= _SIZE else None


def _dtype(folder: Path, text: Any) -> np.dtype:
    if text == 'bfloat16':
        return np.dtype(ml_dtypes.bfloat16)
    if isinstance(text, str) and re.fullmatch(r'[<>|][fiub]\d', text):
        try:
            return np.dtype(text).newbyteorder('=')
        except TypeError:
            pass
    raise UsageError(f'{folder} holds {text!r}, a type that vpt_jax does not read')


def _damaged(folder: Path, why: str) -> UsageError:
    return UsageError(f'{folder} is damaged: {why}; copy or download it again')
