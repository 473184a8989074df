import numpy as np
import pytest
from PIL import Image

from vpt_jax.data import Preprocess, load
from vpt_jax.errors import UsageError

SMALL = Preprocess(8)


@pytest.fixture
def write(tmp_path, picture):
    """`write('train.txt', ['a/0.png 1', ...])` writes a list and the images that it names."""

    def make(name, lines, inside=''):
        for line in lines:
            path = tmp_path / inside / line.rpartition(' ')[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(seed=len(line))).save(path)
        (tmp_path / name).write_text('\n'.join(lines) + '\n\n')
        return tmp_path

    return make


def lengths(dataset):
    return [len(dataset.train), len(dataset.val), len(dataset.test)]


def vtab(write, inside=''):
    write('train800.txt', [f'train/{i}.png {i % 3}' for i in range(8)], inside)
    write('val200.txt', ['val/a photo.png 2', 'val/1.png 0'], inside)
    root = write('test.txt', ['test/0.png 1'], inside)
    both = (root / 'train800.txt').read_text() + (root / 'val200.txt').read_text()
    (root / 'train800val200.txt').write_text(both)
    return root


@pytest.mark.parametrize('inside', ['', 'images'])
def test_vtabs_lists(write, inside):
    dataset = load(f'lists:{vtab(write, inside)}', SMALL)
    assert lengths(dataset) == [8, 2, 1] and dataset.class_names == ('0', '1', '2')
    assert dataset.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and dataset.val.labels.tolist() == [2, 0]
    assert dataset.val.names[0].endswith('val/a photo.png')
    assert len(dataset.with_val_in_train().train) == 10


def test_a_folder_of_lists_is_a_source_of_vtab(write, tmp_path):
    vtab(write)
    (tmp_path / 'vtab-1k').mkdir()
    home = tmp_path / 'vtab-1k' / 'smallnorb_ele'
    home.symlink_to(tmp_path)
    for name in ('smallnorb_elevation', 'smallnorb_ele'):
        dataset = load(f'vtab:{name}', SMALL, data_dir=tmp_path)
        assert dataset.name == 'vtab:smallnorb_elevation' and dataset.num_classes == 9
        assert lengths(dataset) == [8, 2, 1] and dataset.source == f'lists {home}'


def test_labels_that_the_task_does_not_have_are_refused(write, tmp_path):
    vtab(write)
    (tmp_path / 'patch_camelyon').symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r'labels of .*patch_camelyon run from 0 to 2: expected 0\.\.1'):
        load('vtab:patch_camelyon', SMALL, data_dir=tmp_path, source='lists')


def test_train_val_test(write):
    write('train.txt', ['0.png 0', '1.png 1'])
    write('val.txt', ['2.png 1'])
    root = write('classes.txt', [])
    (root / 'classes.txt').write_text('cat\ndog\n')
    assert lengths(load(f'lists:{root}', SMALL)) == [2, 0, 1]  # without test, val is the test split
    write('test.txt', ['3.png 0'])
    dataset = load(f'lists:{root}', SMALL)
    assert lengths(dataset) == [2, 1, 1] and dataset.class_names == ('cat', 'dog')


def test_one_list_is_cut_by_seed(write):
    root = write('all.txt', [f'{i}.png {i % 2}' for i in range(20)])
    dataset = load(f'lists:{root}/all.txt', SMALL, seed=3)
    assert lengths(dataset) == [16, 2, 2] and sorted(dataset.test.labels) == [0, 1]
    assert dataset.test.names == load(f'lists:{root}/all.txt', SMALL, seed=3).test.names
    assert dataset.test.names != load(f'lists:{root}/all.txt', SMALL, seed=4).test.names


def test_the_joined_list_alone(write):
    write('train800val200.txt', ['0.png 0', '1.png 1'])
    assert lengths(load(f'lists:{write("test.txt", ["2.png 1"])}', SMALL)) == [2, 0, 1]


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('0.png', r"line 1 of .*train\.txt is '0\.png': expected `path label`"),
        ('0.png cat', 'expected `path label`'),
        ('0.png -1', 'expected `path label`'),
        ('0.png 7', r'run from 7 to 7: expected 0\.\.1'),
    ],
)
def test_lines_that_are_none(tmp_path, line, message):
    (tmp_path / 'train.txt').write_text(line)
    (tmp_path / 'test.txt').write_text('')
    (tmp_path / 'classes.txt').write_text('cat\ndog')
    with pytest.raises(UsageError, match=message):
        load(f'lists:{tmp_path}', SMALL)


def test_a_missing_image_is_named_or_skipped(write):
    root = write('train.txt', ['0.png 0', '1.png 1'])
    write('test.txt', ['2.png 0'])
    (root / '1.png').unlink()
    with pytest.raises(UsageError, match=r'cannot read the image .*1\.png \(the file does not exist\)'):
        load(f'lists:{root}', SMALL)
    dataset = load(f'lists:{root}', SMALL, on_bad_image='skip')
    assert lengths(dataset) == [1, 0, 1] and len(dataset.unreadable) == 1


def test_folders_without_lists(tmp_path):
    with pytest.raises(UsageError, match=r'holds no train800\.txt or train\.txt'):
        load(f'lists:{tmp_path}', SMALL)
    with pytest.raises(UsageError, match='does not exist'):
        load(f'lists:{tmp_path}/nowhere', SMALL)


def test_pixels_are_those_of_the_files(write, picture):
    root = write('train.txt', ['0.png 0'])
    write('test.txt', ['1.png 0'])
    dataset = load(f'lists:{root}', SMALL)
    np.testing.assert_array_equal(dataset.train.images[0], SMALL.decode(picture(seed=len('0.png 0'))))
