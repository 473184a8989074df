"""`lists:PATH`: images named in text files, `path label` a line.

PATH is a folder with one of these sets of lists, or a single list:

    train800.txt, val200.txt, test.txt      the form in which VTAB-1k's tasks circulate; train800val200.txt is the first
                                            two together and is read only where they are missing
    train.txt, val.txt, test.txt            val and test may be missing, as in a `folder:` dataset
    any.txt                                 split by seed: 80 % train, 10 % val, 10 % test, stratified by class

A label is a whole number counted from 0, the last word of its line; the path before it is relative to the list's folder
or to `images/` in it, or absolute. Empty lines are passed over. `classes.txt` beside the lists, one name a line, gives
the classes names; without it they are called by their numbers.
"""

import pathlib

import numpy as np

from vpt_jax.data.cache import keep
from vpt_jax.data.dataset import Dataset, Reading
from vpt_jax.data.decode import Examples, image_files
from vpt_jax.data.preprocess import Preprocess
from vpt_jax.data.stratify import eight_one_one
from vpt_jax.errors import UsageError

SPLITS = ('train', 'val', 'test')
#: Names of the lists of train, val and test, the first that are there are read.
LAYOUTS = (('train800', 'val200', 'test'), ('train', 'val', 'test'), ('train800val200', 'val200', 'test'))


def read(argument: str, preprocess: Preprocess, how: Reading) -> Dataset:
    """Reads lists; see the module's docstring for the forms and `dataset.load` for the arguments.

    Raises:
      UsageError: for a path without lists, a line that is not `path label`, labels that do not fit `classes.txt`, or an
        unreadable image (unless skipped).
    """
    path = pathlib.Path(argument).expanduser()
    root = path.parent if path.is_file() else path
    parts = {'train': _parse(path)} if path.is_file() else split_lists(path)
    if 'test' not in parts and 'val' in parts:  # a set that chose the settings is no test set
        parts['test'] = parts.pop('val')
    if 'test' not in parts:
        files, labels = parts['train']
        cut = zip(SPLITS, eight_one_one(labels, how.seed), strict=True)
        parts = {split: ([files[i] for i in index], labels[index]) for split, index in cut}
    names = class_names(root, np.concatenate([labels for _, labels in parts.values()]))
    return listed(f'lists:{argument}', names, parts, root, preprocess, how)


def split_lists(root: pathlib.Path) -> dict[str, tuple[list[pathlib.Path], np.ndarray]]:
    """Paths and labels of each split of a folder with lists.

    Raises:
      UsageError: if there are none.
    """
    for layout in LAYOUTS:
        if (root / f'{layout[0]}.txt').is_file():
            found = {split: root / f'{name}.txt' for split, name in zip(SPLITS, layout, strict=True)}
            if layout[0] == 'train800val200':  # val is part of it
                del found['val']
            return {split: _parse(path) for split, path in found.items() if path.is_file()}
    what = 'holds no train800.txt or train.txt' if root.is_dir() else 'does not exist'
    raise UsageError(
        f'list folder {root} {what}: give a folder with train.txt, val.txt and test.txt (lines `path label`), or one '
        'such file'
    )


def class_names(root: pathlib.Path, labels: np.ndarray, count: int | None = None) -> tuple[str, ...]:
    """Names from `classes.txt`, else numbers.

    Args:
      root: folder of `classes.txt`.
      labels: all labels.
      count: how many classes there are known to be; None for as many as the labels say.

    Raises:
      UsageError: for labels that do not fit.
    """
    path = root / 'classes.txt'
    names = None
    if path.is_file():
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    known = len(names) if names else count
    if len(labels) and (labels.min() < 0 or (known and labels.max() >= known)):
        fitting = f'0..{known - 1}' if known else 'numbers from 0'
        raise UsageError(f'labels of {root} run from {labels.min()} to {labels.max()}: expected {fitting}')
    if names is None:
        names = tuple(map(str, range(known or int(labels.max(initial=0)) + 1)))
    return names


def listed(
    name: str,
    classes: tuple[str, ...],
    parts: dict[str, tuple[list[pathlib.Path], np.ndarray] | Examples],
    root: pathlib.Path,
    preprocess: Preprocess,
    how: Reading,
    source: str = '',
) -> Dataset:
    """A dataset of image files.

    Args:
      name: of the dataset.
      classes: C names.
      parts: of `'train'`, `'val'` and `'test'`, those that there are: files with labels, or examples.
      root: a folder near them.
      preprocess, how: see `dataset.load`.
      source: see `Dataset`.

    Raises:
      UsageError: for an unreadable image (unless skipped), a train split without any that could be read, or labels that
        are no classes.
    """
    splits, unreadable = {}, ()
    for split in SPLITS:
        part = parts.get(split, ([], np.zeros(0, np.int64)))
        examples = part if isinstance(part, Examples) else image_files(*part, root)
        splits[split], bad = keep(examples, preprocess, how)
        unreadable += bad
        labels = splits[split].labels
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(classes)):
            raise UsageError(
                f'the {split} labels of {name} run from {labels.min()} to {labels.max()}, and it has {len(classes)} '
                'classes: these are other data, or another version of them'
            )
    if not len(splits['train']):
        raise UsageError(f'{name} has no training image that could be read')
    return Dataset(name, classes, **splits, unreadable=unreadable, source=source)


def _parse(path: pathlib.Path) -> tuple[list[pathlib.Path], np.ndarray]:
    """Paths and labels int64 [N] of one list."""
    files, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(' ')
        if not file or not label.isdecimal():
            raise UsageError(
                f'line {number} of {path} is {line.strip()[:80]!r}: expected `path label`, the label a whole number '
                'counted from 0'
            )
        files.append(file.strip())
        labels.append(int(label))
    # Decided by the first image: asking the disk about each would take longer than reading the list.
    inside = path.parent / 'images'
    base = inside if files and not (path.parent / files[0]).exists() and (inside / files[0]).exists() else path.parent
    return [base / file for file in files], np.array(labels, np.int64)
