"""Published protocols over many tasks: settings chosen on val, then runs with several seeds; resumable at any point.

Every setting of a grid is trained once on train and scored by its last epoch's accuracy on val. The best one, ties by
the method's rule, is trained with several seeds, on train and val together where the benchmark does so, and the last
epoch's test accuracy is reported (KMnP/vpt, `tune_vtab.py`; arXiv 2203.12119, 2501.18936). The test split has no part
in any choice. A run whose loss is not finite counts as accuracy 0, as published.

What is done is on disk: one small file a trial, and the run folder of the trial that is under way. The same call goes
on from there.
"""

import ast
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vpt_jax.checkpoints import atomic
from vpt_jax.data.benchmarks import BENCHMARKS, TASKS, Benchmark, require
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.zoo import Backbone
from vpt_jax.training import config as configs
from vpt_jax.training.linear_trials import linear_trials
from vpt_jax.training.run_folder import check_same, flatten
from vpt_jax.training.trials import Changes, Executor, Outcome, TaskRun, Trial, changed

#: The seeds of the published final runs.
SEEDS = (42, 44, 82, 100, 800)
_DECAYS = (0.01, 0.001, 0.0001, 0.0)
_PROMPT = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
#: Base rates (for a batch of 256) and weight decays of the published searches (KMnP/vpt, `tune_vtab.py`).
GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    'prompt': (_PROMPT, _DECAYS),
    'prompt_fgvc': (_PROMPT[:-1], _DECAYS),
    'prompt_largerlr': ((1000.0, 500.0, 250.0, 100.0), _DECAYS),
    'prompt_resnet': ((5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05, 0.025, 0.01), _DECAYS),
    'linear': (_PROMPT, _DECAYS),
    'linear_mae': ((*_PROMPT, 0.025, 0.005, 0.0025), _DECAYS),
    'finetune': ((0.005, 0.001, 0.0005, 0.0001), _DECAYS),
    'finetune_resnet': ((0.5, 0.25, 0.05, 0.025, 0.005, 0.0025, 0.0005, 0.00025), _DECAYS),
}
#: Which of equally good settings is taken: the smaller rate (VPT) or the larger one (VAPT); then the larger decay.
TIES = ('smaller', 'larger')


def search_space(config: ConfigDict) -> list[Changes]:
    """The settings of a config's grid, in the order in which the published programs walk it: from large to small.

    `sweep.lr` and `sweep.weight_decay` replace the grid's; `sweep.axes` adds fields, written
    `'method.num_tokens=1|5|10;method.dropout=0.0|0.1'`.

    Raises:
      UsageError: an unknown grid, or axes that cannot be read.
    """
    given = config.sweep
    if given.grid not in GRIDS:
        raise unknown('grid', given.grid, GRIDS)
    rates, decays = (tuple(map(float, g or d)) for g, d in zip((given.lr, given.weight_decay), GRIDS[given.grid],
                                                               strict=True))  # fmt: skip
    axes = [_axis(text) for text in filter(None, given.axes.split(';'))]
    axes += [('optim.lr', sorted(rates, reverse=True)), ('optim.weight_decay', sorted(decays, reverse=True))]
    fields = [field for field, _ in axes]
    return [tuple(zip(fields, values, strict=True)) for values in itertools.product(*(v for _, v in axes))]


def _axis(text: str) -> tuple[str, list]:
    field, _, values = text.partition('=')
    try:
        return field.strip(), [ast.literal_eval(value) for value in values.split('|')]
    except (ValueError, SyntaxError) as error:
        message = f'--config.sweep.axes is written field=value|value;field=..., got {text!r}'
        raise UsageError(message) from error


def best(outcomes: Sequence[Outcome], ties: str) -> Outcome:
    """The outcome with the highest accuracy; of equal ones that with the smaller or larger rate, else the first.

    Args:
      outcomes: of a search, in the order of `search_space`.
      ties: one of `TIES`.

    Raises:
      UsageError: an unknown rule, or nothing but runs that diverged.
    """
    if ties not in TIES:
        raise unknown('rule for ties', ties, TIES)
    if all(outcome.trained_parameters is None for outcome in outcomes):
        raise UsageError('every setting of the grid diverged: search smaller rates with --config.sweep.lr')
    sign = -1 if ties == 'smaller' else 1
    # Accuracies are compared as published, in per cent with two decimals. `max` keeps the first of equals.
    return max(outcomes, key=lambda o: (round(100 * o.accuracy, 2), sign * dict(o.trial.changes)['optim.lr']))


