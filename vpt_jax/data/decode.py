"""Decoding many images at once, and what happens to those that cannot be read."""

import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from vpt_jax.data.preprocess import Preprocess
from vpt_jax.errors import UsageError

# What PIL's readers raise for files that are damaged, of another format, or absurdly large.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, Image.DecompressionBombError)
# Enough images a task that the pool's bookkeeping does not show; few enough that the cores finish together.
_CHUNK = 64


def decode_all(
    open_image: Callable[[int], np.ndarray | Image.Image],
    names: Sequence[str],
    preprocess: Preprocess,
    on_bad_image: str,
) -> tuple[np.ndarray | list[np.ndarray], np.ndarray, tuple[str, ...]]:
    """Opens and decodes images in a pool of threads (PIL releases the interpreter while it decodes and resizes).

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

    def work(start: int) -> dict[int, Exception]:
        bad = {}
        for i in range(start, min(start + _CHUNK, count)):
            try:
                images[i] = preprocess.decode(open_image(i))
            except _UNREADABLE as error:
                bad[i] = error
        return bad

    # PIL registers its formats at first use, which is not guarded against threads.
    Image.init()
    unreadable: dict[int, Exception] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bad in pool.map(work, range(0, count, _CHUNK)):
            for i, error in bad.items():
                if on_bad_image == 'stop':
                    raise UsageError(
                        f'cannot read the image {names[i]} ({_reason(error)}): mend or remove it, or leave such '
                        "images out with on_bad_image='skip'"
                    ) from error
            unreadable |= bad
    kept = np.setdiff1d(np.arange(count), list(unreadable)) if unreadable else np.arange(count)
    if unreadable:
        images = images[kept] if preprocess.fixed_size else [images[i] for i in kept]
    return images, kept, tuple(names[i] for i in unreadable)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'the file does not exist'
    if isinstance(error, PermissionError):
        return 'no permission to read it'
    if type(error).__name__ == 'UnidentifiedImageError':
        return 'not an image, or damaged from its start'
    return str(error) or type(error).__name__
