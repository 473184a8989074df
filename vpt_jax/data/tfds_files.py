"""Sets that tensorflow-datasets has prepared, read without TensorFlow.

A prepared set lies in DATA_DIR/NAME[/CONFIG]/VERSION. Both of its formats are read: array_record through TFDS, TFRecord
by `records`. The order of examples, and so what a slice of a split holds, is the same in both. Preparing a set
(`prepare`) needs TensorFlow for almost every builder; reading never does.
"""

import hashlib
import importlib.util
import io
import pathlib
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from vpt_jax.data.decode import Examples, Picture
from vpt_jax.data.records import Records
from vpt_jax.errors import UsageError

_VERSION = re.compile(r'(\d+)\.(\d+)\.(\d+)')


def find(name: str, data_dir: pathlib.Path, version: str | None = None, also: tuple[int, ...] = ()) -> str | None:
    """The version of a set that is prepared in a folder.

    Args:
      name: `NAME` or `NAME/CONFIG`.
      data_dir: TFDS's folder.
      version: the one that is wanted; by TFDS's rules any with the same first number has the same examples in the same
        order. None for any.
      also: other first numbers of which that is known to be true as well.

    Returns:
      The wanted version if it is there, else the newest that will do, else None.
    """
    folder = data_dir / name
    there = [path.parent.name for path in folder.glob('*/dataset_info.json') if _VERSION.fullmatch(path.parent.name)]
    if version is not None:
        majors = {int(version.split('.')[0]), *also}
        there = [v for v in there if int(v.split('.')[0]) in majors]
    if version in there:
        return version
    return max(there, key=_numbers, default=None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split('.')))


def open_builder(name: str, version: str, data_dir: pathlib.Path) -> Any:
    """The builder of a prepared set.

    Raises:
      UsageError: its files are damaged.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(f'{name}:{version}', data_dir=str(data_dir))
    except Exception:  # this TFDS builds another version, or does not know the name: what is on disk describes itself
        path = data_dir / name / version
        try:
            return tfds.builder_from_directory(str(path))
        except Exception as error:
            reason = ' '.join(str(error).split())[:200]
            raise UsageError(f'the TFDS set in {path} cannot be opened ({reason}): prepare it again') from error


def examples(
    builder: Any,
    split: str,
    start: int,
    stop: int,
    label: Callable[[Mapping[str, Any]], int],
    image: Callable[[Picture], Picture] | None = None,
    task: str = '',
) -> Examples:
    """Examples start..stop - 1 of a split, in stored order.

    Args:
      builder: from `open_builder`.
      split: its name.
      start, stop: 0 <= start <= stop <= number of examples.
      label: from TFDS's example (images not decoded) to the label.
      image: what is done to the image before anything else; None for nothing.
      task: text that tells `label` and `image` from others.
    """
    source = _source(builder, split)
    info = builder.info.splits[split]

    def picture(example: Mapping[str, Any]) -> Picture:
        value = example['image']
        if isinstance(value, bytes):
            with Image.open(io.BytesIO(value)) as value:
                value.load()
        return image(value) if image else value

    def read(i: int) -> tuple[Picture, int]:
        example = source(start + i)
        return picture(example), int(label(example))

    where = f'{builder.info.full_name} {split}'
    names = tuple(f'{where}[{i}]' for i in range(start, stop))
    identity = f'{where} {start} {stop} {task} {_stamp(info)}'
    return Examples(names, read, lambda i: int(label(source(start + i))), identity, pathlib.Path(builder.data_dir))


def _source(builder: Any, split: str) -> Callable[[int], Mapping[str, Any]]:
    """A function that reads one example, images left encoded."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    decoders = {
        name: tfds.decode.SkipDecoding() for name, f in features.items() if isinstance(f, tfds.features.Image)
    }  # fmt: skip
    form = builder.info.file_format
    if form is not None and form.value == 'tfrecord':
        info = builder.info.splits[split]
        records = Records([pathlib.Path(path) for path in info.filepaths], info.shard_lengths)
        return lambda i: features.deserialize_example_np(records[i], decoders=decoders)
    source, lock = builder.as_data_source(split, decoders=decoders), threading.Lock()

    def read(i: int) -> Mapping[str, Any]:
        with lock:  # its file handles are not made for threads; decoding, which takes the time, happens outside
            return source[i]

    return read


def _stamp(info: Any) -> str:
    digest = hashlib.sha256()
    for path in map(pathlib.Path, info.filepaths):
        if path.exists():
            digest.update(f'{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n'.encode())
    return digest.hexdigest()


def prepare(name: str, data_dir: pathlib.Path, version: str | None = None, also: tuple[int, ...] = ()) -> str:
    """Downloads a set and prepares it.

    Args:
      name, data_dir, version, also: see `find`.

    Returns:
      The version that was prepared.

    Raises:
      UsageError: TFDS does not know the set or builds another version of it, or what it needs is missing: TensorFlow,
        files that have to be downloaded by hand, the network.
    """
    import tensorflow_datasets as tfds

    # Random access by itself; there is no array_record for other systems than Linux.
    form = 'array_record' if importlib.util.find_spec('array_record') else None
    majors = sorted({int(version.split('.')[0]), *also}) if version else [None]
    builder, problem = None, None
    for asked in [version, *(f'{major}.*.*' for major in majors)] if version else [None]:
        try:
            builder = tfds.builder(f'{name}:{asked}' if asked else name, data_dir=str(data_dir), file_format=form)
            break
        except Exception as error:  # TFDS raises many kinds
            problem = problem or error
    if builder is None:
        raise UsageError(
            f'tensorflow-datasets {tfds.__version__} cannot build {name}{f":{version}" if version else ""} '
            f'({" ".join(str(problem).split())[:160]})'
        ) from problem
    try:
        builder.download_and_prepare()
    except ImportError as error:
        needed = error.name or str(error)
        raise UsageError(
            f"preparing {name} needs {needed}: pip install '.[prepare]' in a clone of vpt_jax brings it along (reading "
            'does not need it)'
        ) from error
    except Exception as error:
        by_hand = getattr(builder, 'MANUAL_DOWNLOAD_INSTRUCTIONS', None)
        hint = f'; it has to be downloaded by hand: {" ".join(by_hand.split())}' if by_hand else ''
        raise UsageError(f'preparing {name} failed ({" ".join(str(error).split())[:300]}){hint}') from error
    return str(builder.info.version)


def class_names(builder: Any, feature: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel feature; None if it is none."""
    found = dict(builder.info.features.items()).get(feature)
    count = getattr(found, 'num_classes', None)
    return None if count is None else tuple(found.int2str(i) for i in range(count))


def to_255(image: Picture) -> np.ndarray:
    """An image stored as 0 and 1 on the scale of others."""
    return np.asarray(image, np.uint8) * np.uint8(255)


def fields(builder: Any, split: str, start: int, stop: int, function: Callable[[Mapping[str, Any]], Any]) -> list:
    """What a function gives for the examples start..stop - 1 of a split, images not decoded."""
    source = _source(builder, split)
    return [function(source(i)) for i in range(start, stop)]
