"""Sets of files in the layouts in which their authors distribute them, unpacked.

A reader takes the unpacked folder and gives paths and class ids of train, test and, where there is an official one,
val. `READERS` has one a layout; `vpt_json` and `coop_json` read annotation files that others wrote for several sets.
"""

import csv
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from vpt_jax.errors import UsageError

#: Paths and class ids int64 [N] of each split.
Parts = dict[str, tuple[list[pathlib.Path], np.ndarray]]


def birds(root: pathlib.Path) -> Parts:
    """CUB-200-2011 and NABirds: images.txt, image_class_labels.txt, train_test_split.txt, images/."""
    names, classes, training = (
        dict(line.split(maxsplit=1) for line in (root / f'{name}.txt').read_text().splitlines() if line.strip())
        for name in ('images', 'image_class_labels', 'train_test_split')
    )
    parts: Parts = {}
    for split, flag in (('train', '1'), ('test', '0')):
        keys = [key for key in names if training[key].strip() == flag]
        files = [root / 'images' / names[key].strip() for key in keys]
        parts[split] = files, np.array([int(classes[key]) for key in keys], np.int64)
    return parts


def flowers(root: pathlib.Path) -> Parts:
    """Oxford Flowers 102: jpg/image_00001.jpg, imagelabels.mat, setid.mat with the official validation set."""
    classes = _mat(root / 'imagelabels.mat')['labels'].ravel().astype(np.int64)
    sets = _mat(root / 'setid.mat')
    parts: Parts = {}
    for split, key in (('train', 'trnid'), ('val', 'valid'), ('test', 'tstid')):
        numbers = sets[key].ravel().astype(np.int64)
        parts[split] = [root / 'jpg' / f'image_{n:05d}.jpg' for n in numbers], classes[numbers - 1]
    return parts


def dogs(root: pathlib.Path) -> Parts:
    """Stanford Dogs: Images/, train_list.mat and test_list.mat (in the root or in lists/)."""
    parts: Parts = {}
    for split in ('train', 'test'):
        lists = _mat(_first(root, f'{split}_list.mat', f'lists/{split}_list.mat'))
        files = [root / 'Images' / str(name.item()) for name in lists['file_list'].ravel()]
        parts[split] = files, lists['labels'].ravel().astype(np.int64)
    return parts


def cars(root: pathlib.Path) -> Parts:
    """Stanford Cars: cars_train/, cars_test/, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat."""
    annotations = {
        'train': _first(root, 'devkit/cars_train_annos.mat', 'cars_train_annos.mat'),
        'test': _first(root, 'cars_test_annos_withlabels.mat', 'devkit/cars_test_annos_withlabels.mat'),
    }
    parts: Parts = {}
    for split, path in annotations.items():
        rows = _mat(path)['annotations'].ravel()
        files = [root / f'cars_{split}' / str(row['fname'].item()) for row in rows]
        parts[split] = files, np.array([int(row['class'].item()) for row in rows], np.int64)
    return parts


def gtsrb(root: pathlib.Path) -> Parts:
    """GTSRB: Final_Training/Images/00000/GT-00000.csv beside its images, Final_Test/Images/, GT-final_test.csv."""
    parts: Parts = {}
    tables = sorted((root / 'Final_Training' / 'Images').glob('*/GT-*.csv'))
    if not tables:
        raise UsageError(
            f'{root} has no Final_Training/Images/*/GT-*.csv: unpack GTSRB_Final_Training_Images.zip there'
        )
    test = _first(root, 'GT-final_test.csv', 'Final_Test/Images/GT-final_test.csv', '../GT-final_test.csv')
    for split, found in (('train', tables), ('test', [test])):
        files, classes = [], []
        for table in found:
            folder = table.parent if split == 'train' else root / 'Final_Test' / 'Images'
            with open(table, newline='') as file:
                for row in csv.DictReader(file, delimiter=';'):
                    files.append(folder / row['Filename'])
                    classes.append(int(row['ClassId']))
        parts[split] = files, np.array(classes, np.int64)
    return parts


def vpt_json(root: pathlib.Path, images: str) -> Parts:
    """VPT's annotation files: train.json, val.json, test.json of {file: class id}, files relative to `images`."""
    parts: Parts = {}
    for split in ('train', 'val', 'test'):
        entries = _json(root / f'{split}.json')
        if not isinstance(entries, dict):
            raise UsageError(f'{root / f"{split}.json"} must be an object of file names and class ids')
        ids = np.array([int(number) for number in entries.values()], np.int64)
        parts[split] = [root / images / name for name in entries], ids
    return parts


def coop_json(root: pathlib.Path, split_file: str, images: str) -> Parts:
    """CoOp's split files: {train, val, test} of [file, label, class name], files relative to `images`."""
    entries = _json(root / split_file)
    try:
        return {
            split: ([root / images / row[0] for row in entries[split]],
                    np.array([int(row[1]) for row in entries[split]], np.int64))
            for split in ('train', 'val', 'test')
        }  # fmt: skip
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UsageError(f'{root / split_file} is no split file of CoOp: expected lists train, val and test of '
                         '[file, label, class name]') from error  # fmt: skip


#: Layouts of archives: how to recognise one (files that must be there), and its reader.
READERS: dict[str, tuple[tuple[str, ...], Callable[[pathlib.Path], Parts]]] = {
    'birds': (('images.txt', 'image_class_labels.txt', 'train_test_split.txt', 'images'), birds),
    'flowers': (('imagelabels.mat', 'setid.mat', 'jpg'), flowers),
    'dogs': (('Images',), dogs),
    'cars': (('cars_train', 'cars_test'), cars),
    'gtsrb': (('Final_Training',), gtsrb),
}


def _first(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UsageError(f'{root} lacks {names[0]}, which the official distribution has: unpack it there')


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f'cannot read the annotation file {path} ({error})') from error


def _mat(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file."""
    from scipy.io import loadmat

    try:
        return loadmat(path)
    except Exception as error:  # scipy raises whatever its parser runs into
        raise UsageError(f'cannot read the MATLAB file {path} ({" ".join(str(error).split())[:120]})') from error
