"""Downloads and prepares, or unpacks, datasets: `python -m vpt_jax.fetch vtab:cifar100 [--data_dir=DIR]`.

Also `tfds:NAME`, and a benchmark's name (`vtab`) for all its tasks.
"""

from absl import flags

from vpt_jax import cli
from vpt_jax.data.benchmarks import BENCHMARKS
from vpt_jax.data.benchmarks.fetch import fetch
from vpt_jax.errors import UsageError


def main(*names: str, data_dir: str | None) -> int:
    """Fetches each dataset and says what was done; a set that cannot be had does not keep the others from it."""
    if not names:
        raise UsageError(f'say what to fetch: a dataset such as vtab:cifar100, or one of {", ".join(BENCHMARKS)}')
    wanted = [task for name in names for task in (BENCHMARKS[name].tasks if name in BENCHMARKS else (name,))]
    failed = 0
    for name in wanted:
        try:
            print(fetch(name, data_dir), flush=True)
        except UsageError as error:
            if len(wanted) == 1:
                raise
            failed += 1
            print(f'error: {error}', flush=True)
    return 2 if failed else 0


if __name__ == '__main__':
    where = flags.DEFINE_string('data_dir', None, 'where to; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets')
    cli.run_with_flags(main, __doc__, [where], takes_arguments=True)
