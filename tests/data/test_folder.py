import numpy as np
import pytest
from PIL import Image

from vpt_jax.data import Batches, Preprocess, load
from vpt_jax.errors import UsageError

SMALL = Preprocess(8)


def read(root, **flags):
    return load(f'folder:{root}', SMALL, **flags)


def lengths(dataset):
    return [len(dataset.train), len(dataset.val), len(dataset.test)]


def test_splits_as_given(folder, picture):
    root = folder({'train/dog': 2, 'train/cat': 3, 'val/cat': 1, 'test/dog': 2})
    dataset = read(root)
    assert dataset.class_names == ('cat', 'dog') and lengths(dataset) == [3 + 2, 1, 2]
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1] and dataset.test.labels.tolist() == [1, 1]
    assert dataset.train.labels.dtype == np.int32 and dataset.unreadable == ()
    assert dataset.train.names[3].endswith('train/dog/000.png')
    np.testing.assert_array_equal(dataset.train.images[3], SMALL.decode(picture(seed=0)))


@pytest.mark.parametrize('suffix', ['.jpg', '.JPEG', '.webp', '.bmp'])
def test_formats(folder, suffix):
    assert lengths(read(folder({'train/a': 2, 'test/a': 1}, suffix))) == [2, 0, 1]


def test_without_test_val_is_the_test_split(folder):
    dataset = read(folder({'train/a': 3, 'train/b': 3, 'valid/a': 2, 'valid/b': 2}))
    assert lengths(dataset) == [6, 0, 4] and 'valid' in dataset.test.names[0]


@pytest.mark.parametrize('tree', ['', 'train/'])
def test_without_val_and_test_train_is_split_by_seed(folder, tree):
    root = folder({f'{tree}a': 20, f'{tree}b': 10})
    dataset, again, other = read(root), read(root), read(root, seed=1)
    assert lengths(dataset) == [24, 3, 3]
    names = [set(s.names) for s in (dataset.train, dataset.val, dataset.test)]
    assert len(set.union(*names)) == 30
    assert dataset.test.labels.tolist() == [0, 0, 1]
    assert dataset.test.names == again.test.names != other.test.names


def test_a_class_may_be_called_train(folder):
    dataset = read(folder({'train': 10, 'boat': 10}))
    assert dataset.class_names == ('boat', 'train')


def test_links_and_hidden_files(folder, tmp_path):
    root = folder({'real/a': 4, 'real/b': 4})
    (root / 'linked').mkdir()
    for name in 'ab':
        (root / 'linked' / name).symlink_to(root / 'real' / name)
    (root / 'real' / '.cache').mkdir()
    (root / 'real' / 'a' / '._000.png').write_bytes(b'resource fork')
    (root / 'real' / 'a' / 'notes.txt').write_text('not an image')
    assert sum(lengths(read(root / 'linked'))) == sum(lengths(read(root / 'real'))) == 8


@pytest.mark.parametrize('damage', ['text', 'cut', 'empty', 'link'])
def test_an_unreadable_image_is_named_or_skipped(folder, damage):
    root = folder({'train/a': 3, 'train/b': 3, 'test/a': 2}, '.jpg')
    path = root / 'train' / 'b' / '001.jpg'
    whole = path.read_bytes()
    path.unlink()
    if damage == 'link':
        path.symlink_to(root / 'nowhere.jpg')
    else:
        path.write_bytes({'text': b'not an image', 'cut': whole[: len(whole) // 2], 'empty': b''}[damage])
    with pytest.raises(UsageError, match=r'cannot read the image .*train/b/001\.jpg \(.+\).*on_bad_image') as caught:
        read(root)
    assert '\n' not in str(caught.value)
    dataset = read(root, on_bad_image='skip')
    assert lengths(dataset) == [5, 0, 2] and dataset.unreadable == (str(path),)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1] and len(dataset.train.images) == 5


def test_skipping_works_for_ragged_images(folder):
    root = folder({'train/a': 3, 'test/a': 1})
    (root / 'train' / 'a' / '000.png').write_bytes(b'')
    dataset = load(f'folder:{root}', Preprocess(14, 'fgvc', 'fgvc'), on_bad_image='skip')
    assert [image.shape for image in dataset.train.images] == [(16, 24, 3)] * 2
    assert dataset.val.images == []
    batch = Batches(dataset.train, Preprocess(14, 'fgvc', 'fgvc'), 2).batch(0)
    assert batch['image'].shape == (2, 14, 14, 3)


def test_a_class_with_nothing_readable_is_refused(folder):
    root = folder({'train/a': 1, 'train/b': 1})
    (root / 'train' / 'b' / '000.png').write_bytes(b'')
    with pytest.raises(UsageError, match=r'no training image of these classes could be read.*: b'):
        read(root, on_bad_image='skip')


def test_an_empty_class_is_named_or_skipped(folder):
    root = folder({'train/a': 2, 'train/b': 2, 'train/void': 0, 'test/a': 1})
    with pytest.raises(UsageError, match=r'without images.*void.*on_empty_class'):
        read(root)
    assert read(root, on_empty_class='skip').class_names == ('a', 'b')


def test_a_class_that_train_lacks_is_named(folder):
    with pytest.raises(UsageError, match=r'test has classes that .*train lacks: bird'):
        read(folder({'train/a': 1, 'test/a': 1, 'test/bird': 1}))


def test_a_missing_train_split_is_named(folder):
    with pytest.raises(UsageError, match='test but no train/<class> folders'):
        read(folder({'test/a': 1}))


def test_two_validation_folders_are_refused(folder):
    with pytest.raises(UsageError, match='val and valid: keep one'):
        read(folder({'train/a': 1, 'val/a': 1, 'valid/a': 1}))


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UsageError, match='nowhere does not exist'):
        read(tmp_path / 'nowhere')
    Image.new('RGB', (4, 4)).save(tmp_path / 'lonely.png')
    with pytest.raises(UsageError, match='is a file, not a folder'):
        read(tmp_path / 'lonely.png')
    with pytest.raises(UsageError, match='holds no class folder with images'):
        read(tmp_path)
