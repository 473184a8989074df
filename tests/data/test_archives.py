"""The fine-grained sets and CoOp's in the layouts in which they are distributed, small ones made here."""

import csv
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vpt_jax.data import Preprocess, load
from vpt_jax.data.benchmarks import hold_out
from vpt_jax.data.benchmarks.fetch import fetch
from vpt_jax.errors import UsageError

SMALL = Preprocess(8, 'bilinear')


def shade(path, value):
    """An image of one grey level, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (9, 8), (value,) * 3).save(path)


def cells(names):
    out = np.empty((len(names), 1), object)
    out[:, 0] = names
    return out


def make_birds(root, ids):
    """Image i has class ids[i % len(ids)] and is a training image unless i % 3 is 0."""
    lines = {'images': [], 'image_class_labels': [], 'train_test_split': []}
    for i in range(30):
        name = f'{ids[i % len(ids)]:03d}.bird/Bird_{i:04d}.jpg'
        shade(root / 'images' / name, 8 * i)
        lines['images'].append(f'{i + 1} {name}')
        lines['image_class_labels'].append(f'{i + 1} {ids[i % len(ids)]}')
        lines['train_test_split'].append(f'{i + 1} {int(i % 3 != 0)}')
    for name, content in lines.items():
        (root / f'{name}.txt').write_text('\n'.join(content) + '\n')


def make_flowers(root):
    for i in range(1, 13):
        shade(root / 'jpg' / f'image_{i:05d}.jpg', 10 * i)
    savemat(root / 'imagelabels.mat', {'labels': (np.arange(12) % 2 + 1)[None]})
    sets = {'trnid': [[1, 2, 5, 6]], 'valid': [[3, 4]], 'tstid': [[7, 8, 9, 10, 11, 12]]}
    savemat(root / 'setid.mat', {key: np.array(value) for key, value in sets.items()})


def make_dogs(root, lists='lists'):
    (root / lists).mkdir(parents=True)
    for split, count in (('train', 20), ('test', 6)):
        names = [f'n{i % 2:08d}-dog/{split}_{i:02d}.jpg' for i in range(count)]
        for i, name in enumerate(names):
            shade(root / 'Images' / name, 10 * i)
        labels = (np.arange(count) % 2 + 1)[:, None]
        savemat(root / lists / f'{split}_list.mat', {'file_list': cells(names), 'labels': labels})


def make_cars(root):
    (root / 'devkit').mkdir(parents=True)
    for split, count in (('train', 20), ('test', 6)):
        rows = np.array([[(f'{i + 1:05d}.jpg', i % 2 + 1, 5) for i in range(count)]],
                        dtype=[('fname', object), ('class', object), ('bbox_x1', object)])  # fmt: skip
        for i in range(count):
            shade(root / f'cars_{split}' / f'{i + 1:05d}.jpg', 10 * i)
        name = 'devkit/cars_train_annos.mat' if split == 'train' else 'cars_test_annos_withlabels.mat'
        savemat(root / name, {'annotations': rows})


def make_gtsrb(root):
    def table(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'w', newline='') as file:
            writer = csv.writer(file, delimiter=';')
            writer.writerows([['Filename', 'Width', 'Height', 'ClassId'], *rows])

    for sign in range(2):
        folder = root / 'Final_Training' / 'Images' / f'{sign:05d}'
        for i in range(10):
            shade(folder / f'{i:05d}.ppm', 10 * i + sign)
        table(folder / f'GT-{sign:05d}.csv', [[f'{i:05d}.ppm', 9, 8, sign] for i in range(10)])
    for i in range(4):
        shade(root / 'Final_Test' / 'Images' / f'{i:05d}.ppm', i)
    table(root / 'GT-final_test.csv', [[f'{i:05d}.ppm', 9, 8, i % 2] for i in range(4)])


def lengths(dataset):
    return [len(dataset.train), len(dataset.val), len(dataset.test)]


@pytest.mark.parametrize(
    ('name', 'folder', 'ids'), [('cub', 'CUB_200_2011', (1, 2)), ('nabirds', 'nabirds', (295, 77))]
)
def test_birds(tmp_path, name, folder, ids):
    make_birds(tmp_path / folder, ids)
    dataset = load(f'fgvc:{name}', SMALL, data_dir=tmp_path)
    assert lengths(dataset) == [18, 2, 10] and dataset.source == f'archive {tmp_path / folder}'
    assert dataset.num_classes == {'cub': 200, 'nabirds': 555}[name]
    # Ids in their order, whatever they are: of (295, 77) the second is class 0.
    first, second = (0, 1) if ids[0] < ids[1] else (1, 0)
    assert dataset.test.labels.tolist() == [first, second] * 5
    assert [int(image[0, 0, 0]) for image in dataset.test.images] == pytest.approx([24 * i for i in range(10)], abs=2)


def test_flowers_has_its_own_validation_set(tmp_path):
    make_flowers(tmp_path / 'flowers')
    dataset = load('fgvc:flowers', SMALL, data_dir=tmp_path)
    assert lengths(dataset) == [4, 2, 6] and dataset.train.labels.tolist() == [0, 1, 0, 1]
    assert dataset.val.images[0].mean() == pytest.approx(30, abs=2)


@pytest.mark.parametrize('lists', ['lists', '.'])
def test_dogs(tmp_path, lists):
    make_dogs(tmp_path / 'fgvc' / 'StanfordDogs', lists)
    dataset = load('fgvc:dogs', SMALL, data_dir=tmp_path)
    assert lengths(dataset) == [18, 2, 6] and dataset.test.labels.tolist() == [0, 1] * 3


def test_cars(tmp_path):
    make_cars(tmp_path / 'stanford_cars')
    for name in ('fgvc:cars', 'ap:cars'):
        assert lengths(load(name, SMALL, data_dir=tmp_path)) == [18, 2, 6]


def test_gtsrb(tmp_path):
    make_gtsrb(tmp_path / 'GTSRB')
    dataset = load('ap:gtsrb', SMALL, data_dir=tmp_path)
    assert lengths(dataset) == [18, 2, 4] and dataset.num_classes == 43
    assert dataset.test.labels.tolist() == [0, 1, 0, 1]


def test_the_authors_split_comes_first(tmp_path):
    root = tmp_path / 'CUB_200_2011'
    make_birds(root, (1, 2))
    names = [line.split(' ', 1)[1] for line in (root / 'images.txt').read_text().splitlines()]
    parts = {'train': names[:6], 'val': names[6:8], 'test': names[8:]}
    for split, files in parts.items():
        (root / f'{split}.json').write_text(json.dumps({file: int(file[:3]) for file in files}))
    dataset = load('fgvc:cub', SMALL, data_dir=tmp_path)
    assert lengths(dataset) == [6, 2, 22] and dataset.source.startswith('json ')
    assert lengths(load('fgvc:cub', SMALL, data_dir=tmp_path, source='archive')) == [18, 2, 10]
    (root / 'test.json').write_text(json.dumps({names[0]: 9}))
    with pytest.raises(UsageError, match='the test split of fgvc:cub has class 9, of which train has no image'):
        load('fgvc:cub', SMALL, data_dir=tmp_path)


def test_coops_split_files(tmp_path):
    root = tmp_path / 'coop' / 'eurosat'
    rows = [[f'Forest/Forest_{i}.jpg', i % 2, 'forest'] for i in range(10)]
    for i, row in enumerate(rows):
        shade(root / '2750' / row[0], 10 * i)
    split = {'train': rows[:5], 'val': rows[5:7], 'test': rows[7:]}
    (root / 'split_zhou_EuroSAT.json').write_text(json.dumps(split))
    dataset = load('pgn:eurosat', SMALL, data_dir=tmp_path)
    assert lengths(dataset) == [5, 2, 3] and dataset.source == f'coop {root}'
    (root / 'split_zhou_EuroSAT.json').write_text('{"train": []}')
    with pytest.raises(UsageError, match='no split file of CoOp'):
        load('pgn:eurosat', SMALL, data_dir=tmp_path)


def test_the_held_out_tenth_depends_on_names_alone():
    names = [f'{i % 4}/{i:03d}.jpg' for i in range(105)]
    labels = np.arange(105) % 4
    train, val = hold_out(names, labels)
    assert len(val) == 11 and len(train) == 94 and not set(train) & set(val)
    assert np.bincount(labels[val]).tolist() in ([3, 3, 3, 2], [3, 3, 2, 3], [3, 2, 3, 3], [2, 3, 3, 3])
    shuffled = np.random.default_rng(0).permutation(105)
    _, again = hold_out([names[i].split('/')[1] for i in shuffled], labels[shuffled])
    assert {names[shuffled[i]] for i in again} == {names[i] for i in val}


@pytest.mark.parametrize(('count', 'val'), [(5994, 600), (23929, 2393), (12000, 1200), (8144, 815)])
def test_the_held_out_tenth_has_the_published_size(count, val):
    train, held_out = hold_out([f'{i:06d}.jpg' for i in range(count)], np.arange(count) % 50)
    assert (len(train), len(held_out)) == (count - val, val)


def pack(archive, folder, root):
    """Packs `folder`, named from `root` on."""
    if archive.suffix == '.zip':
        with zipfile.ZipFile(archive, 'w') as file:
            for path in sorted(folder.rglob('*')):
                file.write(path, path.relative_to(root))
    else:
        with tarfile.open(archive, 'w:gz' if archive.suffix in ('.gz', '.tgz') else 'w') as file:
            file.add(folder, folder.relative_to(root))


def test_archives_are_unpacked(tmp_path):
    make_birds(tmp_path / 'made' / 'CUB_200_2011', (1, 2))
    make_cars(tmp_path / 'made' / 'cars')
    make_gtsrb(tmp_path / 'made' / 'GTSRB')
    data = tmp_path / 'data'
    data.mkdir()
    made = tmp_path / 'made'
    pack(data / 'CUB_200_2011.tgz', made / 'CUB_200_2011', made)
    pack(data / 'cars_train.tgz', made / 'cars' / 'cars_train', made / 'cars')
    pack(data / 'cars_test.tgz', made / 'cars' / 'cars_test', made / 'cars')
    pack(data / 'car_devkit.tgz', made / 'cars' / 'devkit', made / 'cars')
    pack(data / 'GTSRB_Final_Training_Images.zip', made / 'GTSRB', made)
    assert 'was unpacked: archive' in fetch('fgvc:cub', data)
    assert 'is there already' in fetch('fgvc:cub', data)
    assert lengths(load('fgvc:cub', SMALL, data_dir=data)) == [18, 2, 10]
    fetch('fgvc:cars', data)
    with pytest.raises(UsageError, match=r'lacks cars_test_annos_withlabels\.mat'):
        load('fgvc:cars', SMALL, data_dir=data)
    fetch('ap:gtsrb', data)
    assert lengths(load('ap:gtsrb', SMALL, data_dir=data)) == [18, 2, 4]


def test_an_archive_cannot_write_elsewhere(tmp_path):
    with tarfile.open(tmp_path / 'CUB_200_2011.tgz', 'w:gz') as file:
        file.addfile(tarfile.TarInfo('CUB_200_2011'))
        outside = tarfile.TarInfo('../outside.txt')
        outside.size = 2
        file.addfile(outside, io.BytesIO(b'no'))
    with pytest.raises(UsageError, match='cannot unpack'):
        fetch('fgvc:cub', tmp_path)
    assert not (tmp_path.parent / 'outside.txt').exists()


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'fgvc:nabirds',
            r'cannot be downloaded by program: get nabirds\.tar\.gz from https://.*not for commercial use',
        ),
        ('pgn:ucf101', 'get split_zhou_UCF101.json and UCF-101-midframes from'),
        ('folder:x', 'unknown dataset to fetch'),
        ('vtab:', 'unknown dataset to fetch'),
        ('tfds:no_such_set', 'cannot build no_such_set'),
    ],
)
def test_what_cannot_be_fetched(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        fetch(name, tmp_path)


def test_damaged_annotations_are_named(tmp_path):
    make_flowers(tmp_path / 'flowers')
    (tmp_path / 'flowers' / 'setid.mat').write_bytes(b'nonsense')
    with pytest.raises(UsageError, match='cannot read the MATLAB file'):
        load('fgvc:flowers', SMALL, data_dir=tmp_path)
