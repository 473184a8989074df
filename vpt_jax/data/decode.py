"""Decoding many images at once, and what happens to those that cannot be read."""

import dataclasses
import hashlib
import os
import pathlib
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from vpt_jax.data.preprocess import Preprocess
from vpt_jax.errors import UsageError

Picture = np.ndarray | Image.Image

#: What PIL's readers raise for files that are damaged, of another format, or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, Image.DecompressionBombError)
# Enough images a task that the pool's bookkeeping does not show; few enough that the cores finish together.
_CHUNK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N labelled images that can be opened one by one, from several threads.

    Attributes:
      names: N names for messages.
      read: example i as (image, label); raises what PIL raises.
      label: its label alone, without decoding the image.
      identity: text that changes whenever images or labels do.
      beside: a folder near the data.
    """

    names: tuple[str, ...]
    read: Callable[[int], tuple[Picture, int]]
    label: Callable[[int], int]
    identity: str
    beside: pathlib.Path

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Sequence[int]) -> 'Examples':
        """Some of the examples, in the order of `index`."""
        index = [int(i) for i in index]
        chosen = hashlib.sha256(repr(index).encode()).hexdigest()
        return Examples(
            tuple(self.names[i] for i in index), lambda i: self.read(index[i]), lambda i: self.label(index[i]),
            f'{self.identity} {chosen}', self.beside,
        )  # fmt: skip


def image_files(paths: Sequence[pathlib.Path], labels: Sequence[int], beside: pathlib.Path) -> Examples:
    """Examples that are one file each.

    Args:
      paths: N files.
      labels: N labels.
      beside: a folder near them.
    """

    def read(i: int) -> tuple[Image.Image, int]:
        with Image.open(paths[i]) as image:
            image.load()
            return image, int(labels[i])

    digest = hashlib.sha256()
    for path, label in zip(paths, labels, strict=True):
        try:
            found = path.stat()
            digest.update(f'{path}\0{found.st_size}\0{found.st_mtime_ns}\0{label}\n'.encode())
        except OSError:  # it will be reported when it is read
            digest.update(f'{path}\0{label}\n'.encode())
    return Examples(tuple(map(str, paths)), read, lambda i: int(labels[i]), digest.hexdigest(), beside)


def decode_all(
    open_image: Callable[[int], Picture],
    names: Sequence[str],
    preprocess: Preprocess,
    on_bad_image: str,
) -> tuple[np.ndarray | list[np.ndarray], np.ndarray, tuple[str, ...]]:
    """Opens and decodes images into memory.

    Args:
      open_image: the i-th image, 0 <= i < N, loaded; called from several threads; raises what PIL raises.
      names: N names for messages.
      preprocess: its `decode` is applied to each image.
      on_bad_image: `'stop'` or `'skip'`.

    Returns:
      The decoded images (uint8 [M, size, size, 3], or a list of M arrays uint8 [H, W, 3] where sizes differ), the M
      ascending indices that could be read, and the names of the others.

    Raises:
      UsageError: for the first unreadable image, with `'stop'`.
    """
    count, size = len(names), preprocess.size
    images = np.empty((count, size, size, 3), np.uint8) if preprocess.fixed_size else [None] * count
    kept = []
    for i, image in decoded(open_image, names, preprocess, on_bad_image):
        images[i] = image
        kept.append(i)
    unreadable = tuple(names[i] for i in np.setdiff1d(np.arange(count), kept))
    kept = np.array(kept, np.int64)
    if unreadable:
        images = images[kept] if preprocess.fixed_size else [images[i] for i in kept]
    return images, kept, unreadable


def decoded(
    open_image: Callable[[int], Picture], names: Sequence[str], preprocess: Preprocess, on_bad_image: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Opens and decodes images in a pool of threads (PIL releases the interpreter while it decodes and resizes).

    Only a few are held at a time, so that a set may be larger than memory.

    Args:
      open_image, names, preprocess, on_bad_image: see `decode_all`.

    Yields:
      (i, uint8 [H, W, 3]) in ascending order, unreadable images left out.

    Raises:
      UsageError: for the first unreadable image, with `'stop'`.
    """

    def work(start: int) -> list[tuple[int, np.ndarray | Exception]]:
        out = []
        for i in range(start, min(start + _CHUNK, len(names))):
            try:
                out.append((i, preprocess.decode(open_image(i))))
            except UNREADABLE as error:
                out.append((i, error))
        return out

    # PIL registers its formats at first use, which is not guarded against threads.
    Image.init()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for chunk in in_order(pool, work, range(0, len(names), _CHUNK)):
                for i, image in chunk:
                    if not isinstance(image, Exception):
                        yield i, image
                    elif on_bad_image == 'stop':
                        raise bad_image(names[i], image) from image
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(pool: ThreadPoolExecutor, function: Callable, arguments: Sequence) -> Iterator:
    """Results of a function in the order of its arguments, computed a few ahead."""
    ahead: deque = deque()
    for argument in arguments:
        ahead.append(pool.submit(function, argument))
        if len(ahead) > 2 * (os.cpu_count() or 1):
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def bad_image(name: str, error: Exception) -> UsageError:
    """The sentence for an image that cannot be read."""
    return UsageError(
        f'cannot read the image {name} ({_reason(error)}): mend or remove it, or leave such images out with '
        "on_bad_image='skip'"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'the file does not exist'
    if isinstance(error, PermissionError):
        return 'no permission to read it'
    if type(error).__name__ == 'UnidentifiedImageError':
        return 'not an image, or damaged from its start'
    return str(error) or type(error).__name__
