"""Compares methods on local image sets by the published protocol, without a network.

    python -m experiments.offline --data=SETS --methods=linear,vpt_deep,vapt --seeds=3

SETS is a folder of `.npz` files (see `vpt_jax.data.arrays`) and of image folders (see `vpt_jax.data.folder`); `--sets`
picks some of them, and may name `digits`, the embedded one. For every method and set the rate is chosen on val and
final runs on train and val are scored on test, as `vpt_jax.sweep` does on VTAB-1k; what is searched is in `RECIPES`.
It can be stopped and given again at any point, and several processes may share the work folder if each has other
methods. Tables are written as markdown, csv and json for each method, and one for all of them.
"""

import functools
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

if __name__ == '__main__':  # also as `python experiments/offline.py`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from vpt_jax import cli
from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.zoo import load_backbone
from vpt_jax.sweep import read_seeds
from vpt_jax.training.condense import tune
from vpt_jax.training.inference import load_trained
from vpt_jax.training.linear_trials import linear_trials
from vpt_jax.training.loop import DivergedError
from vpt_jax.training.sweep import sweep
from vpt_jax.training.sweep_table import write_tables
from vpt_jax.training.trials import Outcome, TaskRun, Trial, changed, run_trials

#: One protocol for all: AdamW, as many epochs, four rates a method, chosen on val. On four sets of 1000 images two CPU
#: cores get through it in about two hours; the published lengths are ten times longer.
PROTOCOL = {
    'optim.name': 'adamw', 'optim.schedule': 'cosine', 'optim.per_step': True, 'train.epochs': 10,
    'train.warmup_epochs': 1, 'train.batch_size': 8, 'sweep.weight_decay': (0.001,), 'optim.decay_biases': False,
    'optim.head_weight_decay': None, 'head.start': 'kaiming',
}  # fmt: skip
_FIVE = {'method.num_tokens': 5}
_PAIR = {'method.vpt.num_tokens': 5}
_LARGE, _MIDDLE = (8.0, 2.0, 0.5, 0.125), (2.0, 0.5, 0.125, 0.03)
#: What is compared: rates (for a batch of 256), and settings that fit a network of 16 patches. Of each a config.
RECIPES: dict[str, tuple[tuple[float, ...], dict]] = {
    'linear': ((32.0, 8.0, 2.0, 0.5), {}),
    'mlp': (_MIDDLE, {}),
    'vpt_shallow': (_LARGE, _FIVE),
    'vpt_deep': (_LARGE, _FIVE),
    'vapt': (_MIDDLE, _FIVE),
    'spt': (_LARGE, _FIVE),
    'cvpt': (_LARGE, _FIVE),
    'pgn': ((0.5, 0.125, 0.03, 0.008), _FIVE),
    'iip': (_LARGE, _FIVE),
    'vp': (_LARGE, {'method.size': 8}),
    'ap': (_LARGE, {}),
    'norm': (_LARGE, {}),
    'lora': (_MIDDLE, {}),
    'bias': (_LARGE, {}),
    'adapter': (_MIDDLE, {}),
    'partial': ((0.25, 0.06, 0.015, 0.004), {}),
    'full': ((0.06, 0.015, 0.004, 0.001), {}),
    'prompt_bias': (_MIDDLE, _PAIR),
    'cls_prompt': (_LARGE, _PAIR),
}
#: Not a method but the yardstick with all it can get: the published protocol, 40 settings and 100 epochs of SGD.
PUBLISHED_LINEAR = 'linear_published'
#: VPT-deep of which a share stays, tuned for as many epochs again at the same rate (the accuracy of that counts).
CONDENSED = {'condensed_30': 0.3}
METHODS = (*RECIPES, *CONDENSED, PUBLISHED_LINEAR)
_GROUP = 'local sets'


def find_sets(folder: str | None, wanted: list[str]) -> dict[str, str]:
    """Dataset names of the sets in a folder.

    Args:
      folder: with `.npz` files and image folders; None if only `digits` is wanted.
      wanted: names of some of them, or `digits`; empty for all.

    Returns:
      Dataset names as `data.load` takes them, by the set's name.

    Raises:
      UsageError: there is no such folder, or no such set.
    """
    found = {'digits': 'digits'}
    if folder is not None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UsageError(f'--data={folder} is no folder: give one with .npz files or image folders')
        found |= {path.stem: f'npz:{path}' for path in sorted(root.glob('*.npz'))}
        found |= {path.name: f'folder:{path}' for path in sorted(root.iterdir()) if _has_image_folders(path)}
    for name in wanted:
        if name not in found:
            raise unknown('set', name, found)
    names = wanted or [name for name in found if folder is None or name != 'digits']
    if not names:
        raise UsageError(f'--data={folder} has neither .npz files nor image folders')
    return {name: found[name] for name in names}


