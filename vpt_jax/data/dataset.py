"""Datasets and splits, and `load`, which finds the reader for a dataset's name."""

import dataclasses
import importlib
import numbers
import pathlib

import numpy as np

from vpt_jax.data.preprocess import Preprocess
from vpt_jax.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Decoded images with their labels.

    Attributes:
      images: what `Preprocess.decode` gave: one array uint8 [N, S, S, 3], or a list of N arrays uint8 [H, W, 3].
      labels: int32 [N], 0 <= label < number of classes.
      names: N names for messages: a file's path, or `file[i]` for the i-th image of an array file.
    """

    images: np.ndarray | list[np.ndarray]
    labels: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self):
        if not len(self.images) == len(self.labels) == len(self.names):
            raise UsageError(
                f'a split needs as many labels and names as images, got {len(self.images)} images, '
                f'{len(self.labels)} labels, {len(self.names)} names'
            )

    def __len__(self) -> int:
        return len(self.labels)

    def joined(self, other: 'Split') -> 'Split':
        """Two splits of the same dataset as one, as in VTAB-1k's train800val200; images are copied."""
        ragged = isinstance(self.images, list)
        images = self.images + other.images if ragged else np.concatenate([self.images, other.images])
        return Split(images, np.concatenate([self.labels, other.labels]), self.names + other.names)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A classification task, decoded and in memory.

    Attributes:
      name: as given to `load`.
      class_names: C names; a label is an index into them.
      train: what prompts are trained on; never empty.
      val: what settings are chosen by; may be empty.
      test: what is reported; may be empty.
      unreadable: names of the images that were left out because they could not be read.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    unreadable: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Where a kind of dataset is read.

    Attributes:
      module: its module, imported when first used, so that a reader's dependencies burden nobody else. It has
        `read(argument, preprocess, *, seed, on_bad_image, on_empty_class) -> Dataset`.
      argument: what follows `kind:` in a name, in capitals for messages; empty if nothing does.
      meaning: what it reads, for messages.
    """

    module: str
    argument: str
    meaning: str


#: A new kind of dataset is one new file and one line here.
READERS = {
    'digits': Reader('vpt_jax.data.digits', '', 'the embedded handwritten digits'),
    'folder': Reader('vpt_jax.data.folder', 'PATH', 'a folder of images, one sub-folder a class'),
    'npz': Reader('vpt_jax.data.arrays', 'PATH', 'a NumPy .npz file of images and labels'),
}


def load(
    name: str,
    preprocess: Preprocess,
    *,
    seed: int = 0,
    on_bad_image: str = 'stop',
    on_empty_class: str = 'stop',
) -> Dataset:
    """Reads a dataset into memory, every image decoded once by `preprocess.decode`.

    Args:
      name: `'digits'`, `'folder:PATH'` (see `vpt_jax.data.folder`) or `'npz:PATH'` (see `vpt_jax.data.arrays`).
      preprocess: how images are decoded.
      seed: >= 0; decides the split where the data come without one, and nothing else.
      on_bad_image: `'stop'`: an image that cannot be read is an error; `'skip'`: it is left out and its name
        recorded in `Dataset.unreadable`.
      on_empty_class: `'stop'`: a class folder without images is an error; `'skip'`: it is no class. Only `'folder'`
        datasets have such.

    Returns:
      A `Dataset`.

    Raises:
      UsageError: for an unknown name or flag, a path that does not exist, or data that the reader refuses.
    """
    for flag, value in (('on_bad_image', on_bad_image), ('on_empty_class', on_empty_class)):
        if value not in ('stop', 'skip'):
            raise unknown(flag, value, ('stop', 'skip'))
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise UsageError(f'the seed of a dataset must be a whole number >= 0, got {seed!r}')
    kind, _, argument = str(name).partition(':')
    reader = READERS.get(kind)
    if reader is None:
        raise _unknown_dataset(str(name))
    if bool(reader.argument) != bool(argument):
        form = f'{kind}:{reader.argument}' if reader.argument else kind
        raise UsageError(f'dataset {name!r} must be written {form} ({reader.meaning})')
    module = importlib.import_module(reader.module)
    return module.read(argument, preprocess, seed=int(seed), on_bad_image=on_bad_image, on_empty_class=on_empty_class)


def _unknown_dataset(name: str) -> UsageError:
    path = pathlib.Path(name).expanduser()
    if path.is_dir() or path.suffix == '.npz':
        return UsageError(f'unknown dataset {name!r}: a path is written {"folder" if path.is_dir() else "npz"}:{name}')
    forms = [f'{kind}:{reader.argument}' if reader.argument else kind for kind, reader in READERS.items()]
    hint = 'your own images are written folder:PATH (one sub-folder a class) or npz:PATH (arrays)'
    return UsageError(f'{str(unknown("dataset", name, forms)).rstrip(".")} ({hint})')
