"""A sweep over many machines: one job a task, started by submitit on SLURM or on this machine.

A job is the sweep of its task, in the sweep's own folder: it resumes what is there, and writes what a sweep by one
process would. The process that submits only waits and collects, and may be stopped and started again like any sweep.
"""

import ast
import dataclasses
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown
from vpt_jax.training import sweep as sweeps

LAUNCHERS = ('local', 'slurm')
# What a job gets that nobody said anything about; a job that ran out of time is queued again and goes on.
_DEFAULTS = {'name': 'vpt_jax', 'timeout_min': 24 * 60, 'nodes': 1, 'tasks_per_node': 1}
_MOST_TIMEOUTS = 100
_POLL_SECONDS = {'local': 0.2, 'slurm': 10.0}


@dataclasses.dataclass(frozen=True)
class _Job:
    """The sweep of one task; submitit calls it on another machine."""

    config: ConfigDict
    tasks: Mapping[str, str]
    workdir: Path
    options: Mapping[str, Any]

    def __call__(self) -> str:
        """What the user can mend, in one sentence; empty if all went well."""
        try:
            sweeps.sweep(self.config, self.tasks, self.workdir, **self.options)
        except UsageError as error:
            return str(error)
        return ''

    def checkpoint(self) -> Any:
        """What submitit queues when the time of the job is over: the same again, which goes on from the disk."""
        return importlib.import_module('submitit.helpers').DelayedSubmission(self)


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """Parameters of submitit's jobs from `['timeout_min=600', 'slurm_partition=gpu']`.

    Raises:
      UsageError: a part that is not `name=value`.
    """
    options = {}
    for part in given:
        name, equals, value = part.partition('=')
        if not equals or not name:
            raise UsageError(f'--launcher_options are written name=value,name=value, got {part!r}')
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def sweep_by_jobs(
    config: ConfigDict,
    tasks: Mapping[str, str],
    workdir: str | Path,
    launcher: str,
    launcher_options: Mapping[str, Any],
    *,
    at_once: int = 0,
    report: Callable[[list[dict]], None] = lambda results: None,
    say: Callable[[str], None] = sweeps.say_line,
    **options: Any,
) -> list[dict]:
    """`sweep` with a job for each task.

    Args:
      config, tasks, workdir, report, say, options: as `sweep` takes them; `workdir` is on a disk that all machines see.
      launcher: one of `LAUNCHERS`: 'slurm' submits to the cluster, 'local' starts processes on this machine.
      launcher_options: parameters of submitit's `AutoExecutor`, such as `timeout_min`, `gpus_per_node`, `mem_gb` or
        `slurm_partition`.
      at_once: how many jobs may be submitted and not done; 0 for no limit.

    Returns:
      What `sweep` returns.

    Raises:
      UsageError: submitit is not there or refuses, or tasks whose jobs failed, after all others have ended.
    """
    workdir = Path(workdir).expanduser().resolve()
    sweeps.check(config, tasks)
    executor = _executor(workdir / 'jobs', launcher, launcher_options)
    record = workdir / 'jobs' / 'submitted.json'
    submitted = json.loads(record.read_text()) if record.exists() else {}
    running = {}
    for task in tasks:
        if task in submitted:
            job = _known_job(executor, launcher, submitted[task])
            if _is_running(job, launcher):
                say(f'{sweeps.label(task)}: job {job.job_id} is under way already')
                running[task] = job
    waiting, failed = [task for task in tasks if task not in running], {}
    while waiting or running:
        while waiting and not (at_once and len(running) >= at_once):
            task = waiting.pop(0)
            running[task] = job = executor.submit(_Job(config, {task: tasks[task]}, workdir, options))
            submitted[task] = job.job_id
            with atomic.replacing(record) as file:
                file.write((json.dumps(submitted, indent=2) + '\n').encode())
            say(f'{sweeps.label(task)}: submitted job {job.job_id}, log {job.paths.stdout}')
        time.sleep(_POLL_SECONDS[launcher])
        ended = [task for task, job in running.items() if not _is_running(job, launcher)]
        for task in ended:
            problem = _problem(running.pop(task))
            if problem:
                failed[task] = problem
                say(f'{sweeps.label(task)}: failed: {problem}')
        if set(ended) - failed.keys():
            report(_results(workdir, [t for t in tasks if t not in {*waiting, *running, *failed}]))
    if failed:
        shown = '; '.join(f'{sweeps.label(task)}: {problem}' for task, problem in failed.items())
        raise UsageError(
            f'{len(failed)} of {len(tasks)} tasks failed ({shown}); the same command goes on where they stopped'
        )
    return _results(workdir, tasks)


def _executor(folder: Path, launcher: str, options: Mapping[str, Any]) -> Any:
    if launcher not in LAUNCHERS:
        raise unknown('launcher', launcher, LAUNCHERS)
    try:
        submitit = importlib.import_module('submitit')
    except ImportError as error:
        raise UsageError("--launcher needs submitit: pip install 'vpt_jax[cluster]'") from error
    try:
        executor = submitit.AutoExecutor(folder, launcher, **{f'{launcher}_max_num_timeout': _MOST_TIMEOUTS})
        executor.update_parameters(**{**_DEFAULTS, **options})
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:400]
        raise UsageError(f'submitit does not take --launcher={launcher} with these options: {reason}') from error
    return executor


def _known_job(executor: Any, launcher: str, number: str) -> Any:
    submitit = importlib.import_module('submitit')
    kinds = {'local': submitit.LocalJob, 'slurm': submitit.SlurmJob}
    return kinds[launcher](executor.folder, number)


def _is_running(job: Any, launcher: str) -> bool:
    if not job.done():
        return True
    if launcher == 'slurm' or job.paths.result_pickle.exists():
        return False
    # Of a job on this machine that an earlier process started, submitit knows nothing before it has ended.
    try:
        os.kill(int(job.job_id), 0)
    except OSError:
        return False
    return True


def _problem(job: Any) -> str:
    """Why a job that ended failed; empty if it did not."""
    if job.exception() is not None:
        return f'it was stopped or ended with an error, see {job.paths.stderr}'
    return job.result()


def _results(workdir: Path, tasks: Sequence[str]) -> list[dict]:
    return [json.loads(sweeps.result_file(workdir, task).read_text()) for task in tasks]
