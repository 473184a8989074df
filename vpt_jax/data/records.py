"""TFRecord files without TensorFlow: the serialised records of a sharded set, by number.

A record is 8 bytes of length (little endian), 4 bytes of checksum of the length, the data, and 4 bytes of checksum of
the data. Lengths are checked, which notices a file that is cut short or no TFRecord file; the data are not: their
checksum would take Python longer than decoding the image, which notices damage by itself.
"""

import mmap
import pathlib
import struct
import threading
from collections.abc import Sequence

import numpy as np

from vpt_jax.errors import UsageError


class Records:
    """The records of a split.

    Args:
      paths: its shards, in order.
      lengths: how many records each shard has.
    """

    def __init__(self, paths: Sequence[pathlib.Path], lengths: Sequence[int]):
        self._paths, self._ends = list(paths), np.cumsum(lengths)
        # A shard is opened and scanned when it is first needed: a thousand images are often in the first one.
        self._shards: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> bytes:
        """The i-th record's data; may be called from several threads.

        Raises:
          UsageError: the shard is missing or damaged.
        """
        shard = int(np.searchsorted(self._ends, i, side='right'))
        file, offsets = self._open(shard)
        start, end = offsets[i - (int(self._ends[shard - 1]) if shard else 0)]
        return file[start:end]

    def _open(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        with self._lock:
            if shard not in self._shards:
                path = self._paths[shard]
                count = int(self._ends[shard]) - (int(self._ends[shard - 1]) if shard else 0)
                try:
                    with open(path, 'rb') as file:
                        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise UsageError(f'cannot read the record file {path} ({error}): prepare the set again') from error
                offsets = _scan(content)
                if offsets is None or len(offsets) != count:
                    raise UsageError(
                        f'the record file {path} is damaged or cut short: expected {count} records; prepare the set '
                        'again'
                    )
                self._shards[shard] = content, offsets
            return self._shards[shard]


def _scan(content: mmap.mmap) -> np.ndarray | None:
    """Starts and ends int64 [N, 2] of the records' data; None if the file is no sequence of records."""
    offsets, at = [], 0
    while at < len(content):
        header = content[at : at + 12]
        if len(header) < 12 or masked_crc32c(header[:8]) != struct.unpack('<I', header[8:])[0]:
            return None
        start = at + 12
        end = start + struct.unpack('<Q', header[:8])[0]
        at = end + 4
        offsets.append((start, end))
    return np.array(offsets, np.int64).reshape(-1, 2) if at == len(content) else None


def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        return value

    return tuple(entry(value) for value in range(256))


_CRC32C = _table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord files: CRC-32C, rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
