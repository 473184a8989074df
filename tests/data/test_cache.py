"""Where decoded images are kept makes no difference to what comes out."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from vpt_jax.data import Batches, Preprocess, load
from vpt_jax.data.cache import Ragged, Streamed
from vpt_jax.errors import UsageError

SQUARE, CROPPED = Preprocess(8, 'vtab', 'flip'), Preprocess(14, 'fgvc', 'fgvc')
NONE = 1e-12  # GB: nothing fits


@pytest.fixture
def root(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path / 'cache'))
    return folder({'train/a': 5, 'train/b': 4, 'val/a': 3, 'test/b': 2})


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=0))


def assert_same(first, second, preprocess):
    for split in ('train', 'val', 'test'):
        a, b = getattr(first, split), getattr(second, split)
        assert a.names == b.names
        np.testing.assert_array_equal(a.labels, b.labels)
        for train in (True, False):
            one, other = (Batches(s, preprocess, 2, seed=3, train=train) for s in (a, b))
            for t in range(one.steps_per_epoch + 1):
                for key in ('image', 'label', 'weight'):
                    np.testing.assert_array_equal(one.batch(t)[key], other.batch(t)[key])


@pytest.mark.parametrize('preprocess', [SQUARE, CROPPED])
def test_a_file_equals_memory(root, preprocess, capsys):
    in_memory, in_file = (load(f'folder:{root}', preprocess, memory_gb=gb) for gb in (1, NONE))
    assert isinstance(in_file.train.images, np.memmap if preprocess is SQUARE else Ragged)
    assert 'decoding once into' in capsys.readouterr().err
    assert_same(in_memory, in_file, preprocess)
    again = load(f'folder:{root}', preprocess, memory_gb=NONE)
    assert 'decoding' not in capsys.readouterr().err
    assert_same(in_memory, again, preprocess)
    assert sorted(p.name for p in root.iterdir()) == ['.vpt_jax', 'test', 'train', 'val']


@pytest.mark.parametrize('preprocess', [SQUARE, CROPPED])
def test_streaming_equals_memory(root, preprocess, full_disk):
    in_memory, streamed = (load(f'folder:{root}', preprocess, memory_gb=gb) for gb in (1, NONE))
    assert isinstance(streamed.train.images, Streamed)
    assert_same(in_memory, streamed, preprocess)
    joined = streamed.with_val_in_train()
    both = in_memory.with_val_in_train().train
    assert [i.tobytes() for i in joined.train.images] == [i.tobytes() for i in both.images]


def test_a_changed_image_is_decoded_again(root, picture, capsys):
    from PIL import Image

    load(f'folder:{root}', SQUARE, memory_gb=NONE)
    Image.fromarray(picture(seed=77, height=9)).save(root / 'train' / 'a' / '000.png')
    capsys.readouterr()
    changed = load(f'folder:{root}', SQUARE, memory_gb=NONE)
    assert capsys.readouterr().err.count('decoding') == 1
    np.testing.assert_array_equal(changed.train.images[0], SQUARE.decode(picture(seed=77, height=9)))


def test_a_damaged_file_is_made_again(root, capsys):
    first = load(f'folder:{root}', SQUARE, memory_gb=NONE)
    expected = first.train.images.copy()
    for path in (root / '.vpt_jax').glob('*/pixels'):
        path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    again = load(f'folder:{root}', SQUARE, memory_gb=NONE)
    assert capsys.readouterr().err.count('decoding') == 3
    np.testing.assert_array_equal(again.train.images, expected)


def test_where_the_data_cannot_be_written_the_cache_is_used(root, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, 'disk_usage', lambda path: SimpleNamespace(free=0) if '.vpt_jax' in str(path) else real(path)
    )
    assert isinstance(load(f'folder:{root}', SQUARE, memory_gb=NONE).train.images, np.memmap)
    assert list((tmp_path / 'cache' / 'decoded').glob('*/pixels'))


@pytest.mark.parametrize('streams', [False, True])
def test_unreadable_images_are_named_or_skipped(root, request, streams):
    if streams:
        request.getfixturevalue('full_disk')
    bad = root / 'train' / 'a' / '001.png'
    bad.write_bytes(b'no image')
    dataset = load(f'folder:{root}', SQUARE, memory_gb=NONE, on_bad_image='skip')
    assert len(dataset.train) == 8 and dataset.unreadable == (str(bad),)
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(UsageError, match=r'cannot read the image .*001\.png'):
        images = load(f'folder:{root}', SQUARE, memory_gb=NONE).train.images
        [images[i] for i in range(len(images))]
    assert not list(root.rglob('pixels.*'))


def test_an_interrupted_writer_leaves_nothing_that_looks_whole(root, monkeypatch):
    from vpt_jax.data import cache

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.np, 'savez', stop)
    with pytest.raises(KeyboardInterrupt):
        load(f'folder:{root}', SQUARE, memory_gb=NONE)
    assert not list((root / '.vpt_jax').iterdir())
