"""`vtab:TASK`, `fgvc:TASK`, `pgn:TASK`, `ap:TASK`: the sets on which people publish, by name.

A task is a row of a table (`vtab.TASKS` and so on). It is read from the first of its sources that is in `data_dir`:

    tfds       prepared by tensorflow-datasets (`vpt_jax.data.tfds_files`)
    lists      a folder with train800.txt, val200.txt, test.txt (`vpt_jax.data.lists`)
    json       VPT's annotation files train.json, val.json, test.json beside the images
    coop       CoOp's split file beside the images
    archive    the layout in which the authors distribute the set, unpacked

Folders are looked for in `data_dir` itself and in the folders of `task.BASES` in it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from vpt_jax.data import lists, tfds_files
from vpt_jax.data.benchmarks import ap, archives, fgvc, pgn, vtab
from vpt_jax.data.benchmarks.task import BASES, Files, Task
from vpt_jax.data.dataset import Dataset, Reading, place
from vpt_jax.data.decode import Examples
from vpt_jax.data.preprocess import Preprocess
from vpt_jax.data.stratify import stratified
from vpt_jax.errors import UsageError, unknown

SOURCES = ('tfds', 'lists', 'json', 'coop', 'archive')
# Decides which tenth of train is held out where a set has no validation set; no run may change it.
_HOLD_OUT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Tasks that are reported together.

    Attributes:
      title: for tables.
      tasks: dataset names and their groups, in the order of published tables.
      final_on_val: whether final runs train on train and val together.
    """

    title: str
    tasks: Mapping[str, str]
    final_on_val: bool


def _tasks(kind: str, rows: tuple[Task, ...]) -> dict[str, str]:
    return {f'{kind}:{row.name}': row.group for row in rows}


TASKS = {'vtab': vtab.TASKS, 'fgvc': fgvc.TASKS, 'pgn': pgn.TASKS, 'ap': ap.TASKS}
BENCHMARKS = {
    'vtab': Benchmark('VTAB-1k', _tasks('vtab', vtab.TASKS), True),
    'fgvc': Benchmark('FGVC', _tasks('fgvc', fgvc.TASKS), False),
    'pgn': Benchmark('PGN-12', _tasks('pgn', pgn.TASKS), True),
    'ap': Benchmark('AP (23 of 29 sets)', _tasks('vtab', vtab.TASKS) | _tasks('ap', ap.TASKS), True),
}


def find_task(name: str) -> Task:
    """The row of a task.

    Args:
      name: such as `'vtab:cifar100'`; a task's other names are understood.

    Raises:
      UsageError: there is no such task.
    """
    kind, _, wanted = name.partition(':')
    for task in TASKS[kind]:
        if wanted == task.name or wanted in task.aliases:
            return task
    raise unknown(f'task of {kind}', wanted, [task.name for task in TASKS[kind]])


def read(argument: str, preprocess: Preprocess, how: Reading) -> Dataset:
    """Reads a task; see the module's docstring and `dataset.load`.

    Raises:
      UsageError: for an unknown task or source, a task that is not on this machine (what is missing, where it was
        looked for, and how to get it), or data that are not the benchmark's.
    """
    task = find_task(argument)
    name = f'{argument.partition(":")[0]}:{task.name}'
    for source in _sources(how.source):
        found = locate(task, source, how.data_dir)
        if found is not None:
            if source == 'tfds':
                return _read_tfds(name, task, str(found), preprocess, how)
            return _read_files(name, task, source, pathlib.Path(found), preprocess, how)
    raise missing(name, task, how)


def require(name: str, data_dir: str | os.PathLike | None = None, source: str = 'auto') -> None:
    """Does nothing, unless a dataset is a benchmark's task and not on this machine.

    Args:
      name, data_dir, source: see `dataset.load`.

    Raises:
      UsageError: as `read` would.
    """
    if name.partition(':')[0] in TASKS:
        task, how = find_task(name), Reading(data_dir=place(data_dir), source=source)
        if not any(locate(task, s, how.data_dir) for s in _sources(source)):
            raise missing(name, task, how)


def _sources(source: str) -> tuple[str, ...]:
    if source != 'auto' and source not in SOURCES:
        raise unknown('source', source, ('auto', *SOURCES))
    return SOURCES if source == 'auto' else (source,)


def locate(task: Task, source: str, data_dir: pathlib.Path) -> pathlib.Path | str | None:
    """Where a task is: a folder, or for TFDS a version; None if it is not there."""
    if source == 'tfds':
        return task.tfds.find(data_dir) if task.tfds else None
    if task.files is None:
        return None
    return next((root for root in _folders(task.files, data_dir) if _is_layout(task.files, source, root)), None)


def _folders(files: Files, data_dir: pathlib.Path) -> list[pathlib.Path]:
    return [data_dir / base / folder for folder in files.folders for base in BASES]


