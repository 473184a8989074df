"""`folder:PATH`: images in folders named after their classes.

Two layouts are read:

    PATH/{train,val,test}/<class>/*.jpg     the splits as given
    PATH/<class>/*.jpg                      split by seed: 80 % train, 10 % val, 10 % test, stratified by class

In the first, `val` may also be called `valid` or `validation`. Without `test`, the `val` folder is the test split and
val is empty (a set that chose the settings is no test set); without both, train is split as in the second layout.
Classes are the sorted folder names of train. Files are taken in name order, by extension (jpg, jpeg, png, webp, bmp in
any case); hidden files and folders are passed over; symbolic links are followed.
"""

import pathlib

import numpy as np

from vpt_jax.data.cache import keep
from vpt_jax.data.dataset import Dataset, Reading
from vpt_jax.data.decode import image_files
from vpt_jax.data.preprocess import Preprocess
from vpt_jax.data.stratify import eight_one_one
from vpt_jax.errors import UsageError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')
_SPLITS = {'train': ('train',), 'val': ('val', 'valid', 'validation'), 'test': ('test',)}


def read(argument: str, preprocess: Preprocess, how: Reading) -> Dataset:
    """Reads an image folder; see the module's docstring for the layouts and `dataset.load` for the arguments.

    Raises:
      UsageError: for a path that is no folder, a layout that is neither of the two, a split with a class that train
        lacks, an empty class or an unreadable image (unless skipped), or a class of which no image could be read.
    """
    root = pathlib.Path(argument).expanduser()
    if not root.is_dir():
        what = 'is a file, not a folder' if root.exists() else 'does not exist'
        raise UsageError(f'dataset folder {argument} {what}: give the folder that holds train/ or the class folders')
    folders = _split_folders(root)
    listings = {split: _list_classes(folder, how.on_empty_class) for split, folder in folders.items()}
    if not listings['train']:
        raise UsageError(
            f'dataset folder {argument} holds no class folder with images: expected {argument}/train/<class>/*.jpg '
            f'or {argument}/<class>/*.jpg ({", ".join(EXTENSIONS)})'
        )
    classes = tuple(sorted(listings['train']))
    for split, listing in listings.items():
        strangers = sorted(set(listing) - set(classes))
        if strangers:
            raise UsageError(
                f'{folders[split]} has classes that {folders["train"]} lacks: {_some(strangers)}; every class needs '
                'training images'
            )
    files = {split: _examples(listing, classes) for split, listing in listings.items()}
    if 'test' not in files and 'val' in files:
        files['test'] = files.pop('val')
    if 'test' not in files:
        paths, labels = files['train']
        parts = zip(_SPLITS, eight_one_one(labels, how.seed), strict=True)
        files = {split: ([paths[i] for i in index], labels[index]) for split, index in parts}
    nothing = ([], np.zeros(0, np.int32))
    splits, unreadable = {}, ()
    for split in _SPLITS:
        splits[split], bad = keep(image_files(*files.get(split, nothing), root), preprocess, how)
        unreadable += bad
    lost = [classes[i] for i in np.setdiff1d(np.arange(len(classes)), splits['train'].labels)]
    if lost:
        raise UsageError(f'no training image of these classes could be read in {argument}: {_some(lost)}')
    return Dataset(f'folder:{argument}', classes, **splits, unreadable=unreadable)


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders of the splits; `{'train': root}` where the class folders lie in the root itself."""
    # A class may be called "train": a folder is a split only if it holds folders.
    found = {split: [root / name for name in names if _folders(root / name)] for split, names in _SPLITS.items()}
    if not any(found.values()):
        return {'train': root}
    if not found['train']:
        others = ', '.join(str(path) for paths in found.values() for path in paths)
        raise UsageError(f'dataset folder {root} has {others} but no train/<class> folders to train on')
    if len(found['val']) > 1:
        raise UsageError(f'dataset folder {root} has {" and ".join(p.name for p in found["val"])}: keep one of them')
    return {split: paths[0] for split, paths in found.items() if paths}


def _list_classes(folder: pathlib.Path, on_empty_class: str) -> dict[str, list[pathlib.Path]]:
    """The image files of each class of one split."""
    listing, empty = {}, []
    for path in _folders(folder):
        # Broken links stay in the list, so that they are reported as unreadable and not quietly lost.
        images = [p for p in sorted(path.iterdir()) if _is_image_name(p) and not p.is_dir()]
        if images:
            listing[path.name] = images
        else:
            empty.append(path.name)
    if empty and on_empty_class == 'stop':
        raise UsageError(
            f'{folder} has class folders without images ({", ".join(EXTENSIONS)}): {_some(empty)}; fill or remove '
            "them, or leave them out with on_empty_class='skip'"
        )
    return listing


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return []
    return [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(('.', '__MACOSX'))]


def _is_image_name(path: pathlib.Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith('.')


def _examples(listing: dict[str, list[pathlib.Path]], classes: tuple[str, ...]) -> tuple[list, np.ndarray]:
    """The files of one split in the order of classes and names, and their labels int32 [N]."""
    paths = [path for name in classes for path in listing.get(name, [])]
    counts = [len(listing.get(name, [])) for name in classes]
    return paths, np.repeat(np.arange(len(classes), dtype=np.int32), counts)


def _some(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ', '.join(names[:most]) + (f' and {rest} more' if rest > 0 else '')