def _has_image_folders(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith('.') and any(sub.is_dir() for sub in path.iterdir())


def comparison(by_method: dict[str, list[dict]]) -> str:
    """Markdown: a line a method, with mean and deviation over seeds of the test accuracy in per cent on every set.

    The last column has the rates that were chosen, in the order of the sets.

    Args:
      by_method: what `sweep` returned, all for the same sets.
    """
    tasks = [f'{row["task"]} ({row["classes"]})' for row in next(iter(by_method.values()))]
    lines = [f'| method | trained | {" | ".join(tasks)} | mean | rates |', '| --- |' + ' --- |' * (len(tasks) + 3)]
    for method, rows in by_method.items():
        accuracies = [100 * np.array(row['test_accuracies']) for row in rows]
        cells = [f'{values.mean():.2f} ± {values.std():.2f}' for values in accuracies]
        trained = f'{rows[0]["trained_parameters"]:,}'
        mean = np.mean([values.mean() for values in accuracies])
        rates = ', '.join(f'{row["chosen"]["optim.lr"]:g}' for row in rows)
        lines.append(f'| {method} | {trained} | {" | ".join(cells)} | {mean:.2f} | {rates} |')
    return '\n'.join(lines) + '\n'


def config_of(method: str, backbone: str, epochs: int | None = None) -> ConfigDict:
    """The config of a method of `RECIPES`, or `PUBLISHED_LINEAR`, with the protocol in it.

    Raises:
      UsageError: there is no such method.
    """
    if method not in METHODS:
        raise unknown('method', method, METHODS)
    published = method == PUBLISHED_LINEAR
    kind = 'linear' if published else 'vpt_deep' if method in CONDENSED else method
    module = importlib.import_module(f'configs.{kind}')
    # Any set but `digits` will do here: the short recipe of that one is not the protocol.
    config = changed(module.get_config(f'dataset=npz:none,backbone={backbone}'), {'train.eval_batch_size': 64})
    if published:
        return config
    rates, settings = RECIPES[kind]
    lengths = {} if epochs is None else {'train.epochs': epochs}
    return changed(config, {**PROTOCOL, 'sweep.lr': rates, **settings, **lengths})


def condensed_trials(keep: float, run: TaskRun, trials: Sequence[Trial]) -> Iterator[Outcome]:
    """Runs trials of VPT, each condensed to a share of its prompts and tuned: an executor of `vpt_jax.training.sweep`.

    What a trial trains on ranks its prompts; what it is scored on has no part in that.
    """
    for outcome in run_trials(run, trials):
        trial = outcome.trial
        if outcome.trained_parameters is None:
            yield outcome
            continue
        folder = run.folder / 'runs' / trial.key
        trained, epochs = load_trained(folder, run.backbone), run.config.train.epochs
        try:
            *_, row = tune(trained, run.dataset_of(trial), [keep], folder / 'condensed', epochs=epochs)
            yield Outcome(trial, row['accuracy'], row['trained_parameters'])
        except DivergedError:
            yield Outcome(trial, 0.0, None)


def main(
    data: str | None, sets: list[str], methods: list[str], seeds: str, backbone: str, workdir: str, epochs: int | None
) -> None:
    """Runs everything; prints each table as it grows, and the comparison at the end."""
    tasks = {dataset: _GROUP for dataset in find_sets(data, sets).values()}
    network = load_backbone(backbone)
    by_method: dict[str, list[dict]] = {}
    for method in METHODS if methods == ['all'] else methods:
        config = config_of(method, backbone, epochs)
        folder = Path(workdir) / method

        def report(results: list[dict], method=method, folder=folder) -> None:
            print('\n' + write_tables(folder, results, f'{method}, {backbone}'), flush=True)

        execute = functools.partial(condensed_trials, CONDENSED[method]) if method in CONDENSED else linear_trials
        by_method[method] = sweep(
            config, tasks, folder, seeds=read_seeds(seeds), backbone=network, report=report, execute=execute
        )
    text = comparison(by_method)
    for name, content in (('results.md', text), ('results.json', json.dumps(by_method, indent=2) + '\n')):
        with atomic.replacing(Path(workdir) / name) as file:
            file.write(content.encode())
    print(text)


def _flags() -> list[flags.FlagHolder]:
    text, names = flags.DEFINE_string, flags.DEFINE_list
    return [
        text('data', None, 'folder of .npz files and image folders'),
        names('sets', [], 'names of some of them, or digits; by default all'),
        names('methods', ['linear', 'vpt_deep', 'vapt'], f'of {", ".join(METHODS)}; or all'),
        text('seeds', '3', 'how many of the published seeds, or a list of seeds'),
        text('backbone', 'tiny_vit64', 'backbone of every run'),
        text('workdir', 'runs/offline', 'everything is written here'),
        flags.DEFINE_integer('epochs', None, 'instead of the ten of the protocol', lower_bound=2),
    ]


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags())
