"""Datasets and splits, and `load`, which finds the reader for a dataset's name."""

import dataclasses
import importlib
import numbers
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vpt_jax.data.preprocess import FGVC, VTAB, Preprocess, Protocol
from vpt_jax.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Decoded images with their labels.

    Attributes:
      images: what `Preprocess.decode` gave: one array uint8 [N, S, S, 3], which may lie in a memory-mapped file; or a
        sequence of N arrays uint8 [H, W, 3], which may be decoded only when asked for (see `vpt_jax.data.cache`).
      labels: int32 [N], 0 <= label < number of classes.
      names: N names for messages: a file's path, or `file[i]` for the i-th image of an array file.
    """

    images: np.ndarray | Sequence[np.ndarray]
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
        """Two splits of the same dataset as one, as in VTAB-1k's train800val200.

        Arrays in memory are copied; what is read when asked for stays so.
        """
        if not len(other) or not len(self):
            return self if len(self) else other
        parts = (self.images, other.images)
        in_memory = all(isinstance(part, np.ndarray) and not isinstance(part, np.memmap) for part in parts)
        images = np.concatenate(parts) if in_memory else Chained(*parts)
        return Split(images, np.concatenate([self.labels, other.labels]), self.names + other.names)


class Chained(Sequence):
    """Two sequences of images, one after the other, neither copied."""

    def __init__(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]):
        self._parts = (first, second)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, i: int) -> np.ndarray:
        first, second = self._parts
        if not 0 <= i < len(self):
            raise IndexError(i)
        return first[i] if i < len(first) else second[i - len(first)]


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
      source: where a benchmark's task was read from and in which version; empty where the name says it.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    unreadable: tuple[str, ...] = ()
    source: str = ''

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    def with_val_in_train(self) -> 'Dataset':
        """What final runs train on: train and val together (VTAB-1k's train800val200), val empty."""
        empty = Split(self.val.images[:0] if isinstance(self.val.images, np.ndarray) else [], self.val.labels[:0], ())
        return dataclasses.replace(self, name=f'{self.name}+val', train=self.train.joined(self.val), val=empty)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a dataset is read, besides its name and `Preprocess`; see `load`."""

    seed: int = 0
    on_bad_image: str = 'stop'
    on_empty_class: str = 'stop'
    data_dir: pathlib.Path = pathlib.Path()
    source: str = 'auto'
    memory_gb: float | None = None


@dataclasses.dataclass(frozen=True)
class Reader:
    """Where a kind of dataset is read.

    Attributes:
      module: its module, imported when first used, so that a reader's dependencies burden nobody else. It has
        `read(argument, preprocess, how: Reading) -> Dataset`.
      argument: what follows `kind:` in a name, in capitals for messages; empty if nothing does.
      meaning: what it reads, for messages.
      protocol: the pixels that published numbers on such datasets were made with, if there are such.
    """

    module: str
    argument: str
    meaning: str
    protocol: Protocol | None = None


#: A new kind of dataset is one new file and one line here.
READERS = {
    'digits': Reader('vpt_jax.data.digits', '', 'the embedded handwritten digits'),
    'folder': Reader('vpt_jax.data.folder', 'PATH', 'a folder of images, one sub-folder a class'),
    'npz': Reader('vpt_jax.data.arrays', 'PATH', 'a NumPy .npz file of images and labels'),
    'lists': Reader('vpt_jax.data.lists', 'PATH', 'text files with one image and label a line'),
    'tfds': Reader('vpt_jax.data.tfds_names', 'NAME', 'any image classification set of tensorflow-datasets'),
    'vtab': Reader('vpt_jax.data.benchmarks', 'TASK', 'a task of VTAB-1k', VTAB),
    'fgvc': Reader('vpt_jax.data.benchmarks', 'TASK', 'a fine-grained set of VPT', FGVC),
    'pgn': Reader('vpt_jax.data.benchmarks', 'TASK', 'a set of PGN and VP'),
    'ap': Reader('vpt_jax.data.benchmarks', 'TASK', 'a full-size set of AP'),
}


def load(
    name: str,
    preprocess: Preprocess,
    *,
    seed: int = 0,
    on_bad_image: str = 'stop',
    on_empty_class: str = 'stop',
    data_dir: str | os.PathLike | None = None,
    source: str = 'auto',
    memory_gb: float | None = None,
) -> Dataset:
    """Reads a dataset, every image decoded once by `preprocess.decode`.

    Args:
      name: `'digits'`, `'folder:PATH'`, `'npz:PATH'`, `'lists:PATH'`, `'tfds:NAME'`, or a benchmark's task such as
        `'vtab:cifar100'`: see the modules in `READERS`.
      preprocess: how images are decoded.
      seed: >= 0; decides the split where the data come without one, and nothing else.
      on_bad_image: `'stop'`: an image that cannot be read is an error; `'skip'`: it is left out and its name
        recorded in `Dataset.unreadable`.
      on_empty_class: `'stop'`: a class folder without images is an error; `'skip'`: it is no class. Only `'folder'`
        datasets have such.
      data_dir: where TFDS's and the benchmarks' files are; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      source: of a benchmark's task, where it has several (`benchmarks.SOURCES`); `'auto'` for the first that is there.
      memory_gb: a split whose decoded images take more is kept in a file instead (see `vpt_jax.data.cache`); None for
        a quarter of the memory that is free.

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
    how = Reading(int(seed), on_bad_image, on_empty_class, place(data_dir), source, memory_gb)
    reader, argument = _reader(str(name))
    module = importlib.import_module(reader.module)
    return module.read(argument, preprocess, how)


def place(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Where TFDS's and the benchmarks' files are: as given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    given = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return pathlib.Path(given).expanduser()


def protocol_of(name: str) -> Protocol | None:
    """The pixels that published numbers on a dataset were made with; None if it is nobody's benchmark.

    Raises:
      UsageError: for an unknown name.
    """
    return _reader(str(name))[0].protocol


def _reader(name: str) -> tuple[Reader, str]:
    """The reader of a name, and what it is given: the argument, with its kind in front for benchmarks."""
    kind, _, argument = name.partition(':')
    reader = READERS.get(kind)
    if reader is None:
        raise _unknown_dataset(name)
    if bool(reader.argument) != bool(argument):
        form = f'{kind}:{reader.argument}' if reader.argument else kind
        raise UsageError(f'dataset {name!r} must be written {form} ({reader.meaning})')
    return reader, name if reader.argument == 'TASK' else argument


def _unknown_dataset(name: str) -> UsageError:
    path = pathlib.Path(name).expanduser()
    if path.is_dir() or path.suffix == '.npz':
        return UsageError(f'unknown dataset {name!r}: a path is written {"folder" if path.is_dir() else "npz"}:{name}')
    forms = [f'{kind}:{reader.argument}' if reader.argument else kind for kind, reader in READERS.items()]
    hint = 'your own images are written folder:PATH (one sub-folder a class) or npz:PATH (arrays)'
    return UsageError(f'{str(unknown("dataset", name, forms)).rstrip(".")} ({hint})')
