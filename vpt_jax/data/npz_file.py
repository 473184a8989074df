"""Reading other people's .npz files: plain arrays only, never a pickle, no more memory than the file vouches for."""

import math
import pathlib
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy

from vpt_jax.errors import UsageError

# What zipfile and NumPy raise for damaged, encrypted, exotically compressed or absurdly large entries.
_DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, MemoryError)


class NpzFile:
    """An .npz file whose arrays are checked before they are read, and read only when asked for.

    Args:
      path: the file.

    Raises:
      UsageError: if it does not exist, is no .npz file, or is cut short.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path).expanduser()
        if not self.path.is_file():
            what = 'is a folder, not a file' if self.path.is_dir() else 'does not exist'
            raise UsageError(f'array file {path} {what}: give the path of an .npz file')
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UsageError(
                f'array file {path} is no .npz file, or is cut short ({error}): make it with numpy.savez, or fetch '
                'it again'
            ) from error
        self.keys = frozenset(entry.removesuffix('.npy') for entry in entries if entry.endswith('.npy'))

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def __getitem__(self, key: str) -> np.ndarray:
        """The array of that name.

        Raises:
          UsageError: if it is missing, holds Python objects, or its data are damaged or shorter than its header says.
        """
        if key not in self.keys:
            raise UsageError(f'array file {self.path} lacks {key!r}: it holds {", ".join(sorted(self.keys)) or "none"}')
        try:
            self._check_header(key)
            with np.load(self.path, allow_pickle=False) as file:
                return file[key]
        except UsageError:
            raise
        except _DAMAGED as error:
            raise UsageError(f'array {key!r} of {self.path} is damaged ({error}): fetch or make it again') from error

    def _check_header(self, key: str) -> None:
        # np.load allocates what the header claims before it reads: a header of a few bytes could claim terabytes.
        with zipfile.ZipFile(self.path) as archive, archive.open(f'{key}.npy') as file:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read_header(file)
            held = archive.getinfo(f'{key}.npy').file_size - file.tell()
        if dtype.hasobject:
            raise UsageError(
                f'array {key!r} of {self.path} holds Python objects, which vpt_jax never unpickles; save plain arrays'
            )
        if math.prod(shape) * dtype.itemsize != held:
            raise UsageError(
                f'array {key!r} of {self.path} is damaged: its header says {list(shape)} {dtype}, which the '
                f'{held} bytes it holds are not'
            )
