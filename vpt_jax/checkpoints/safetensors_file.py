"""Hugging Face's safetensors: one file, or several with an index; read lazily, written atomically.

The library judges a file (offsets, overlaps, sizes); the bytes are then read where its header says, array by array,
because the library maps the whole file into memory and its numpy reader knows bfloat16 only in some versions.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from vpt_jax.checkpoints import atomic
from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.source import ABOUT, Member, Source, config_beside, json_object, room
from vpt_jax.errors import UsageError

#: What safetensors calls numpy's types.
DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16,
    'U8': np.uint8, 'BOOL': np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
#: The types that a safetensors file can hold.
STORABLE = frozenset(_NAMES)


class SafetensorsSource(Source):
    """A `.safetensors` file.

    Args:
      path: the file.

    Raises:
      UsageError: it cannot be read, is damaged, or holds types that vpt_jax has no use for.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework='np') as judged:
                names = set(judged.keys())
            self._file = open(path, 'rb')  # noqa: SIM115
        except safetensors.SafetensorError as error:
            raise UsageError(f'{path} is damaged: {error}; copy or download it again') from error
        except OSError as error:
            raise UsageError(f'cannot read {path}: {error.strerror or error}') from error
        try:
            header, start = self._header(path)
            metadata = header.pop('__metadata__', {})
            self._offsets: dict[str, int] = {}
            members = {name: self._member(path, name, note, start) for name, note in header.items()}
            if members.keys() != names:
                raise UsageError(f'{path} is damaged: its header is ambiguous; copy or download it again')
            about = json_object(metadata[ABOUT], path, repr(ABOUT)) if ABOUT in metadata else {}
        except BaseException:
            self.close()
            raise
        super().__init__(path, members, config_beside(path), about, files=[path])

    def _header(self, path: Path) -> tuple[dict[str, Any], int]:
        """The header, which the library has found to be sound, and where the data start."""
        length = int.from_bytes(self._file.read(8), 'little')
        return json_object(self._file.read(length), path, 'its header'), 8 + length

    def _member(self, path: Path, name: str, note: dict[str, Any], start: int) -> Member:
        if note['dtype'] not in DTYPES:
            raise UsageError(f'{path}: {name!r} holds {note["dtype"]}, a type that vpt_jax does not read')
        self._offsets[name] = start + note['data_offsets'][0]
        return Member(name, tuple(note['shape']), np.dtype(DTYPES[note['dtype']]))

    def _array(self, member: Member) -> np.ndarray:
        array, data = room(member)
        try:
            self._file.seek(self._offsets[member.name])
            count = self._file.readinto(data)
        except OSError as error:
            raise UsageError(f'cannot read {self.path}: {error.strerror or error}') from error
        if count != len(data):
            raise UsageError(f'{self.path} is damaged: {member.name!r} is cut short; copy or download it again')
        return array

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class ShardedSource(Source):
    """Several `.safetensors` files and the `model.safetensors.index.json` that says which has what.

    Args:
      index: the index.

    Raises:
      UsageError: the index is damaged, or a file that it names is missing, damaged, or lacks an array.
    """

    def __init__(self, index: str | os.PathLike):
        index = Path(index)
        places = json_object(_text(index), index).get('weight_map')
        if not isinstance(places, dict) or not places:
            raise UsageError(f"{index} lists no weights: it has no 'weight_map'")
        self._shards: dict[str, SafetensorsSource] = {}
        self._places: dict[str, str] = places
        try:
            members = {name: self._member(index, name, shard) for name, shard in places.items()}
        except BaseException:
            self.close()
            raise
        files = [index, *(index.with_name(shard) for shard in self._shards)]
        super().__init__(index, members, config_beside(index), files=files)

    def _member(self, index: Path, name: str, shard: Any) -> Member:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ('', '.', '..'):
            raise UsageError(f'{index} is damaged: {name!r} should be in {shard!r}, which is no file beside it')
        if shard not in self._shards:
            path = index.with_name(shard)
            if not path.is_file():
                raise UsageError(f'{path} is missing; {index.name} says that {name!r} is in it: download it too')
            self._shards[shard] = SafetensorsSource(path)
        if name not in self._shards[shard].members:
            raise UsageError(f'{index.with_name(shard)} has no {name!r}, which {index.name} says is in it: the files '
                             'belong to different models; download them again')  # fmt: skip
        return self._shards[shard].members[name]

    def _array(self, member: Member) -> np.ndarray:
        return self._shards[self._places[member.name]]._array(member)

    def close(self) -> None:
        """Closes the files."""
        for shard in self._shards.values():
            shard.close()


def write(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[tuple[str, np.ndarray]],
    about: bytes = b'',
) -> None:
    """Writes arrays one at a time; the same arrays give the same bytes, and the file appears whole or not at all.

    Args:
      path: the file to write; missing folders are made.
      shapes: name to (shape, type) of everything that will come.
      arrays: pairs of name and array, in any order.
      about: what the file says of itself (`schemes.canonical`).

    Raises:
      UsageError: the file cannot be written.
    """
    # Wide types first, as the library writes them, so that every array lies on a multiple of its item's size.
    names = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, natural(name)))
    header: dict[str, Any] = {'__metadata__': {'format': 'np', **({ABOUT: about.decode()} if about else {})}}
    end = 0
    for name in names:
        shape, dtype = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {'dtype': _NAMES[dtype], 'shape': list(shape), 'data_offsets': [start, end]}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with atomic.replacing(path) as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.truncate(8 + len(text) + end)
        for name, array in arrays:
            assert (array.shape, array.dtype) == shapes[name], name
            file.seek(8 + len(text) + header[name]['data_offsets'][0])
            if array.size:
                file.write(np.asarray(array, order='C').reshape(-1).view(np.uint8).data)


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f'cannot read {path}: {error.strerror or error}') from error
