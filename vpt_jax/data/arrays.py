"""`npz:PATH`: images and labels in one NumPy .npz file.

Three forms are read; `labels` are whole numbers [N] (or [N, 1]), counted from 0:

    images uint8 [N, H, W] or [N, H, W, 1 or 3], labels
    train_images, train_labels, and the same for val and test where there are such (MedMNIST's files, for instance)
    packed JPEG files, labels: where decoded arrays would be too large. The files' entropy-coded parts lie one after
        another in jpeg_data uint8 [bytes], that of image i at jpeg_offsets int [N + 1]; their few distinct headers
        (everything up to and with the SOS segment) in jpeg_headers uint8 [bytes] at jpeg_header_offsets int [M + 1];
        image i has header jpeg_header_id int [N]. Optional: size int [3], the H, W, C of every image.

Optional in all: class_names [C], text. Optional in the first and the last: split int [N] with 0 train, 1 val, 2 test,
3 extra (not read). Where a file has no split, and where it has train arrays only, it is split by seed: 80 % train,
10 % val, 10 % test, stratified by class. Other arrays in the file are not looked at.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from vpt_jax.data.dataset import Dataset, Reading, Split
from vpt_jax.data.decode import decode_all
from vpt_jax.data.npz_file import NpzFile
from vpt_jax.data.preprocess import Preprocess
from vpt_jax.data.stratify import eight_one_one
from vpt_jax.errors import UsageError

_SPLITS = ('train', 'val', 'test')
_EXTRA = 3
# One source of examples: N, the i-th image, and its name in messages.
_Source = tuple[np.ndarray, Callable[[int], np.ndarray | Image.Image], str]


def read(argument: str, preprocess: Preprocess, how: Reading) -> Dataset:
    """Reads an array file; see the module's docstring for its forms and `dataset.load` for the arguments.

    Raises:
      UsageError: for a file that is missing, damaged, of none of the forms, or holds Python objects; for arrays whose
        dtypes, shapes or lengths do not fit together; labels out of range; a split without training examples; or an
        unreadable image (unless skipped).
    """
    file = NpzFile(argument)
    class_names = _class_names(file)
    if 'train_images' in file:
        sources = {split: _plain(file, f'{split}_') for split in _SPLITS if f'{split}_images' in file}
        parts = {split: (source, np.arange(len(source[0]))) for split, source in sources.items()}
    elif 'images' in file or 'jpeg_data' in file:
        source = _plain(file, '') if 'images' in file else _packed(file)
        sources, parts = {'all': source}, {'train': (source, np.arange(len(source[0])))}
    else:
        raise UsageError(
            f'array file {argument} holds {", ".join(sorted(file.keys)) or "no array"}: expected images and labels, '
            'train_images and train_labels, or packed JPEG files (jpeg_data, jpeg_offsets, ...)'
        )
    labels = np.concatenate([source[0] for source in sources.values()])
    class_names = _check_range(file, labels, class_names)
    if 'all' in sources and 'split' in file:
        code = _split_codes(file, len(labels))
        parts = {split: (sources['all'], np.flatnonzero(code == number)) for number, split in enumerate(_SPLITS)}
    elif set(parts) == {'train'}:
        source, _ = parts['train']
        parts = {s: (source, index) for s, index in zip(_SPLITS, eight_one_one(source[0], how.seed), strict=True)}
    if not len(parts['train'][1]):
        raise UsageError(f'array file {argument} has no training example: {_where_train(file)}')
    splits, unreadable = {}, ()
    for split in _SPLITS:
        source, index = parts.get(split, (parts['train'][0], np.arange(0)))
        splits[split], bad = _decode(source, index, preprocess, how.on_bad_image)
        unreadable += bad
    if not len(splits['train']):
        raise UsageError(f'no training image of {argument} could be read')
    return Dataset(f'npz:{argument}', class_names, **splits, unreadable=unreadable)


def _plain(file: NpzFile, prefix: str) -> _Source:
    """`{prefix}images` with `{prefix}labels`."""
    key = f'{prefix}images'
    images = file[key]
    if images.dtype != np.uint8:
        raise UsageError(f'{key} of {file.path} must be uint8 with values 0..255, got {images.dtype}')
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise UsageError(
            f'{key} of {file.path} has the shape {list(images.shape)}, channels first: save {key}.transpose(0, 2, 3, 1)'
        )
    grey = images.ndim == 3
    if not (grey or (images.ndim == 4 and images.shape[3] in (1, 3))) or 0 in images.shape[1:]:
        raise UsageError(
            f'{key} of {file.path} must have the shape [N, H, W] or [N, H, W, 1 or 3], got {list(images.shape)}'
        )
    labels = _labels(file, f'{prefix}labels', len(images), key)
    return labels, images.__getitem__, f'{file.path}:{key}'


def _packed(file: NpzFile) -> _Source:
    """The packed-JPEG form."""
    data, headers = _jpeg_bytes(file, 'jpeg_data'), _jpeg_bytes(file, 'jpeg_headers')
    offsets = _offsets(file, 'jpeg_offsets', len(data))
    header_offsets = _offsets(file, 'jpeg_header_offsets', len(headers))
    header_id = file['jpeg_header_id']
    count, kinds = len(offsets) - 1, len(header_offsets) - 1
    if header_id.dtype.kind not in 'iu' or header_id.shape != (count,):
        raise UsageError(
            f'jpeg_header_id of {file.path} must be whole numbers [{count}], one an image of jpeg_offsets, got '
            f'{header_id.dtype} {list(header_id.shape)}'
        )
    if count and not (header_id.min() >= 0 and header_id.max() < kinds):
        raise UsageError(f'jpeg_header_id of {file.path} must be in 0..{kinds - 1}, the headers that the file holds')
    labels = _labels(file, 'labels', count, 'jpeg_offsets')
    size = tuple(int(v) for v in file['size'].ravel()) if 'size' in file else None

    def open_image(i: int) -> Image.Image:
        kind = header_id[i]
        header = headers[header_offsets[kind] : header_offsets[kind + 1]]
        body = data[offsets[i] : offsets[i + 1]]
        with Image.open(io.BytesIO(header.tobytes() + body.tobytes()), formats=('JPEG',)) as image:
            # Before the pixels are decoded: a header may claim far more of them than the file's author meant.
            if size and (image.height, image.width) != size[:2]:
                raise ValueError(f'{image.height} x {image.width} pixels, where size says {size[0]} x {size[1]}')
            image.load()
            return image

    return labels, open_image, str(file.path)


def _jpeg_bytes(file: NpzFile, key: str) -> np.ndarray:
    array = file[key]
    if array.dtype != np.uint8 or array.ndim != 1:
        raise UsageError(f'{key} of {file.path} must be uint8 [bytes], got {array.dtype} {list(array.shape)}')
    return array


def _offsets(file: NpzFile, key: str, end: int) -> np.ndarray:
    """Ascending int64 offsets within 0..end."""
    array = file[key]
    if array.dtype.kind not in 'iu' or array.ndim != 1 or len(array) < 1:
        raise UsageError(f'{key} of {file.path} must be whole numbers [N + 1], got {array.dtype} {list(array.shape)}')
    # Unsigned numbers beyond int64 become negative here and are refused as such.
    array = array.astype(np.int64)
    if array[0] < 0 or array[-1] > end or (np.diff(array) < 0).any():
        raise UsageError(f'{key} of {file.path} must rise from >= 0 to at most {end}, the bytes that they point into')
    return array


def _labels(file: NpzFile, key: str, count: int, images_key: str) -> np.ndarray:
    """Whole-number labels [count] (still unchecked for range)."""
    labels = file[key]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in 'iu' or labels.ndim != 1:
        raise UsageError(
            f'{key} of {file.path} must be whole numbers [N], one class an image, got {labels.dtype} '
            f'{list(labels.shape)}'
        )
    if len(labels) != count:
        raise UsageError(f'{file.path} has {len(labels)} {key} for {count} images ({images_key}): they must agree')
    return labels.astype(np.int64)


def _class_names(file: NpzFile) -> tuple[str, ...] | None:
    if 'class_names' not in file:
        return None
    names = file['class_names']
    if names.ndim != 1 or names.dtype.kind not in 'US' or not len(names):
        raise UsageError(f'class_names of {file.path} must be text [C], got {names.dtype} {list(names.shape)}')
    return tuple(name.decode('utf-8', 'replace') if isinstance(name, bytes) else str(name) for name in names)


def _check_range(file: NpzFile, labels: np.ndarray, class_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The class names, `'0'`, `'1'`, ... where the file has none."""
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    # Without names the largest label decides how many classes there are: ids of another kind would make millions.
    limit = len(class_names) if class_names else max(len(labels), 1)
    if low < 0 or high >= limit:
        what = f'its {limit} class_names' if class_names else f'its {limit} images and no class_names'
        raise UsageError(
            f'labels of {file.path} run from {low} to {high}, which does not fit {what}: count classes from 0'
        )
    return class_names or tuple(map(str, range(high + 1)))


def _split_codes(file: NpzFile, count: int) -> np.ndarray:
    code = file['split']
    if code.dtype.kind not in 'iu' or code.shape != (count,):
        raise UsageError(
            f'split of {file.path} must be whole numbers [{count}], one an image, got {code.dtype} {list(code.shape)}'
        )
    if count and (code.min() < 0 or code.max() > _EXTRA):
        raise UsageError(
            f'split of {file.path} has values {code.min()}..{code.max()}: write 0 for train, 1 val, 2 test, 3 extra'
        )
    return code


def _where_train(file: NpzFile) -> str:
    return 'its split is never 0' if 'split' in file else 'its arrays are empty'


def _decode(
    source: _Source, index: np.ndarray, preprocess: Preprocess, on_bad_image: str
) -> tuple[Split, tuple[str, ...]]:
    """The examples `index` of a source, decoded; only these, so that no second copy of the whole set is ever held."""
    labels, open_image, name = source
    names = tuple(f'{name}[{i}]' for i in index)
    images, kept, unreadable = decode_all(lambda i: open_image(index[i]), names, preprocess, on_bad_image)
    chosen = labels[index[kept]].astype(np.int32)
    return Split(images, chosen, tuple(names[i] for i in kept)), unreadable
