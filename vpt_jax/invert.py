"""Turns prompts into pixels: `python -m vpt_jax.invert --prompt=RUN --out=DIR image.jpg folder/ ...`.

For every image, the trained prompts (PGN's are the image's own) become patches that are joined to it; the network as it
was, without any prompt, then gives the same scores. Arguments are as for predict. DIR gets, for each image, NAME.npz
with `canvas` [H, W, 3] and `patches` [K, p, p, 3], float32 on the scale of [0, 1] but not clipped to it, which is
lossless, and NAME.png, which is only to be looked at. inversion.json says how the canvas is to be used and holds
everything that is printed: whether inversion is exact, and how much scores change with pixels in [0, 1], and in 8 bits.
"""

import itertools
import json
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from vpt_jax import cli
from vpt_jax.checkpoints import atomic
from vpt_jax.predict import decode_chunks, list_images, name_unreadable
from vpt_jax.training.inference import load_trained
from vpt_jax.training.inversion import Inverter

_VARIANTS = ('exact', 'clipped', 'rounded')


def main(
    *images: str, prompt: str, out: str, backbone: str | None, positions: str, rounds: int, least_squares: bool,
    batch_size: int,
) -> int:  # fmt: skip
    """Writes every image's prompts as pixels; the flags' help says what the arguments are. Returns the exit code."""
    paths = list_images(images)
    trained = load_trained(prompt, backbone)
    inverter = Inverter(trained, positions, rounds, batch_size, least_squares)
    print(_condition(inverter))
    folder, rows, taken = Path(out), [], set()
    for chunk, found, kept in decode_chunks(paths, trained.preprocess, batch_size):
        name_unreadable(chunk, kept)
        if not kept:
            continue
        views = np.stack([trained.preprocess.eval_view(image) for image in found])
        inverted = inverter(views)
        previews = inverter.preview(views, inverted.patches)
        for i, (path, preview) in enumerate(zip((chunk[j] for j in kept), previews, strict=True)):
            name = _free_name(Path(path).stem, taken)
            with atomic.replacing(folder / f'{name}.npz') as file:
                np.savez(file, canvas=inverted.canvas[i], patches=inverted.patches[i])
            with atomic.replacing(folder / f'{name}.png') as file:
                Image.fromarray(preview).save(file, 'png')
            row = {'path': path, 'name': name, 'residual': float(inverted.residual[i].max()),
                   'outside': float(inverted.outside[i])}  # fmt: skip
            row |= {f'difference_{v}': float(inverted.difference(v)[i]) for v in _VARIANTS}
            row |= {f'same_class_{v}': bool(inverted.agrees(v)[i]) for v in _VARIANTS}
            rows.append(row)
            print(_line(row))
    if not rows:
        return 2
    print(_summary(rows, folder))
    with atomic.replacing(folder / 'inversion.json') as file:
        file.write((json.dumps({**_described(inverter, prompt), 'images': rows}, indent=2) + '\n').encode())
    return 0


def _free_name(stem: str, taken: set[str]) -> str:
    """The stem, numbered where images in several folders have one name."""
    names = itertools.chain([stem], (f'{stem}-{i}' for i in itertools.count(2)))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def _condition(inverter: Inverter) -> str:
    inverse = inverter.inverse
    numbers, width = inverse.matrix.shape
    found = 'every prompt can be made of pixels' if inverse.exact else 'prompts can only be approached'
    p = inverse.patch_size
    return (
        f'patches of {p} x {p} x 3 = {numbers} numbers, tokens of width {width}, rank {inverse.rank}: {found}; '
        f'condition number {inverse.condition:.3g}'
    )


def _line(row: dict) -> str:
    differences = ', '.join(f'{v} {row[f"difference_{v}"]:.1e}' for v in _VARIANTS)
    return (
        f'{row["path"]}\tscores differ: {differences}; {100 * row["outside"]:.1f}% of pixels outside [0, 1]; residual '
        f'{row["residual"]:.1e}'
    )


def _summary(rows: list[dict], folder: Path) -> str:
    lines = [
        f'{v}: scores differ by at most {max(row[f"difference_{v}"] for row in rows):.1e}, same class for '
        f'{sum(row[f"same_class_{v}"] for row in rows)} of {len(rows)} images'
        for v in _VARIANTS
    ]
    return '\n'.join([*lines, f'everything is in {folder}'])


def _described(inverter: Inverter, prompt: str) -> dict:
    """How canvases are to be used, and by which network."""
    trained, inverse = inverter.trained, inverter.inverse
    return {
        'prompt': str(prompt),
        'backbone': trained.backbone.name,
        'mean': list(trained.preprocess.mean),
        'std': list(trained.preprocess.std),
        'window_rows': inverter.model.window_rows,
        'window_columns': inverter.model.window_columns,
        'positions': 'zeros' if inverter.index is None else inverter.index.tolist(),
        'exact': inverse.exact,
        'rank': inverse.rank,
        'width': inverse.matrix.shape[1],
        'numbers': inverse.matrix.shape[0],
        'condition': inverse.condition,
    }


def _flags() -> list[flags.FlagHolder]:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    return [
        text('prompt', None, "a run's folder, or its prompt.safetensors or prompt.json", required=True),
        text('out', None, 'the folder to write to', required=True),
        text('backbone', None, 'name or path of the backbone; by default the name in the prompt file'),
        text('positions', 'none', 'of the new patches: none, or index, those of the last patches of the image'),
        number('rounds', 0, 'how often to move pixels towards [0, 1] as far as it changes no score'),
        flags.DEFINE_bool('least_squares', False, 'go on where prompts can only be approached, and scores change'),
        number('batch_size', 16, 'images at a time'),
    ]


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags(), takes_arguments=True)
