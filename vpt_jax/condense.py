"""Keeps a share of a trained prompt and tunes it: `python -m vpt_jax.condense --prompt=RUN --keep=0.3[,0.5,...]`.

Prompts are ranked by what the loss would change without them (arXiv 2305.17223), the others are taken out of the
sequence, and what is kept is trained on with the head. Each ratio becomes a run's folder below --workdir, whose prompt
evaluate and predict read like any other. Prints a table, which table.json in --workdir holds too; a multiply-add is two
operations.
"""

import json
from pathlib import Path

from absl import flags

from vpt_jax import cli, data
from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown
from vpt_jax.training.condense import tune
from vpt_jax.training.inference import load_trained

RANKS = ('global', 'per_layer')


def main(
    prompt: str, keep: list[str], dataset: str | None, workdir: str | None, backbone: str | None, rank: str, score: str,
    epochs: int, lr: float | None, batch_size: int, precision: str, on_bad_image: str,
) -> None:  # fmt: skip
    """Condenses at every ratio of `keep`; the flags' help says what the arguments are."""
    if rank not in RANKS:
        raise unknown('ranking', rank, RANKS)
    trained = load_trained(prompt, backbone)
    name = dataset or trained.file.meta.get('dataset')
    if not name:
        raise UsageError(f'{prompt} does not say what it was trained on: give --dataset')
    read = data.load(name, trained.preprocess, seed=trained.seed, on_bad_image=on_bad_image)
    folder = Path(workdir or (Path(prompt) if Path(prompt).is_dir() else Path(prompt).parent) / 'condensed')
    rows = []
    for row in tune(trained, read, _ratios(keep), folder, score=score, per_layer=rank == 'per_layer', epochs=epochs,
                    base_lr=lr, batch_size=batch_size, precision=precision):  # fmt: skip
        rows.append(row)
    print(f'\n{rows[0]["split"]} split of {read.name}, {trained.backbone.name}; everything is in {folder}')
    print(_table(rows))
    record = {'prompt': str(prompt), 'dataset': name, 'rank': rank, 'score': score, 'epochs': epochs, 'rows': rows}
    with atomic.replacing(folder / 'table.json') as file:
        file.write((json.dumps(record, indent=2) + '\n').encode())


def _ratios(given: list[str]) -> list[float]:
    try:
        ratios = [float(text) for text in given]
    except ValueError as error:
        raise UsageError(
            f'--keep takes shares of the prompts such as 0.3 or 0.1,0.3,0.5, got {",".join(given)}'
        ) from error
    return list(dict.fromkeys(ratios))


def _table(rows: list[dict]) -> str:
    """One line a ratio, the prompt as it was trained first."""
    head = ('keep', 'prompts', 'accuracy', 'untuned', 'GFLOPs', 'images/s', 'per block')
    cells = [head]
    for i, row in enumerate(rows):
        untuned = row['accuracy_untuned']
        cells.append((
            f'{row["keep"]:g}' if i else 'all', str(row['prompts']), f'{100 * row["accuracy"]:.2f}%',
            '-' if untuned is None else f'{100 * untuned:.2f}%', f'{row["gflops"]:.3g}',
            f'{row["images_per_second"]:.0f}', ' '.join(map(str, row['per_block'])),
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)]
    return '\n'.join(
        '  '.join([*(f'{cell:>{w}}' for cell, w in zip(line[:-1], widths, strict=True)), line[-1]]) for line in cells
    )


def _flags() -> list[flags.FlagHolder]:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    return [
        text('prompt', None, "a run's folder, or its prompt.safetensors or prompt.json", required=True),
        flags.DEFINE_list('keep', ['0.3'], 'shares of the prompts to keep, in (0, 1], comma-separated'),
        text('dataset', None, 'what the prompt was trained on; by default what its file says'),
        text('workdir', None, "where the runs go; by default the folder 'condensed' beside the prompt"),
        text('backbone', None, 'name or path of the backbone; by default the name in the prompt file'),
        text('rank', 'global', 'global: over all blocks at once; per_layer: the same share of every block'),
        text(
            'score', 'taylor_token', 'taylor_token, taylor_token_samplemean, taylor_element, signed_taylor or grad_l2'
        ),
        number('epochs', 20, 'of fine-tuning'),
        flags.DEFINE_float('lr', None, 'base rate of fine-tuning; by default that of the run that trained the prompt'),
        number('batch_size', 64, 'images at a time while scoring and evaluating'),
        text('precision', 'auto', 'auto (bfloat16 on accelerators, else float32), float32 or bfloat16'),
        text('on_bad_image', 'stop', 'stop, or skip to leave unreadable images out'),
    ]


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags())
