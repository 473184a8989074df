"""Command lines of the programs, run in forked copies of one process, so that their imports are paid for once.

A copy is forked before JAX has started its threads; apart from that it is `python -m vpt_jax.X ...` on its own.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
#: Programs of tests run once or twice: compiling them is what takes the time.
QUICK_FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def environment(cache: Path) -> dict[str, str]:
    """Variables for a child process: the CPU, and what is kept from one process to the next in `cache`."""
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'VPT_JAX_CACHE': str(cache)}


def write_task(folder: Path, *, train: int = 24, val: int = 4, test: int = 12) -> tuple[Path, Path]:
    """Writes a backbone (two blocks of width 32, 2 x 2 patches) and a dataset of 4 classes; returns their paths.

    Beside the backbone lies `other.npz`, of the same shapes.
    """
    import jax

    import vpt_jax as vj
    from tests.training.conftest import arrays
    from vpt_jax.checkpoints.schemes import big_vision

    backbone = vj.load_backbone('random:Ti/8@16', depth=2, width=32, mlp_dim=32, heads=2)
    params = jax.device_get(backbone.params)
    big_vision.write(folder / 'tiny.npz', params)
    big_vision.write(folder / 'other.npz', jax.tree.map(lambda a: a + 1, params))
    np.savez(folder / 'patterns.npz', **arrays((train, val, test)))
    return folder / 'tiny.npz', folder / 'patterns.npz'


class Commands:
    """`commands('train', '--config=...')` runs a program and gives its output and exit code; a context manager."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, '-m', 'tests.commands'], cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, program: str, *arguments: object, stdin: str = '') -> subprocess.CompletedProcess:
        """Runs `python -m vpt_jax.PROGRAM ARGUMENTS` in the repository's root."""
        argv = [f'vpt_jax.{program}', *map(str, arguments)]
        self._server.stdin.write(json.dumps({'argv': argv, 'stdin': stdin}) + '\n')
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess(argv, **answer)

    def __enter__(self) -> 'Commands':
        return self

    def __exit__(self, *exception) -> None:
        self._server.stdin.close()
        self._server.wait()


def _serve() -> None:
    import vpt_jax.cli
    import vpt_jax.training.config  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile('w+')) for _ in range(3)]
            files[0].write(request['stdin'])
            files[0].seek(0)
            child = os.fork()
            if not child:
                _become(request['argv'], files)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for file in files[1:]:
                file.seek(0)
            answer = {'returncode': code, 'stdout': files[1].read(), 'stderr': files[2].read()}
        print(json.dumps(answer), flush=True)


def _become(argv: list[str], files: list) -> None:
    """The child: never returns."""
    code = 0
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    sys.stdin = open(0)  # noqa: SIM115
    sys.argv = argv
    try:
        runpy.run_module(argv[0], run_name='__main__', alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == '__main__':
    _serve()