def say_line(line: str) -> None:
    """Prints a line at once, so that it is not lost when the process is killed."""
    print(line, flush=True)


def sweep(
    config: ConfigDict,
    tasks: Mapping[str, str],
    workdir: str | Path,
    *,
    final_on_val: bool = True,
    seeds: Sequence[int] = SEEDS,
    fast: bool = False,
    execute: Executor = linear_trials,
    backbone: Backbone | None = None,
    report: Callable[[list[dict]], None] = lambda results: None,
    say: Callable[[str], None] = say_line,
) -> list[dict]:
    """Runs the protocol of the module's docstring.

    Args:
      config: from a config file; its dataset is not looked at.
      tasks: dataset names and the groups they belong to.
      workdir: everything is written here; a folder with an unfinished sweep of the same configuration is gone on with.
      final_on_val: whether final runs train on train and val together.
      seeds: of the final runs.
      fast: VAPT's short search: all decays at the rate `sweep.fast_lr`, then the best decay at all rates.
      execute: how trials are run; by default one by one, linear heads all at once.
      backbone: instead of the one that the config names.
      report: called with all results so far after every task.
      say: called with a line of text after every trial.

    Returns:
      One dict a task: see `_result`.

    Raises:
      UsageError: a task that is not on this machine, a folder of another sweep, a grid of which everything diverged.
      StoppedError: SIGTERM or SIGINT came; everything was saved.
    """
    workdir = Path(workdir).expanduser().resolve()
    space = check(config, tasks)
    backbone = backbone or configs.network(config)
    check_same(workdir / 'sweep.json', _described(config, backbone, final_on_val))
    results = []
    for name, group in tasks.items():
        task_config = changed(config, {'dataset': name})
        preprocess = configs.build_preprocess(task_config, backbone)
        dataset = configs.load_dataset(task_config, preprocess)
        if not len(dataset.val):
            raise UsageError(f'{name} has no val split to choose settings on')
        run = TaskRun(task_config, backbone, dataset, preprocess, result_file(workdir, name).parent, final_on_val)
        chosen, searched = _search(run, space, fast, execute, say)
        final = [Trial('final', chosen.trial.changes, seed) for seed in seeds]
        outcomes = _outcomes(run, final, execute, say)
        result = _result(run, group, chosen, searched, [outcomes[trial] for trial in final])
        with atomic.replacing(result_file(workdir, name)) as file:
            file.write((json.dumps(result, indent=2) + '\n').encode())
        results.append(result)
        report(results)
    return results


def check(config: ConfigDict, tasks: Mapping[str, str]) -> list[Changes]:
    """The settings to search, of a sweep whose mistakes are noticed now and not after loading everything.

    Raises:
      UsageError: tasks that are not there or have one name, a grid that cannot be read, a field that the config lacks.
    """
    if len(set(map(label, tasks))) < len(tasks):
        raise UsageError(
            f'two of these tasks have the same name: {", ".join(map(label, tasks))}; rename a file or folder'
        )
    for name in tasks:
        require(name, config.data.dir, config.data.source)
    space = search_space(config)
    changed(config, dict(space[0]))
    return space


def result_file(workdir: Path, task: str) -> Path:
    """Where a sweep leaves what it returns of a task, in the task's folder."""
    return workdir / label(task).replace(':', '_') / 'result.json'


def _described(config: ConfigDict, backbone: Backbone, final_on_val: bool) -> dict:
    """What must agree for a sweep to be gone on with: not the tasks, nor where the data are."""
    left_out = ('dataset', 'benchmark', 'data.dir', 'data.memory_gb', 'sweep.fast_lr', 'train.shard_backbone')
    fields = {k: v for k, v in flatten(config.to_dict()).items() if k not in left_out}
    return {'config': fields, 'backbone': backbone.describe(), 'final_on_val': final_on_val}


