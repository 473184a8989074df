"""Runs a benchmark's published protocol: `python -m vpt_jax.sweep --config=configs/vapt.py:benchmark=vtab`.

A grid on train and val, then several seeds on the whole of it, test accuracy of the last epoch; one table over the
tasks. It can be stopped and given again at any point, and goes on from there. `docs/benchmarks.md` has the protocols,
`docs/scaling.md` how to spread tasks over a cluster (--launcher=slurm).
"""

import pathlib

from absl import flags

from vpt_jax import cli
from vpt_jax.errors import UsageError, unknown
from vpt_jax.training.cluster import read_options, sweep_by_jobs
from vpt_jax.training.sweep import SEEDS, benchmark_of, sweep
from vpt_jax.training.sweep_table import read_published, write_tables

# In a clone of the repository; an installed package has no published numbers beside it, and shows none.
_PUBLISHED = pathlib.Path(__file__).parents[1] / 'experiments' / 'published'


def main(
    config, workdir: str, tasks: list[str], seeds: str, fast: bool, published: str | None, launcher: str | None,
    launcher_options: list[str], jobs: int,
) -> None:  # fmt: skip
    """Runs the sweep; prints a line a trial and the table after every task."""
    if not config.benchmark:
        raise UsageError('say which benchmark: --config=FILE.py:benchmark=vtab (or fgvc, pgn, ap)')
    benchmark = benchmark_of(config.benchmark)
    chosen = choose_tasks(benchmark.tasks, tasks)
    beside = read_published(published or _PUBLISHED, config.benchmark, cli.config_name())
    title = f'{cli.config_name()} on {benchmark.title}, {config.backbone}'

    def report(results: list[dict]) -> None:
        print('\n' + write_tables(workdir, results, title, beside), flush=True)

    how = {'final_on_val': benchmark.final_on_val, 'seeds': read_seeds(seeds), 'fast': fast}
    if launcher:
        sweep_by_jobs(config, chosen, workdir, launcher, read_options(launcher_options), at_once=jobs, report=report,
                      **how)  # fmt: skip
    else:
        sweep(config, chosen, workdir, report=report, **how)
    print(f'the tables are in {workdir}: table.md, table.csv, table.json')


def choose_tasks(known: dict[str, str], wanted: list[str]) -> dict[str, str]:
    """The tasks asked for and their groups, all if none is.

    Args:
      known: a benchmark's tasks and groups.
      wanted: names with or without the benchmark's in front.

    Raises:
      UsageError: a name that is none of them.
    """
    if not wanted:
        return dict(known)
    by_name = {task.partition(':')[2]: task for task in known} | {task: task for task in known}
    for name in wanted:
        if name not in by_name:
            raise unknown('task', name, by_name)
    return {by_name[name]: known[by_name[name]] for name in wanted}


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds from `'3'`, the first three of the published ones, or `'1,2,3'`, these.

    Raises:
      UsageError: neither of the two.
    """
    try:
        given = tuple(int(part) for part in text.split(','))
    except ValueError as error:
        raise UsageError(f'--seeds is a number of seeds or a list of them such as 42,44, got {text!r}') from error
    if len(given) > 1:
        return given
    if not 1 <= given[0] <= len(SEEDS):
        raise UsageError(f'--seeds={text}: there are {len(SEEDS)} published seeds; for others write a list, {text},')
    return SEEDS[: given[0]]


def _flags() -> list[flags.FlagHolder]:
    return [
        flags.DEFINE_list('tasks', [], 'some of the tasks, by name; by default all'),
        flags.DEFINE_string('seeds', str(len(SEEDS)), 'how many of the published seeds, or a list of seeds'),
        flags.DEFINE_bool(
            'fast', False, "VAPT's short search: all decays at one rate, then the best decay at all rates"
        ),
        flags.DEFINE_string('launcher', None, 'a job for every task: slurm, or local for processes of this machine'),
        flags.DEFINE_list('launcher_options', [], "of submitit's jobs: timeout_min=600,gpus_per_node=1,slurm_..."),
        flags.DEFINE_integer('jobs', 0, 'how many jobs at once; 0 for all', lower_bound=0),
        flags.DEFINE_string('published', None, 'folder of published numbers; by default experiments/published'),
    ]


if __name__ == '__main__':
    cli.run_with_config(main, __doc__, _flags(), lambda name, config: f'runs/sweep_{config.benchmark}_{name}')
