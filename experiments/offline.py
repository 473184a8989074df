"""Compares methods on local image sets by the published protocol, without a network.

    python -m experiments.offline --data=SETS --methods=linear,vpt_deep,vapt --seeds=3

SETS is a folder of `.npz` files (see `vpt_jax.data.arrays`) and of image folders (see `vpt_jax.data.folder`); `--sets`
picks some of them, and may name `digits`, the embedded one. For every method and set the settings are chosen on val and
final runs on train and val are scored on test, as `vpt_jax.sweep` does on VTAB-1k; the grids are those of `RECIPES`.
It can be stopped and given again at any point. Tables are written as markdown, csv and json for each method, and one
for all of them.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

if __name__ == '__main__':  # also as `python experiments/offline.py`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from vpt_jax import cli
from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.zoo import load_backbone
from vpt_jax.sweep import read_seeds
from vpt_jax.training.sweep import sweep
from vpt_jax.training.sweep_table import write_tables
from vpt_jax.training.trials import changed

#: What differs from the configs in `configs/`: grids and lengths that two CPU cores get through in hours. On so small a
#: network the published SGD takes deep prompts about twice as many epochs as AdamW. `linear` is as published.
RECIPES = {
    'vpt_deep': {'optim.name': 'adamw', 'train.batch_size': 8, 'train.epochs': 15, 'train.warmup_epochs': 2,
                 'sweep.lr': (2.0, 1.0, 0.5), 'sweep.weight_decay': (0.001,)},
    'vapt': {'train.batch_size': 4, 'train.epochs': 12, 'train.warmup_epochs': 2,
             'sweep.lr': (1.0, 0.5, 0.25), 'sweep.weight_decay': (0.001,)},
}  # fmt: skip
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
    """Markdown: a line a set, mean and deviation over seeds of the test accuracy in per cent for every method."""
    methods = list(by_method)
    lines = ['| set | classes | ' + ' | '.join(methods) + ' |', '| --- | --- |' + ' --- |' * len(methods)]
    sums: dict[str, list[float]] = {method: [] for method in methods}
    for rows in zip(*by_method.values(), strict=True):
        cells = []
        for method, row in zip(methods, rows, strict=True):
            accuracy = 100 * np.array(row['test_accuracies'])
            sums[method].append(accuracy.mean())
            cells.append(f'{accuracy.mean():.2f} ± {accuracy.std():.2f}')
        lines.append(f'| {rows[0]["task"]} | {rows[0]["classes"]} | ' + ' | '.join(cells) + ' |')
    lines.append('| **mean** | | ' + ' | '.join(f'{np.mean(values):.2f}' for values in sums.values()) + ' |')
    return '\n'.join(lines) + '\n'


def main(
    data: str | None, sets: list[str], methods: list[str], seeds: str, backbone: str, workdir: str, epochs: int | None
) -> None:
    """Runs everything; prints each table as it grows, and the comparison at the end."""
    tasks = {dataset: _GROUP for dataset in find_sets(data, sets).values()}
    network = load_backbone(backbone)
    by_method: dict[str, list[dict]] = {}
    for method in methods:
        try:
            module = importlib.import_module(f'configs.{method}')
        except ModuleNotFoundError as error:
            known = [path.stem for path in (Path(__file__).parents[1] / 'configs').glob('*.py')]
            raise unknown('method', method, known) from error
        # Any set but `digits` will do here: the short recipe of that one is not the protocol.
        config = module.get_config(f'dataset=npz:none,backbone={backbone}')
        changes = {'train.eval_batch_size': 64, **RECIPES.get(method, {})}
        if epochs is not None and method != 'linear':
            warmup = min(changes.get('train.warmup_epochs', 1), epochs - 1)
            changes |= {'train.epochs': epochs, 'train.warmup_epochs': warmup}
        folder = Path(workdir) / method

        def report(results: list[dict], method=method, folder=folder) -> None:
            print('\n' + write_tables(folder, results, f'{method}, {backbone}'), flush=True)

        by_method[method] = sweep(
            changed(config, changes), tasks, folder, seeds=read_seeds(seeds), backbone=network, report=report
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
        names('methods', ['linear', 'vpt_deep', 'vapt'], 'names of files in configs/'),
        text('seeds', '3', 'how many of the published seeds, or a list of seeds'),
        text('backbone', 'tiny_vit64', 'backbone of every run'),
        text('workdir', 'runs/offline', 'everything is written here'),
        flags.DEFINE_integer('epochs', None, 'instead of the recipes, except for linear', lower_bound=2),
    ]


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags())
