"""Compares methods on small datasets over the embedded backbone, without a network.

    python -m experiments.offline --sets=digits,folder:PATH,npz:FILE --methods=linear,vpt_deep,vapt --seeds=3

Every run has a folder under --workdir and is resumed or skipped when the command is given again. `linear` is the probe
with its rate chosen on the validation split (`vpt_jax.training.probe`), so it has the better of the published protocol;
other methods are `configs/METHOD.py` with what `RECIPES` says. The table is written as markdown and json.
"""

import importlib
import json
import re
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from vpt_jax import cli
from vpt_jax.models.zoo import load_backbone
from vpt_jax.training import config as configs
from vpt_jax.training import loop
from vpt_jax.training.probe import linear_probe

SETS = flags.DEFINE_list('sets', 'digits', 'Datasets: digits, folder:PATH, npz:FILE.')
METHODS = flags.DEFINE_list('methods', 'linear,vpt_deep,vapt', 'Names of files in configs/.')
SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds 0 to this number less one.', lower_bound=1)
BACKBONE = flags.DEFINE_string('backbone', 'tiny_vit64', 'Backbone of every run.')
WORKDIR = flags.DEFINE_string('workdir', 'runs/offline', 'All runs and the tables go here.')

#: Rates were picked on `digits` (VAPT) and `hds_orient8` (VPT-deep), once for all datasets; lengths by what two CPU
#: cores do in an hour. On so small a network the published SGD takes deep prompts about twice as many epochs as AdamW.
RECIPES = {
    'vpt_deep': {'optim.name': 'adamw', 'optim.lr': 1.0, 'train.batch_size': 8, 'train.epochs': 15},
    'vapt': {'optim.lr': 0.5, 'train.batch_size': 4, 'train.epochs': 12},
}
#: The embedded default task gets more.
EPOCHS_ON_DIGITS = {'vpt_deep': 30, 'vapt': 24}


def short_name(dataset: str) -> str:
    """A dataset's name for tables and folders: `folder:/x/cifar10` is `cifar10`."""
    return re.sub(r'\.npz$', '', dataset.rsplit('/', 1)[-1].rsplit(':', 1)[-1])


def one_run(dataset: str, method: str, seed: int, workdir: Path) -> dict:
    """Runs one method once, or reads what an earlier call left: its accuracy in [0, 1], parameters and rate."""
    folder = workdir / short_name(dataset) / f'{method}-{seed}'
    done = folder / 'row.json'
    if done.exists():
        return json.loads(done.read_text())
    config = importlib.import_module(f'configs.{method}').get_config(f'dataset={dataset},backbone={BACKBONE.value}')
    config.seed = seed
    if method == 'linear':
        backbone = load_backbone(config.backbone)
        preprocess = loop.default_preprocess(backbone)
        data = loop.data.load(dataset, preprocess, seed=seed)
        probe = linear_probe(backbone, data, preprocess, seed=seed)
        row = {'accuracy': probe['test_accuracy'], 'parameters': probe['trained_parameters'], 'rate': None}
    else:
        config.update_from_flattened_dict({**RECIPES.get(method, {}), 'train.eval_batch_size': 64})
        if dataset == 'digits':
            config.train.epochs = EPOCHS_ON_DIGITS.get(method, config.train.epochs)
        config.train.warmup_epochs = min(2, config.train.epochs - 1)
        metrics = configs.run(config, folder)[0].metrics
        row = {'accuracy': metrics['test_accuracy'], 'parameters': metrics['trained_parameters'],
               'rate': metrics['train_images_per_second']}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(row))
    return row


def table(rows: dict[str, dict[str, list[dict]]], methods: list[str]) -> str:
    """Markdown: a line a dataset, mean and standard deviation over seeds of the test accuracy in percent."""
    lines = ['| dataset | ' + ' | '.join(methods) + ' |', '| --- |' + ' --- |' * len(methods)]
    for name, by_method in rows.items():
        cells = []
        for method in methods:
            accuracy = 100 * np.array([row['accuracy'] for row in by_method[method]])
            cells.append(f'{accuracy.mean():.2f} ± {accuracy.std():.2f}')
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def main(_) -> None:
    """Runs everything, prints and writes the table after each dataset."""
    logging.set_verbosity(logging.WARNING)
    workdir = Path(WORKDIR.value)
    rows: dict[str, dict[str, list[dict]]] = {}
    for dataset in SETS.value:
        by_method = rows.setdefault(short_name(dataset), {})
        for method in METHODS.value:
            by_method[method] = [one_run(dataset, method, seed, workdir) for seed in range(SEEDS.value)]
        (workdir / 'results.json').write_text(json.dumps(rows, indent=2) + '\n')
        (workdir / 'results.md').write_text(table(rows, METHODS.value))
        print(table(rows, METHODS.value), flush=True)


if __name__ == '__main__':
    app.run(lambda argv: cli.guarded(lambda: main(argv))())
