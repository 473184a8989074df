"""Where decoded images are kept, so that each is decoded once.

In memory, if they take less than `memory_gb` (by default a quarter of the memory that is free). Larger splits go into
a memory-mapped file, once: in `.vpt_jax/` beside the data or, where that cannot be written, in $VPT_JAX_CACHE (by
default ~/.cache/vpt_jax). Where there is no room for it either, images are decoded each time they are asked for.

A file is found again by what was decoded (files with their sizes and times, or TFDS's shards), the size and the resize
rule; batches are the same whichever way is taken.
"""

import contextlib
import hashlib
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vpt_jax.data.dataset import Reading, Split
from vpt_jax.data.decode import UNREADABLE, Examples, bad_image, decode_all, decoded, in_order
from vpt_jax.data.preprocess import Preprocess

# Part of every key: another number after a change of what decoding gives.
_VERSION = 1
_GB = 10**9


def keep(examples: Examples, preprocess: Preprocess, how: Reading) -> tuple[Split, tuple[str, ...]]:
    """Decodes a split.

    Args:
      examples: what to decode.
      preprocess: its `decode` is applied to each image.
      how: `memory_gb` and `on_bad_image` matter.

    Returns:
      The split, and the names of the images that could not be read.

    Raises:
      UsageError: for an unreadable image, with `on_bad_image='stop'`; of a split that is decoded when asked for, when
        that image is asked for.
    """
    size = _bytes(examples, preprocess)
    limit = free_memory() / 4 if how.memory_gb is None else how.memory_gb * _GB
    if size <= limit:
        return _in_memory(examples, preprocess, how.on_bad_image)
    folder = _file(examples, preprocess, how.on_bad_image, size)
    if folder is None:
        return _streamed(examples, preprocess, how.on_bad_image)
    with np.load(folder / 'index.npz', allow_pickle=False) as index:
        shapes, labels, kept = index['shapes'], index['labels'], index['kept']
    pixels = np.memmap(folder / 'pixels', np.uint8, 'r')
    images = pixels.reshape(len(kept), *shapes[0], 3) if preprocess.fixed_size else Ragged(pixels, shapes)
    return _split(examples, images, labels, kept)


class Ragged(Sequence):
    """Images of different sizes in one array of bytes.

    Args:
      pixels: uint8 [bytes], one image after the other.
      shapes: int [N, 2], their heights and widths.
    """

    def __init__(self, pixels: np.ndarray, shapes: np.ndarray):
        self._pixels, self._shapes = pixels, shapes
        self._ends = np.cumsum(shapes.astype(np.int64).prod(axis=1) * 3)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, i: int) -> np.ndarray:
        height, width = self._shapes[i]
        end = self._ends[i]
        return self._pixels[end - int(height) * int(width) * 3 : end].reshape(height, width, 3)


class Streamed(Sequence):
    """Images that are decoded each time they are asked for."""

    def __init__(self, examples: Examples, kept: np.ndarray, preprocess: Preprocess):
        self._examples, self._kept, self._preprocess = examples, kept, preprocess

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> np.ndarray:
        i = int(self._kept[i])
        try:
            return self._preprocess.decode(self._examples.read(i)[0])
        except UNREADABLE as error:
            raise bad_image(self._examples.names[i], error) from error


def _in_memory(examples: Examples, preprocess: Preprocess, on_bad_image: str) -> tuple[Split, tuple[str, ...]]:
    open_image, labels = _with_labels(examples)
    images, kept, _ = decode_all(open_image, examples.names, preprocess, on_bad_image)
    return _split(examples, images, labels[kept], kept)


def _with_labels(examples: Examples):
    """A function that opens image i, and the array that it writes the label into: both come from one reading."""
    labels = np.zeros(len(examples), np.int32)

    def open_image(i: int):
        image, labels[i] = examples.read(i)
        return image

    return open_image, labels