def _is_layout(files: Files, source: str, root: pathlib.Path) -> bool:
    if source == 'lists':
        return any((root / f'{layout[0]}.txt').is_file() for layout in lists.LAYOUTS)
    if source == 'json':
        return all((root / f'{split}.json').is_file() for split in lists.SPLITS)
    if source == 'coop':
        return files.coop is not None and (root / files.coop[0]).is_file()
    return files.archive is not None and all((root / part).exists() for part in archives.READERS[files.archive][0])


def missing(name: str, task: Task, how: Reading) -> UsageError:
    """The error for a task that is not on this machine."""
    looked = []
    if task.tfds and how.source in ('auto', 'tfds'):
        looked.append(f'the TFDS set {task.tfds.name} {task.tfds.version}')
    if task.files and how.source != 'tfds':
        looked.append(f'a folder {" or ".join(task.files.folders)} (itself or in {", ".join(filter(None, BASES))})')
    command = f'`python -m vpt_jax.fetch {name} --data_dir={how.data_dir}`'
    if task.tfds and how.source in ('auto', 'tfds'):
        get = f'get it with {command}'
    else:
        packed = ', '.join(task.files.packed) if task.files and task.files.packed else 'it'
        get = f'download {packed} from {task.url} into {how.data_dir} and unpack with {command}'
    return UsageError(
        f'{name} is not on this machine: looked in {how.data_dir} for {" and ".join(looked)}; {get} ({task.size}; '
        f'license: {task.license}), or say where it is with TFDS_DATA_DIR or --config.data.dir'
    )


def _read_tfds(name: str, task: Task, version: str, preprocess: Preprocess, how: Reading) -> Dataset:
    tfds = task.tfds
    builder = tfds_files.open_builder(tfds.name, version, how.data_dir)
    cuts = {'train': tfds.train, 'val': tfds.val, 'test': tfds.test}
    there = builder.info.splits
    parts: dict[str, Examples] = {}
    for split, cut in cuts.items():
        if cut is None:
            continue
        if cut.split not in there:
            raise UsageError(
                f'the TFDS set {tfds.name}:{version} has no split {cut.split}: it is not the one {name} is of'
            )
        start, stop = cut.bounds(there[cut.split].num_examples)
        parts[split] = tfds_files.examples(builder, cut.split, start, stop, tfds.label_of, tfds.image, name)
    if tfds.val is None:
        start, stop = tfds.train.bounds(there[tfds.train.split].num_examples)
        rows = tfds_files.fields(
            builder, tfds.train.split, start, stop, lambda e: (str(e[tfds.name_field]), tfds.label_of(e))
        )
        train, val = hold_out([file for file, _ in rows], np.array([label for _, label in rows]))
        parts['val'], parts['train'] = parts['train'].take(val), parts['train'].take(train)
    classes = tfds_files.class_names(builder, tfds.label) if isinstance(tfds.label, str) else None
    if classes is None or len(classes) != task.classes:
        classes = tuple(map(str, range(task.classes)))
    source = f'TFDS {tfds.name}:{version}'
    return lists.listed(name, classes, parts, how.data_dir, preprocess, how, source)


def _read_files(
    name: str, task: Task, source: str, root: pathlib.Path, preprocess: Preprocess, how: Reading
) -> Dataset:
    files = task.files
    if source == 'lists':
        parts = lists.split_lists(root)
    elif source == 'json':
        parts = archives.vpt_json(root, files.images)
    elif source == 'coop':
        parts = archives.coop_json(root, *files.coop)
    else:
        parts = archives.READERS[files.archive][1](root)
    if source != 'lists':
        parts = _from_zero(name, parts)
    if 'val' not in parts and source == 'archive':
        paths, labels = parts['train']
        for split, index in zip(('train', 'val'), hold_out([p.name for p in paths], labels), strict=True):
            parts[split] = [paths[i] for i in index], labels[index]
    classes = lists.class_names(root, np.concatenate([labels for _, labels in parts.values()]), task.classes)
    return lists.listed(name, classes, parts, root, preprocess, how, f'{source} {root}')


def _from_zero(name: str, parts: archives.Parts) -> archives.Parts:
    """Class ids in the order of train's, from 0.

    The published code maps the ids of each file by themselves, which shifts labels where a split lacks a class.
    """
    ids = np.unique(parts['train'][1])
    for split, (_, labels) in parts.items():
        strangers = np.setdiff1d(labels, ids)
        if len(strangers):
            raise UsageError(f'the {split} split of {name} has class {strangers[0]}, of which train has no image')
    return {split: (paths, np.searchsorted(ids, labels)) for split, (paths, labels) in parts.items()}


def hold_out(names: list[str], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Train and val of a set without an official val: a tenth, rounded up, is held out, stratified by class.

    The choice depends on the files' names and labels only, so that it is the same from every source.

    Args:
      names: N file names; folders before them do not matter.
      labels: int [N].

    Returns:
      Two ascending arrays of indices.
    """
    order = np.array(sorted(range(len(names)), key=lambda i: names[i].rsplit('/', 1)[-1]), np.int64)
    count = len(order) - -(-len(order) // 10)
    train, val, _ = stratified(labels[order], count, len(order) - count, _HOLD_OUT_SEED)
    return np.sort(order[train]), np.sort(order[val])
