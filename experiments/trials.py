"""Many trials as one program, against as many commands: wall clock of the embedded default, compilation included.

    python -m experiments.trials [--trials=24] [--epochs=20] [--commands=3]

Trials of VAPT on the embedded digits, which differ in rate and weight decay. First some `python -m vpt_jax.train`, one
after the other, of which the first fills an empty cache of compiled programs for the others; the time of all is the
first's, and the mean of the others for the rest. Then one process that runs all trials as one program, with an empty
cache. Nothing else should run on the machine.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from configs import vapt
from vpt_jax import cli
from vpt_jax.errors import UsageError
from vpt_jax.training import config as configs
from vpt_jax.training.together import trials_together
from vpt_jax.training.trials import TaskRun, Trial

_RATES = (2.0, 1.0, 0.5, 0.25, 0.1, 0.05)
_DECAYS = (0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003)


def trials(count: int) -> list[Trial]:
    """So many settings of a grid, all with one seed.

    Raises:
      UsageError: more than the grid has.
    """
    grid = list(itertools.product(_DECAYS, _RATES))
    if count > len(grid):
        raise UsageError(f'--trials={count}: at most {len(grid)}')
    return [Trial('search', (('optim.lr', rate), ('optim.weight_decay', decay)), 0) for decay, rate in grid[:count]]


def together(count: int, epochs: int, folder: Path) -> None:
    """Runs all trials as one program and prints the accuracies."""
    config = vapt.get_config()
    config.train.epochs = epochs
    backbone = configs.network(config)
    preprocess = configs.build_preprocess(config, backbone)
    dataset = configs.load_dataset(config, preprocess)
    run = TaskRun(config, backbone, dataset, preprocess, folder, False)
    for outcome in trials_together(run, trials(count)):
        print(f'{outcome.trial.key}: val {100 * outcome.accuracy:.2f} %')


def _timed(folder: Path, *command: str) -> float:
    environment = {**os.environ, 'VPT_JAX_CACHE': str(folder / 'cache')}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, '-m', *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f'{" ".join(command)} failed: {done.stderr.strip()[-300:]}')
    return time.perf_counter() - began


def main(number: int, epochs: int, commands: int, workdir: str | None) -> None:
    """Measures both and prints the ratio; with a folder for its work, only runs all trials as one program."""
    if workdir:
        together(number, epochs, Path(workdir))
        return
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        each = []
        for i, trial in enumerate(trials(number)[:commands]):
            (_, rate), (_, decay) = trial.changes
            each.append(_timed(
                Path(one), 'vpt_jax.train', '--config=configs/vapt.py', f'--workdir={one}/{i}',
                f'--config.optim.lr={rate}', f'--config.optim.weight_decay={decay}',
                f'--config.train.epochs={epochs}', '--config.train.linear_probe=False',
            ))  # fmt: skip
            print(f'command {i + 1}: {each[-1]:.1f} s', flush=True)
        single = each[0] + (number - 1) * sum(each[1:]) / (commands - 1)
        whole = _timed(
            Path(many), 'experiments.trials', f'--trials={number}', f'--epochs={epochs}', f'--together={many}/trials'
        )
    print(f'{number} commands {single:.0f} s, as one program {whole:.0f} s: {whole / single:.2f} of the time')


if __name__ == '__main__':
    HOLDERS = [
        flags.DEFINE_integer('trials', 24, 'how many', lower_bound=2),
        flags.DEFINE_integer('epochs', 20, 'of every trial', lower_bound=3),
        flags.DEFINE_integer('commands', 3, 'how many commands are run to know the time of one', lower_bound=2),
        flags.DEFINE_string('together', None, 'only run all trials as one program, with this work folder'),
    ]
    cli.run_with_flags(lambda **given: main(*given.values()), __doc__, HOLDERS)
