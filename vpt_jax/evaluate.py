"""Scores a trained prompt on a dataset: `python -m vpt_jax.evaluate --prompt=RUN --dataset=folder:PATH`."""

import json as json_format

from absl import flags

from vpt_jax import cli, data
from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown
from vpt_jax.training.inference import Predictor, check_classes, load_trained

SPLITS = ('train', 'val', 'test', 'all')


def main(
    prompt: str, dataset: str, backbone: str | None, split: str, batch_size: int, precision: str, on_bad_image: str,
    json: str | None,
) -> None:  # fmt: skip
    """Prints the accuracy and a table of the classes, worst first; the flags' help says what the arguments are."""
    if split not in SPLITS:
        raise unknown('split', split, SPLITS)
    trained = load_trained(prompt, backbone)
    # The seed of training: a dataset without splits of its own is cut as it was then, so that test stays test.
    read = data.load(dataset, trained.preprocess, seed=trained.seed, on_bad_image=on_bad_image)
    check_classes(trained, read)
    examples = _examples(read, split)
    scores = Predictor(trained, batch_size, precision).scores(examples)
    for name in read.unreadable:
        print(f'left out, unreadable: {name}')
    print(
        f'accuracy {100 * scores["accuracy"]:.2f}% (mean per class {100 * scores["mean_class_accuracy"]:.2f}%) on '
        f'{scores["examples"]} examples, {scores["images_per_second"]:.0f} images/s'
    )
    print(_table(scores['per_class']))
    if json:
        record = {'prompt': prompt, 'dataset': dataset, 'split': split, 'backbone': trained.backbone.name, **scores,
                  'unreadable': list(read.unreadable)}  # fmt: skip
        with atomic.replacing(json) as file:
            file.write((json_format.dumps(record, indent=2) + '\n').encode())


def _examples(dataset: data.Dataset, split: str) -> data.Split:
    parts = [getattr(dataset, name) for name in ('train', 'val', 'test') if split in (name, 'all')]
    parts = [part for part in parts if len(part)]
    if not parts:
        have = [name for name in ('train', 'val', 'test') if len(getattr(dataset, name))]
        raise UsageError(f'{dataset.name} has no {split} examples: choose --split={"|".join([*have, "all"])}')
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.joined(part)
    return whole


def _table(rows: list[dict]) -> str:
    """One line a class, the worst recognised first; classes without examples last."""
    worst_first = sorted(rows, key=lambda row: (row['accuracy'] is None, row['accuracy'] or 0.0, -row['examples']))
    width = max(5, *(len(row['class']) for row in rows))
    lines = [f'{"class":{width}}  accuracy  correct  examples']
    for row in worst_first:
        share = '-' if row['accuracy'] is None else f'{100 * row["accuracy"]:.2f}%'
        lines.append(f'{row["class"]:{width}}  {share:>8}  {row["correct"]:7d}  {row["examples"]:8d}')
    return '\n'.join(lines)


def _flags() -> list[flags.FlagHolder]:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    return [
        text('prompt', None, "a run's folder, or its prompt.safetensors or prompt.json", required=True),
        text('dataset', None, 'digits, folder:PATH or npz:PATH', required=True),
        text('backbone', None, 'name or path of the backbone; by default the name in the prompt file'),
        text('split', 'test', 'train, val, test or all'),
        number('batch_size', 64, 'images at a time'),
        text('precision', 'auto', 'auto (bfloat16 on accelerators, else float32), float32 or bfloat16'),
        text('on_bad_image', 'stop', 'stop, or skip to leave unreadable images out'),
        text('json', None, 'write everything that is printed to this file too'),
    ]


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags())
