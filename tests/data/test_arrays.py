import io
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from vpt_jax.data import Preprocess, load
from vpt_jax.errors import UsageError

SIZE = 8
PREPROCESS = Preprocess(SIZE, 'bicubic')


@pytest.fixture
def save(tmp_path):
    """Writes an .npz file and gives the dataset's name."""

    def write(**arrays):
        path = tmp_path / 'set.npz'
        np.savez(path, **arrays)
        return f'npz:{path}'

    return write


def plain(count=20, classes=2, shape=(SIZE, SIZE, 3)):
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    return {'images': images, 'labels': np.arange(count) % classes}


def packed(pictures, labels, **more):
    """JPEG files with their headers stored apart, as the module's docstring describes."""
    bodies, headers, header_id = [], [], []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, 'JPEG', quality=90)
        file = buffer.getvalue()
        start = file.index(b'\xff\xda')
        start += 2 + int.from_bytes(file[start + 2 : start + 4], 'big')
        if file[:start] not in headers:
            headers.append(file[:start])
        header_id.append(headers.index(file[:start]))
        bodies.append(file[start:])
    arrays = {
        'jpeg_data': np.frombuffer(b''.join(bodies), np.uint8),
        'jpeg_offsets': np.cumsum([0, *map(len, bodies)]),
        'jpeg_headers': np.frombuffer(b''.join(headers), np.uint8),
        'jpeg_header_offsets': np.cumsum([0, *map(len, headers)]),
        'jpeg_header_id': np.array(header_id, np.uint8),
        'labels': np.array(labels, np.int32),
        'size': np.array(pictures[0].shape, np.int32),
    }
    return arrays | more


def test_a_split_in_the_file_is_kept(save):
    arrays = plain(8)
    split = np.array([0, 0, 1, 2, 2, 3, 0, 2], np.uint8)
    dataset = load(save(**arrays, split=split, class_names=np.array(['cat', 'dog'])), PREPROCESS)
    assert dataset.class_names == ('cat', 'dog')
    for number, part in enumerate((dataset.train, dataset.val, dataset.test)):
        np.testing.assert_array_equal(part.images, arrays['images'][split == number])
        np.testing.assert_array_equal(part.labels, arrays['labels'][split == number])
        assert part.labels.dtype == np.int32
    assert dataset.val.names[0].endswith('[2]')


def test_without_a_split_the_seed_decides(save):
    name = save(**plain(40, 4))
    dataset, other = load(name, PREPROCESS), load(name, PREPROCESS, seed=1)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [32, 4, 4]
    assert sorted(dataset.test.labels.tolist()) == [0, 1, 2, 3] and dataset.test.names != other.test.names
    assert dataset.class_names == ('0', '1', '2', '3')


def test_arrays_of_their_own_for_each_split(save):
    train, test = plain(6), plain(4)
    arrays = {f'train_{k}': v for k, v in train.items()} | {f'test_{k}': v[..., None] for k, v in test.items()}
    arrays['test_images'] = test['images']  # labels [N, 1], as MedMNIST has them
    dataset = load(save(**arrays), PREPROCESS)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [6, 0, 4]
    np.testing.assert_array_equal(dataset.test.labels, test['labels'])
    only_train = {k: v for k, v in arrays.items() if k.startswith('train')}
    assert len(load(save(**only_train), PREPROCESS).test) > 0


@pytest.mark.parametrize('shape', [(6, 9), (6, 9, 1), (6, 9, 3)])
def test_grey_and_colour_of_any_size(save, shape):
    arrays = plain(10, shape=shape)
    dataset = load(save(**arrays, split=np.zeros(10, int)), PREPROCESS)
    np.testing.assert_array_equal(dataset.train.images[3], PREPROCESS.decode(arrays['images'][3]))


def test_packed_jpeg_files(save, picture):
    pictures = [picture(SIZE, SIZE, seed) for seed in range(10)]
    split = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    dataset = load(save(**packed(pictures, np.arange(10) % 2, split=split)), PREPROCESS)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [4, 2, 2]
    assert abs(dataset.test.images[1].astype(int) - pictures[7]).max() < 40  # JPEG is lossy
    assert dataset.test.labels.tolist() == [0, 1]


def test_packed_grey_jpeg_files_and_two_headers(save, picture):
    pictures = [picture(12, 10, s)[..., 0] for s in range(4)] + [picture(12, 10, 9)]
    arrays = packed(pictures, [0, 1, 0, 1, 1], split=np.zeros(5, int))
    assert len(arrays['jpeg_header_offsets']) == 3
    assert load(save(**arrays), Preprocess(14, 'fgvc')).train.images[0].shape == (19, 16, 3)


def test_a_damaged_packed_image_is_named_or_skipped(save, picture):
    arrays = packed([picture(SIZE, SIZE, s) for s in range(6)], [0, 1] * 3, split=np.zeros(6, int))
    arrays['jpeg_offsets'][2:-1] = arrays['jpeg_offsets'][2]  # the third to fifth file have no bytes left
    name = save(**arrays)
    with pytest.raises(UsageError, match=r'set\.npz\[2\]'):
        load(name, PREPROCESS)
    assert len(load(name, PREPROCESS, on_bad_image='skip').unreadable) == 3


