"""Files that are either the old one or the new one, never half of it."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vpt_jax.errors import UsageError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, which takes its place when the block ends without an error.

    Missing folders are made. After an error nothing is left behind and an older file at `path` is untouched.

    Args:
      path: the file to write.

    Yields:
      The temporary file, open for writing bytes.

    Raises:
      UsageError: the operating system refuses (no permission, disk full, `path` is a folder).
    """
    path = Path(path)
    # Not `tempfile`: its files are readable by their owner alone, and these are meant to be shared.
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'xb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f'cannot write {path}: {error.strerror or error}') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
