"""What a row of a benchmark's table is made of."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from vpt_jax.data import tfds_files
from vpt_jax.data.decode import Picture
from vpt_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Cut:
    """A piece of a TFDS split, in stored order.

    Attributes:
      split: the split's name.
      percent: where it starts, in per cent of the split, by integer division as VTAB-1k's code does (TFDS rounds).
      length: how many examples; None for all up to `until`.
      until: where it ends at most, in per cent.
    """

    split: str
    percent: int = 0
    length: int | None = None
    until: int = 100

    def bounds(self, count: int) -> tuple[int, int]:
        """First index and the one after the last, in a split of `count` examples.

        Raises:
          UsageError: the split is too short.
        """
        start, stop = self.percent * count // 100, self.until * count // 100
        if self.length is not None:
            if start + self.length > stop:
                raise UsageError(
                    f'split {self.split} has {count} examples, too few for {self.length} from {start} on: the set is '
                    'not the one that the benchmark is cut from'
                )
            stop = start + self.length
        return start, stop


@dataclasses.dataclass(frozen=True)
class Tfds:
    """Where a task is in tensorflow-datasets.

    Attributes:
      name: `NAME` or `NAME/CONFIG`.
      version: that the published numbers were made with, or the first that is known to do.
      train, val, test: the cuts; val may be None.
      label: the example's field with the label, or a function of the example.
      image: what is done to the image first; None for nothing.
      also: first numbers of other versions with the same examples in the same order.
      name_field: the example's field with the image's file name; where there is no `val` the published sets hold out a
        tenth of train, and files are ordered by it for that.
    """

    name: str
    version: str
    train: Cut
    val: Cut | None
    test: Cut
    label: str | Callable[[Mapping[str, Any]], int] = 'label'
    image: Callable[[Picture], Picture] | None = None
    also: tuple[int, ...] = ()
    name_field: str | None = None

    def find(self, data_dir: pathlib.Path) -> str | None:
        """The version that is prepared in TFDS's folder and will do; None if there is none."""
        return tfds_files.find(self.name, data_dir, self.version, self.also)

    def label_of(self, example: Mapping[str, Any]) -> int:
        """The label of an example."""
        return int(example[self.label] if isinstance(self.label, str) else self.label(example))


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a task is as files, beside or instead of TFDS.

    Attributes:
      folders: names of its folder, under `data_dir` or one of the `BASES`; the first that is there is read.
      archive: a name of `archives.READERS`, the layout in which the authors distribute the set; None if it is not read.
      images: where the images of VPT's annotation files (train.json, ...) are; `''` for the folder itself.
      coop: name of CoOp's split file and of the image folder beside it; None if there is none.
      packed: names of the archives that unpack into `folders`, for messages.
    """

    folders: tuple[str, ...]
    archive: str | None = None
    images: str = ''
    coop: tuple[str, str] | None = None
    packed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task of a benchmark.

    Attributes:
      name: within the benchmark.
      group: of tasks whose mean is reported, such as 'Natural'.
      classes: C.
      tfds: its place in tensorflow-datasets; None if it has none.
      files: its places as files; None if it has none.
      size: of the download, for messages.
      license: of the data, as far as it is stated.
      url: its home.
      aliases: other names in use.
      note: what to know before comparing numbers.
    """

    name: str
    group: str
    classes: int
    tfds: Tfds | None
    files: Files | None
    size: str
    license: str
    url: str
    aliases: tuple[str, ...] = ()
    note: str = ''


#: Folders under `data_dir` in which sets of files are looked for.
BASES = ('', 'vtab-1k', 'fgvc', 'coop')
