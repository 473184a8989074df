"""Getting a dataset onto this machine: TFDS downloads and prepares it, or an archive that is there is unpacked."""

import os
import pathlib
import tarfile
import zipfile

from vpt_jax.data import tfds_files
from vpt_jax.data.benchmarks import SOURCES, TASKS, find_task, locate
from vpt_jax.data.benchmarks.task import Files, Task
from vpt_jax.data.dataset import place
from vpt_jax.errors import UsageError, unknown


def fetch(name: str, data_dir: str | os.PathLike | None = None) -> str:
    """Gets a dataset, unless it is there.

    Args:
      name: a benchmark's task (`'vtab:cifar100'`) or `'tfds:NAME'`.
      data_dir: see `dataset.load`.

    Returns:
      A sentence that says what was done.

    Raises:
      UsageError: for a name that is neither, or a set that has to be downloaded by hand.
    """
    folder = place(data_dir)
    kind, _, wanted = name.partition(':')
    if kind == 'tfds' and wanted:
        builder, _, version = wanted.partition(':')
        found = tfds_files.find(builder, folder, version or None)
        if found and (not version or found == version):
            return f'{name} is in {folder} already (version {found})'
        return f'prepared {builder}:{tfds_files.prepare(builder, folder, version or None)} in {folder}'
    if kind not in TASKS or not wanted:
        raise unknown(
            'dataset to fetch', name, ['tfds:NAME', *(f'{k}:{t.name}' for k, rows in TASKS.items() for t in rows)]
        )
    task = find_task(name)
    there = _there(task, folder)
    if there:
        return f'{name} is there already: {there}'
    if task.files and _unpack(task.files, folder) and (there := _there(task, folder)):
        return f'{name} was unpacked: {there}'
    if task.tfds:
        try:
            return f'prepared {task.tfds.name}:' + tfds_files.prepare(
                task.tfds.name, folder, task.tfds.version, task.tfds.also
            )
        except UsageError as error:
            raise UsageError(f'{error} ({name}: {task.size}; license: {task.license}; {task.url})') from error
    packed = ', '.join(task.files.packed) or ' and '.join(filter(None, task.files.coop or task.files.folders))
    raise UsageError(
        f'{name} cannot be downloaded by program: get {packed} from {task.url} ({task.size}; license: {task.license}) '
        f'into {folder}, and run this again'
    )


def _there(task: Task, folder: pathlib.Path) -> str | None:
    for source in SOURCES:
        found = locate(task, source, folder)
        if found is not None:
            return f'{source} {found}'
    return None


def _unpack(files: Files, folder: pathlib.Path) -> bool:
    """Unpacks those of a set's archives that are in the folder; whether there were any."""
    found = [folder / name for name in files.packed if (folder / name).is_file()]
    for path in found:
        try:
            _unpack_one(path, folder, files.folders[0])
        except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise UsageError(f'cannot unpack {path} ({error}): download it again') from error
    return bool(found)


def _unpack_one(path: pathlib.Path, folder: pathlib.Path, name: str) -> None:
    """Into the folder itself if the archive has the set's own folder in it, else into one of that name."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(_target(archive.namelist()[0], folder, name))
        return
    with tarfile.open(path) as archive:
        first = archive.next()
        if first is not None:
            archive.extractall(_target(first.name, folder, name), filter='data')


def _target(member: str, folder: pathlib.Path, name: str) -> pathlib.Path:
    top = member.removeprefix('./').split('/', 1)[0]
    return folder if top == name else folder / name
