"""numpy `.npz` archives: read lazily and without unpickling, written atomically."""

import math
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vpt_jax.checkpoints import atomic
from vpt_jax.checkpoints.source import ABOUT, Member, Source, json_object, room
from vpt_jax.errors import UsageError

_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError, OverflowError,
    struct.error, MemoryError,
)  # fmt: skip
_PIECE = 1 << 20
_ABOUT_LIMIT = 1 << 20


class NpzSource(Source):
    """An `.npz` file.

    Args:
      path: the file.

    Raises:
      UsageError: no such file; not an `.npz` file, a damaged one, or one with Python objects.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file, self._archive = _archive(Path(path))
        self._places: dict[str, tuple[int, bool]] = {}
        try:
            names = Counter(name.removesuffix('.npy') for name in self._archive.namelist())
            if twice := [name for name, count in names.items() if count > 1]:
                raise UsageError(f'{path} is damaged: it holds {twice[0]!r} twice; copy or download it again')
            members = {name: self._header(name) for name in names}
            about = self._read_about(members.pop(ABOUT, None))
        except BaseException:
            self.close()
            raise
        super().__init__(path, members, about=about, files=[Path(path)])

    def _header(self, name: str) -> Member:
        """Shape and type of a member, without its data."""
        info = self._archive.getinfo(f'{name}.npy')
        try:
            with self._archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, columns_first, dtype = header(file)
                self._places[name] = file.tell(), columns_first
        except _UNREADABLE as error:
            raise _damaged(self.path, name) from error
        if dtype.hasobject:
            raise UsageError(
                f'{self.path}: {name!r} holds Python objects, which vpt_jax never unpickles; save plain arrays'
            )
        if dtype == np.dtype('V2'):
            dtype = np.dtype(ml_dtypes.bfloat16)
        # A header that promises more than the archive holds must not make numpy reserve the memory, and one that
        # promises less would leave the checksum of the rest unlooked at.
        if min(shape, default=0) < 0 or self._places[name][0] + math.prod(shape) * dtype.itemsize != info.file_size:
            raise _damaged(self.path, name)
        return Member(name, tuple(shape), dtype)

    def _array(self, member: Member) -> np.ndarray:
        start, columns_first = self._places[member.name]
        info = self._archive.getinfo(f'{member.name}.npy')
        try:
            array, data = room(member, 'F' if columns_first else 'C')
            if info.compress_type == zipfile.ZIP_STORED:
                self._copy_stored(info, start, data)
            else:
                self._copy(info, start, data)
        except _UNREADABLE as error:
            raise _damaged(self.path, member.name) from error
        return array

    def _copy(self, info: zipfile.ZipInfo, start: int, data: memoryview) -> None:
        with self._archive.open(info) as file:
            file.read(start)
            for at in range(0, len(data), _PIECE):
                piece = data[at : at + _PIECE]
                piece[:] = file.read(len(piece))
            if file.read(1):  # the checksum is looked at where the member ends
                raise EOFError

    def _copy_stored(self, info: zipfile.ZipInfo, start: int, data: memoryview) -> None:
        """The same in half the time: straight from the file into the array."""
        self._file.seek(info.header_offset + 26)
        name, extra = struct.unpack('<2H', self._file.read(4))
        self._file.seek(info.header_offset + 30 + name + extra)
        sum_of_header = zlib.crc32(self._file.read(start))
        if self._file.readinto(data) != len(data) or zlib.crc32(data, sum_of_header) != info.CRC:
            raise EOFError

    def _read_about(self, member: Member | None) -> dict[str, Any]:
        if member is None:
            return {}
        if member.dtype != np.uint8 or math.prod(member.shape) > _ABOUT_LIMIT:
            raise _damaged(self.path, ABOUT)
        return json_object(self._array(member).tobytes(), self.path, repr(ABOUT))

    def close(self) -> None:
        """Closes the archive."""
        self._archive.close()
        self._file.close()


def write(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]], about: bytes = b''
) -> None:
    """Writes arrays by name; the same arrays always give the same bytes, and the file appears whole or not at all.

    Args:
      path: the file to write; missing folders are made.
      arrays: by name, written in natural order of the names; or pairs, written in their own order and one at a time.
        bfloat16 is stored as raw two-byte values, the form that Google's files use.
      about: what the file says of itself (`schemes.canonical`).

    Raises:
      UsageError: the file cannot be written.
    """
    if isinstance(arrays, Mapping):
        arrays = sorted(arrays.items(), key=lambda item: natural(item[0]))
    with atomic.replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:
        if about:
            _write_member(archive, ABOUT, np.frombuffer(about, np.uint8))
        for name, array in arrays:
            _write_member(archive, name, array.view('V2') if array.dtype == ml_dtypes.bfloat16 else array)


def _write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    # As np.savez does it, which wants all arrays at once.
    with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, np.asarray(array, order='C'), allow_pickle=False)


def natural(name: str) -> list[Any]:
    """Sort key that puts `encoderblock_2` before `encoderblock_10`."""
    parts = re.split(r'(\d+)', name)
    # By length and then by digit rather than as a number: names may hold more digits than Python converts.
    numbers = [part.lstrip('0') for part in parts[1::2]]
    parts[1::2] = [(len(number), number) for number in numbers]
    return parts


def _archive(path: Path) -> tuple[BinaryIO, zipfile.ZipFile]:
    """The file, and the same as a zip archive of nothing but arrays."""
    file = None
    try:
        file = open(path, 'rb')  # noqa: SIM115
        archive = zipfile.ZipFile(file)
        stored = archive.namelist()
        foreign = [name for name in stored if not name.endswith('.npy')]
        if foreign or not stored:
            held = repr(foreign[0]) if foreign else 'nothing'
            raise UsageError(f'{path} is a zip archive but not an .npz file: it holds {held}')
    except BaseException as error:
        if file is not None:
            file.close()
        if isinstance(error, OSError):
            raise UsageError(f'cannot read {path}: {error.strerror or error}') from error
        if isinstance(error, _UNREADABLE) and not isinstance(error, UsageError):
            raise UsageError(f'{path} is cut short or damaged; copy or download it again') from error
        raise
    return file, archive


def _damaged(path: str | os.PathLike, name: str) -> UsageError:
    return UsageError(f'{path} is damaged: {name!r} cannot be read; copy or download it again')