def label(dataset: str) -> str:
    """A dataset's name for tables and folders: of a path its last part, a benchmark's task as it is."""
    if dataset.partition(':')[0] in TASKS:
        return dataset
    return dataset.rsplit('/', 1)[-1].rsplit(':', 1)[-1].removesuffix('.npz')


def _search(
    run: TaskRun, space: list[Changes], fast: bool, execute: Executor, say: Callable[[str], None]
) -> tuple[Outcome, int]:
    """The best setting, and how many were tried."""
    trials = [Trial('search', changes, run.config.seed) for changes in space]
    ties = run.config.sweep.ties
    if not fast:
        found = _outcomes(run, trials, execute, say)
        return best([found[trial] for trial in trials], ties), len(trials)
    rate = float(run.config.sweep.fast_lr)
    first = [trial for trial in trials if dict(trial.changes)['optim.lr'] == rate]
    if not first:
        raise UsageError(f'--fast starts at --config.sweep.fast_lr={rate}, which is not in the grid')
    found = _outcomes(run, first, execute, say)
    decay = dict(best([found[trial] for trial in first], ties).trial.changes)['optim.weight_decay']
    second = [trial for trial in trials if dict(trial.changes)['optim.weight_decay'] == decay]
    found |= _outcomes(run, second, execute, say)
    return best([found[trial] for trial in trials if trial in found], ties), len(found)


def _outcomes(
    run: TaskRun, trials: Sequence[Trial], execute: Executor, say: Callable[[str], None]
) -> dict[Trial, Outcome]:
    """Outcomes of trials: those on disk as they are, the others by running them."""
    found = {trial: _read(run, trial) for trial in trials}
    missing = [trial for trial in trials if found[trial] is None]
    done = len(trials) - len(missing)
    for outcome in execute(run, missing) if missing else ():
        _write(run, outcome)
        found[outcome.trial] = outcome
        done += 1
        scored = f'{outcome.trial.scored_on} {100 * outcome.accuracy:.2f} %'
        result = scored if outcome.trained_parameters is not None else 'diverged'
        say(f'{label(run.config.dataset)} {outcome.trial.phase} {done}/{len(trials)}: {outcome.trial.key} {result}')
    for folder in (run.folder / 'runs').glob('together-*'):  # states of programs that ran several trials
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _row_file(run: TaskRun, trial: Trial) -> Path:
    return run.folder / 'trials' / f'{trial.key}.json'


def _read(run: TaskRun, trial: Trial) -> Outcome | None:
    path = _row_file(run, trial)
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    return Outcome(trial, row['accuracy'], row['trained_parameters'])


def _write(run: TaskRun, outcome: Outcome) -> None:
    """Records an outcome; what its run folder holds beyond that is kept for final runs alone, without checkpoints."""
    trial = outcome.trial
    row = {'phase': trial.phase, 'changes': dict(trial.changes), 'seed': trial.seed, 'accuracy': outcome.accuracy,
           'trained_parameters': outcome.trained_parameters}  # fmt: skip
    with atomic.replacing(_row_file(run, trial)) as file:
        file.write((json.dumps(row, indent=2) + '\n').encode())
    folder = run.folder / 'runs' / trial.key
    shutil.rmtree(folder if trial.phase == 'search' else folder / 'checkpoints', ignore_errors=True)


def _result(run: TaskRun, group: str, chosen: Outcome, searched: int, final: list[Outcome]) -> dict:
    """What is reported of a task; accuracies in [0, 1]."""
    return {
        'task': label(run.config.dataset),
        'group': group,
        'classes': run.dataset.num_classes,
        'chosen': dict(chosen.trial.changes),
        'settings_tried': searched,
        'val_accuracy': chosen.accuracy,
        'seeds': [outcome.trial.seed for outcome in final],
        'test_accuracies': [outcome.accuracy for outcome in final],
        'trained_parameters': chosen.trained_parameters,
        'backbone_parameters': run.backbone.num_params,
        'examples': {split: len(getattr(run.dataset, split)) for split in ('train', 'val', 'test')},
        'data_source': run.dataset.source or run.dataset.name,
        'preprocess': run.preprocess.to_dict(),
    }


def benchmark_of(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
      UsageError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise unknown('benchmark', name, BENCHMARKS)
    return BENCHMARKS[name]
