"""Kills training runs at random moments and checks that they end with the same bits: `python -m tests.kill --runs=20`.

Two uninterrupted runs of `python -m vpt_jax.train` come first: one that compiles everything, one that finds it in the
cache, as all later attempts do; they must agree too. Then every run is killed (SIGKILL: no handler, no clean-up) one
to three times and started again with the same command line until it ends. Half of the kills come at a moment drawn
uniformly from the duration of an uninterrupted run, most of which is start-up; the other half shortly after a random
checkpoint appears, in the middle of training and of the next checkpoints' saving. `prompt.safetensors` and
`metrics.jsonl` must come out byte for byte as without interruption. Exits with 1 at any difference.
"""

import dataclasses
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from tests.commands import ROOT, environment, write_task

# Dropout is on, so that a random number drawn twice or left out would show. 60 steps, 21 checkpoints.
SETTINGS = (
    '--config.method.num_tokens=2', '--config.method.dropout=0.3', '--config.train.epochs=20',
    '--config.train.warmup_epochs=2', '--config.train.batch_size=8', '--config.train.log_every_steps=5',
    '--config.train.linear_probe=False', '--config.checkpoint.every_steps=3', '--config.optim.lr=4',
)  # fmt: skip
COMPARED = ('prompt.safetensors', 'metrics.jsonl')


# Longer than it takes to get from one checkpoint to the next.
AFTER_CHECKPOINT = 0.2


@dataclasses.dataclass(frozen=True, order=True)
class Moment:
    """When to kill: `seconds` after there is a checkpoint of `step` or later; after the start if `step` is 0."""

    step: int
    seconds: float

    @classmethod
    def drawn(cls, rng: random.Random, duration: float) -> 'Moment':
        """See the module's docstring."""
        if rng.random() < 0.5:
            return cls(0, rng.uniform(0, duration))
        return cls(rng.randrange(3, 58, 3), rng.uniform(0, AFTER_CHECKPOINT))

    def __str__(self) -> str:
        return f'{self.seconds:.2f} s after {f"checkpoint {self.step}" if self.step else "the start"}'


class Bench:
    """Starts runs of one small task.

    Args:
      folder: for the task, the runs and the cache of compiled programs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = environment(folder / 'cache')
        backbone, dataset = write_task(folder)
        self.config = f'--config=configs/vapt.py:backbone={backbone},dataset=npz:{dataset}'

    def attempt(self, name: str, moment: Moment | None = None) -> bool:
        """One process; whether it came to its end before it was killed.

        Raises:
          RuntimeError: it ended with an error of its own.
        """
        workdir = self.folder / name
        argv = [sys.executable, '-m', 'vpt_jax.train', self.config, *SETTINGS, f'--workdir={workdir}']
        output = workdir.with_suffix('.log')
        with (
            open(output, 'ab') as log,
            subprocess.Popen(argv, cwd=ROOT, env=self.env, stdout=log, stderr=log) as process,
        ):
            try:
                while moment and self.newest_checkpoint(name) < moment.step and process.poll() is None:
                    time.sleep(0.01)
                code = process.wait(moment and moment.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return False
        if code:
            raise RuntimeError(f'the run ended with exit code {code}:\n{output.read_text()[-3000:]}')
        return True

    def whole(self, name: str) -> tuple[dict[str, bytes], float]:
        """What an uninterrupted run leaves behind, and its seconds."""
        began = time.perf_counter()
        self.attempt(name)
        return self.result(name), time.perf_counter() - began

    def result(self, name: str) -> dict[str, bytes]:
        """The bytes that must not depend on interruptions."""
        return {file: (self.folder / name / file).read_bytes() for file in COMPARED}

    def newest_checkpoint(self, name: str) -> int:
        """Its step; 0 if there is none."""
        folder = self.folder / name / 'checkpoints'
        return max((int(p.name) for p in folder.glob('*') if p.name.isdigit()), default=0)

    def killed(self, name: str, moments: list[Moment]) -> list[str]:
        """A run that is killed at these moments, one an attempt, and then left alone; the kills that struck."""
        kills = []
        for moment in moments:
            if self.attempt(name, moment):
                return kills
            torn = any('tmp' in path.name for path in (self.folder / name / 'checkpoints').glob('*'))
            kills.append(f'{moment} (newest {self.newest_checkpoint(name)}{", the next half written" if torn else ""})')
        self.attempt(name)
        return kills


def check(runs: int, seed: int, folder: Path) -> int:
    """The whole check, reported on stdout.

    Args:
      runs: how many runs are killed.
      seed: draws the moments.
      folder: an empty folder.

    Returns:
      How many runs differed from the uninterrupted one.
    """
    began = time.perf_counter()
    bench = Bench(folder)
    reference, cold = bench.whole('reference')
    again, warm = bench.whole('again')
    print(f'reference: {cold:.1f} s, with compiled programs from the cache {warm:.1f} s', flush=True)
    wrong = int(reference != again)
    if wrong:
        print('two uninterrupted runs DIFFER', flush=True)
    rng = random.Random(seed)
    struck = 0
    for i in range(runs):
        name, start = f'run{i}', time.perf_counter()
        kills = bench.killed(name, sorted(Moment.drawn(rng, warm) for _ in range(rng.randint(1, 3))))
        differing = [file for file, content in bench.result(name).items() if content != reference[file]]
        wrong += bool(differing)
        struck += len(kills)
        verdict = f'DIFFERENT: {", ".join(differing)}' if differing else 'identical'
        moments = ', '.join(kills) or 'not, it ended first'
        print(f'run {i}: killed {moments}; {time.perf_counter() - start:.1f} s; {verdict}', flush=True)
    seconds = time.perf_counter() - began
    print(f'{runs} runs, {struck} kills, {wrong} different, {seconds:.0f} s in all', flush=True)
    return wrong


def main(_) -> None:
    """Runs the check; exit code 1 if anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(flags.FLAGS.folder or folder)
        path.mkdir(parents=True, exist_ok=True)
        sys.exit(1 if check(flags.FLAGS.runs, flags.FLAGS.seed, path) else 0)


if __name__ == '__main__':
    flags.DEFINE_integer('runs', 20, 'how many runs are killed', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'draws the moments of the kills')
    flags.DEFINE_string('folder', None, 'keep everything here; by default a temporary folder')
    app.run(main)
