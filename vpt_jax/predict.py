"""Names what is in images by a trained prompt: `python -m vpt_jax.predict --prompt=RUN image.jpg folder/ ...`.

Arguments are image files, folders (walked, in name order), or `-` for a list of paths on stdin, one a line. Each image
gives one line of tab-separated fields: its path, then the most probable classes as `class probability`. Images that
cannot be read are named on stderr and the run goes on; it exits with 2 if none could be read, and with --strict with 1
if any could not.
"""

import contextlib
import json as json_format
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags
from PIL import Image

from vpt_jax import cli
from vpt_jax.checkpoints import atomic
from vpt_jax.data import Preprocess
from vpt_jax.data.decode import decode_all
from vpt_jax.data.folder import EXTENSIONS
from vpt_jax.errors import UsageError
from vpt_jax.training.inference import Predictor, load_trained, top_classes


def main(
    *images: str, prompt: str, backbone: str | None, top: int, batch_size: int, precision: str, strict: bool,
    json: str | None,
) -> int:  # fmt: skip
    """Prints a line an image; the flags' help says what the arguments are. Returns the exit code."""
    if top < 1:
        raise UsageError(f'--top must be >= 1, got {top}')
    paths = list_images(images)
    trained = load_trained(prompt, backbone)
    predictor = Predictor(trained, batch_size, precision)
    unreadable: list[str] = []
    records = []
    with contextlib.closing(cli.ImageCounter(len(paths))) as progress:
        for chunk, decoded, kept in decode_chunks(paths, trained.preprocess, predictor.batch_size):
            unreadable += name_unreadable(chunk, kept)
            best = top_classes(predictor.probabilities(decoded), trained.class_names, top)
            for i, classes in zip(kept, best, strict=True):
                print('\t'.join([chunk[i], *(f'{name} {p:.4f}' for name, p in classes)]))
                records.append({'path': chunk[i], 'top': [{'class': n, 'probability': p} for n, p in classes]})
            progress.add(len(chunk))
    if json:
        with atomic.replacing(json) as file:
            text = json_format.dumps({'images': records, 'unreadable': unreadable}, indent=2)
            file.write(f'{text}\n'.encode())
    if unreadable:
        sys.stdout.flush()
        print(f'{len(unreadable)} of {len(paths)} images could not be read', file=sys.stderr, flush=True)
    if not records:
        return 2
    return 1 if strict and unreadable else 0


def list_images(arguments: Sequence[str]) -> list[str]:
    """The image paths that the arguments stand for.

    Args:
      arguments: files, which need not exist; folders, walked in name order for files that are named as images (hidden
        ones are passed over); `-` for lines of stdin.

    Raises:
      UsageError: no image at all.
    """
    paths = []
    for argument in arguments:
        if argument == '-':
            paths += [line.rstrip('\r\n') for line in sys.stdin if line.strip()]
        elif Path(argument).is_dir():
            paths += _walk(argument)
        else:
            paths.append(argument)
    if not paths:
        given = ' '.join(arguments) or 'nothing'
        raise UsageError(f'no image to look at: give image files, folders of images, or - for a list (got {given})')
    return paths


def _walk(root: str) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith('.'))
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith('.'):
                yield os.path.join(folder, name)


def name_unreadable(chunk: list[str], kept: list[int]) -> list[str]:
    """The paths of a chunk that are not among the kept ones, each of which is named on stderr."""
    unreadable = [path for i, path in enumerate(chunk) if i not in kept]
    for path in unreadable:
        why = 'not an image, or damaged' if Path(path).exists() else 'no such file'
        print(f'cannot read {path}: {why}', file=sys.stderr, flush=True)
    return unreadable


def decode_chunks(
    paths: list[str], preprocess: Preprocess, size: int
) -> Iterator[tuple[list[str], Sequence, list[int]]]:
    """(paths, decoded images, indices of the readable ones) of each chunk; the next is decoded in the meantime."""

    def decode(chunk: list[str]):
        def open_image(i: int) -> Image.Image:
            with Image.open(chunk[i]) as image:
                image.load()
                return image

        decoded, kept, _ = decode_all(open_image, chunk, preprocess, 'skip')
        return chunk, decoded, kept.tolist()

    chunks = [paths[i : i + size] for i in range(0, len(paths), size)]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(decode, chunks[0])
        for following in [*chunks[1:], None]:
            done = ahead.result()
            if following is not None:
                ahead = pool.submit(decode, following)
            yield done


def _flags() -> list[flags.FlagHolder]:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    return [
        text('prompt', None, "a run's folder, or its prompt.safetensors or prompt.json", required=True),
        text('backbone', None, 'name or path of the backbone; by default the name in the prompt file'),
        number('top', 5, 'how many classes to name'),
        number('batch_size', 64, 'images at a time'),
        text('precision', 'auto', 'auto (bfloat16 on accelerators, else float32), float32 or bfloat16'),
        flags.DEFINE_bool('strict', False, 'exit with 1 if any image could not be read'),
        text('json', None, 'write the result to this file too'),
    ]


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags(), takes_arguments=True)
