"""Compiled programs that outlive the process: the next run of the same program loads them instead of compiling anew.

It is JAX's own persistent cache, so JAX's settings hold: `JAX_COMPILATION_CACHE_DIR` names another folder,
`JAX_ENABLE_COMPILATION_CACHE=0` turns it off. What is loaded is the machine code that was compiled, so the numbers are
the same bits. It is found again by the program, the versions of JAX and XLA, their flags, and the device.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import jax

from vpt_jax.checkpoints.fetch import cache_folder

#: Bytes that are left of what earlier processes kept; the programs of a run take a few MB.
MOST = 2**30


def keep_compiled() -> None:
    """Keeps what this process compiles in $VPT_JAX_CACHE/compiled (by default ~/.cache/vpt_jax/compiled).

    To be called before anything is compiled. Where JAX was told to use another folder, that one is used. One that
    cannot be written is named in a warning, and nothing is kept.
    """
    config = jax.config
    given = config.jax_compilation_cache_dir
    if not config.jax_enable_compilation_cache or '://' in (given or ''):
        return
    folder = Path(given or cache_folder() / 'compiled')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(f'warning: cannot write to {folder} ({error.strerror}), so compiled programs are not kept; '
              'JAX_COMPILATION_CACHE_DIR names another folder', file=sys.stderr, flush=True)  # fmt: skip
        config.update('jax_enable_compilation_cache', False)
        return
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        # By default JAX keeps nothing that compiles within a second, and a run has many such programs.
        config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    if not given:
        config.update('jax_compilation_cache_dir', str(folder))
        _trim(folder, MOST)


def _trim(folder: Path, most: int) -> None:
    """Deletes what was not used for longest until the rest takes no more than `most` bytes, and what a kill left empty.

    JAX's own limit takes a lock for every file, and a process killed between its two writes leaves it broken.
    """
    with contextlib.suppress(OSError):  # another process may be deleting the same
        found = [(path, path.stat()) for path in folder.rglob('*') if path.is_file()]  # XLA's own have folders there
        total = sum(about.st_size for _, about in found)
        for path, about in sorted(found, key=lambda item: max(item[1].st_atime, item[1].st_mtime)):
            if total > most or not about.st_size:
                path.unlink()
                total -= about.st_size