def test_a_packed_image_of_another_size_is_named(save, picture):
    arrays = packed([picture(SIZE, SIZE), picture(40, 40)], [0, 1], split=np.zeros(2, int))
    with pytest.raises(UsageError, match='40 x 40 pixels, where size says 8 x 8'):
        load(save(**arrays), PREPROCESS)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'labels': np.arange(19) % 2}, '19 labels for 20 images'),
        ({'labels': np.zeros(20)}, 'labels .* whole numbers .* float64'),
        ({'labels': np.zeros((20, 4), int)}, 'labels .* one class an image'),
        ({'labels': np.arange(20) - 1}, 'run from -1 to 18'),
        ({'labels': np.arange(20) * 1000}, 'no class_names: count classes from 0'),
        ({'class_names': np.array(['one'])}, 'run from 0 to 1, which does not fit its 1 class_names'),
        ({'class_names': np.arange(2)}, 'class_names .* must be text'),
        ({'class_names': np.array(['a', None])}, 'holds Python objects, which vpt_jax never unpickles'),
        ({'images': np.array([None] * 20)}, 'holds Python objects, which vpt_jax never unpickles'),
        ({'images': np.zeros((20, 8, 8, 3), np.float32)}, 'images .* must be uint8 .* float32'),
        ({'images': np.zeros((20, 3, 8, 8), np.uint8)}, r'channels first: save images\.transpose'),
        ({'images': np.zeros((20, 8, 8, 4), np.uint8)}, 'must have the shape'),
        ({'split': np.zeros(19, int)}, r'split .* whole numbers \[20\]'),
        ({'split': np.full(20, 7)}, 'split .* values 7..7'),
        ({'split': np.full(20, 2)}, 'no training example: its split is never 0'),
    ],
)
def test_arrays_that_do_not_fit_are_named(save, change, message):
    with pytest.raises(UsageError, match=message):
        load(save(**(plain() | change)), PREPROCESS)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'jpeg_offsets': np.array([0, 10, 10**9])}, 'jpeg_offsets .* must rise'),
        ({'jpeg_offsets': np.array([-5, 10, 20])}, 'jpeg_offsets .* must rise'),
        ({'jpeg_offsets': np.array([0, 20, 10])}, 'jpeg_offsets .* must rise'),
        ({'jpeg_offsets': np.array([0, 2**64 - 1, 10], np.uint64)}, 'jpeg_offsets .* must rise'),
        ({'jpeg_header_id': np.array([0, 1], np.uint8)}, 'jpeg_header_id .* 0..0'),
        ({'jpeg_header_id': np.array([0], np.uint8)}, r'jpeg_header_id .* \[2\]'),
        ({'jpeg_header_offsets': np.array([0.0, 1.0])}, 'jpeg_header_offsets .* whole numbers'),
        ({'jpeg_data': np.zeros(100)}, 'jpeg_data .* must be uint8'),
        ({'labels': np.zeros(3, int)}, '3 labels for 2 images'),
    ],
)
def test_packed_arrays_that_do_not_fit_are_named(save, picture, change, message):
    arrays = packed([picture(SIZE, SIZE), picture(SIZE, SIZE, 1)], [0, 1])
    with pytest.raises(UsageError, match=message):
        load(save(**(arrays | change)), PREPROCESS)


def test_files_that_are_none(save, tmp_path):
    with pytest.raises(UsageError, match='does not exist'):
        load(f'npz:{tmp_path}/nowhere.npz', PREPROCESS)
    with pytest.raises(UsageError, match='is a folder'):
        load(f'npz:{tmp_path}', PREPROCESS)
    with pytest.raises(UsageError, match='holds other: expected images and labels'):
        load(save(other=np.zeros(3)), PREPROCESS)
    with pytest.raises(UsageError, match="lacks 'labels': it holds images"):
        load(save(images=plain()['images']), PREPROCESS)


def test_a_file_cut_short_or_damaged_is_named(save, tmp_path):
    name = save(**plain())
    path = tmp_path / 'set.npz'
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match='is cut short'):
        load(name, PREPROCESS)
    path.write_bytes(whole[:1000] + bytes(50) + whole[1050:])
    with pytest.raises(UsageError, match=r"'images' of .* is damaged"):
        load(name, PREPROCESS)


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(save, tmp_path):
    header = io.BytesIO()
    claim = {'descr': '|u1', 'fortran_order': False, 'shape': (10**9, 224, 224, 3)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(tmp_path / 'bomb.npz', 'w') as archive:
        archive.writestr('images.npy', header.getvalue() + bytes(100))
    with pytest.raises(UsageError, match='its header says'):
        load(f'npz:{tmp_path}/bomb.npz', PREPROCESS)


def test_a_real_packed_set(shared_data):
    path = shared_data / 'neu6_64.npz'
    if not path.is_file():
        pytest.skip(f'no file {path}')
    start = time.monotonic()
    dataset = load(f'npz:{path}', Preprocess(64, 'bicubic'))
    assert time.monotonic() - start < 20
    assert dataset.num_classes == 6 and [len(dataset.train), len(dataset.val), len(dataset.test)] == [800, 200, 799]