def _split(examples: Examples, images, labels: np.ndarray, kept: np.ndarray) -> tuple[Split, tuple[str, ...]]:
    lost = np.setdiff1d(np.arange(len(examples)), kept)
    names = examples.names if not len(lost) else tuple(examples.names[i] for i in kept)
    return Split(images, labels.astype(np.int32), names), tuple(examples.names[i] for i in lost)


def _bytes(examples: Examples, preprocess: Preprocess) -> int:
    # Pictures are seldom wider than 3 : 2.
    side = preprocess.size if preprocess.fixed_size else preprocess.resize_edge
    return int(len(examples) * 3 * side * side * (1 if preprocess.fixed_size else 1.5))


def free_memory() -> int:
    """Bytes of memory that could be had."""
    try:
        lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
        # Unlike sysconf's count of free pages, this counts what the file cache would give back.
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable:'))
    except (OSError, StopIteration, ValueError):  # not Linux
        return 8 * _GB


def _file(examples: Examples, preprocess: Preprocess, on_bad_image: str, size: int) -> pathlib.Path | None:
    """The folder with the decoded split, made if need be; None if there is no room for it."""
    made_of = f'{_VERSION} {preprocess.size} {preprocess.resize} {on_bad_image} {examples.identity}'
    key = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    cache = pathlib.Path(os.environ.get('VPT_JAX_CACHE') or '~/.cache/vpt_jax').expanduser()
    places = [examples.beside / '.vpt_jax' / key, cache / 'decoded' / key]
    for place in places:
        if _complete(place):
            return place
    for place in places:
        if _has_room(place.parent, size):
            shown = f'{len(examples)} images, {size / _GB:.1f} GB'
            print(f'decoding once into {place} ({shown})', file=sys.stderr, flush=True)
            _write(place, examples, preprocess, on_bad_image)
            return place
    return None


def _complete(place: pathlib.Path) -> bool:
    try:
        with np.load(place / 'index.npz', allow_pickle=False) as index:
            total = int(index['shapes'].astype(np.int64).prod(axis=1).sum()) * 3
        return (place / 'pixels').stat().st_size == total
    except (OSError, ValueError, KeyError):
        return False


def _has_room(folder: pathlib.Path, size: int) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1.2 * size
    except OSError:
        return False


def _write(place: pathlib.Path, examples: Examples, preprocess: Preprocess, on_bad_image: str) -> None:
    """Writes into a folder of its own name and renames it: what is there under the final name is complete."""
    draft = place.with_name(f'{place.name}.{secrets.token_hex(4)}')  # processes on several machines may write here
    draft.mkdir()
    try:
        open_image, labels = _with_labels(examples)
        kept, shapes = [], []
        with open(draft / 'pixels', 'wb') as file:
            for i, image in decoded(open_image, examples.names, preprocess, on_bad_image):
                file.write(np.ascontiguousarray(image).data)
                kept.append(i)
                shapes.append(image.shape[:2])
        np.savez(draft / 'index.npz', shapes=np.array(shapes, np.int32).reshape(-1, 2), labels=labels[kept],
                 kept=np.array(kept, np.int64))  # fmt: skip
        if place.exists() and not _complete(place):
            shutil.rmtree(place)
        with contextlib.suppress(OSError):  # another process was faster: its file is as good
            draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _streamed(examples: Examples, preprocess: Preprocess, on_bad_image: str) -> tuple[Split, tuple[str, ...]]:
    if on_bad_image == 'skip':  # which ones are bad has to be known before the first batch
        open_image, labels = _with_labels(examples)
        kept = np.array([i for i, _ in decoded(open_image, examples.names, preprocess, 'skip')], np.int64)
    else:
        kept = np.arange(len(examples))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            labels = np.array(list(in_order(pool, examples.label, kept.tolist())), np.int32)
    return _split(examples, Streamed(examples, kept, preprocess), labels[kept], kept)
