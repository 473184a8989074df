"""Every task of the benchmarks with TFDS's own builders, over invented examples: splits, shapes, classes, labels."""

import pathlib

import numpy as np
import pytest

from vpt_jax.data import Preprocess, load
from vpt_jax.data.benchmarks import BENCHMARKS, TASKS, find_task
from vpt_jax.data.tfds_files import open_builder
from vpt_jax.errors import UsageError

tfds = pytest.importorskip('tensorflow_datasets')
mocking = pytest.importorskip('tensorflow_datasets.testing.mocking')

SMALL = Preprocess(8, 'bilinear')
WITH_TFDS = [(kind, task) for kind, rows in TASKS.items() for task in rows if task.tfds]
# The published numbers of examples of each TFDS split, and of test.
COUNTS = {
    'cifar100': {'train': 50000, 'test': 10000},
    'caltech101': {'train': 3059, 'test': 6084},
    'dtd': {'train': 1880, 'validation': 1880, 'test': 1880},
    'oxford_flowers102': {'train': 1020, 'validation': 1020, 'test': 6149},
    'oxford_iiit_pet': {'train': 3680, 'test': 3669},
    'svhn_cropped': {'train': 73257, 'test': 26032, 'extra': 531131},
    'sun397/tfds': {'train': 76127, 'validation': 10875, 'test': 21750},
    'patch_camelyon': {'train': 262144, 'validation': 32768, 'test': 32768},
    'eurosat/rgb': {'train': 27000},
    'resisc45': {'train': 31500},
    'diabetic_retinopathy_detection/btgraham-300': {'train': 35126, 'validation': 10906, 'test': 42670, 'sample': 10},
    'clevr': {'train': 70000, 'validation': 15000, 'test': 15000},
    'dmlab': {'train': 65550, 'validation': 22628, 'test': 22735},
    'kitti': {'train': 6347, 'validation': 423, 'test': 711},
    'dsprites': {'train': 737280},
    'smallnorb': {'train': 24300, 'test': 24300},
    'cifar10': {'train': 50000, 'test': 10000},
    'caltech_birds2011': {'train': 5994, 'test': 5794},
    'stanford_dogs': {'train': 12000, 'test': 8580},
    'cars196': {'train': 8144, 'test': 8041},
}
# As written out in the protocol: where val starts, and where test starts and how long it is.
VTAB_CUTS = {
    'cifar100': ('train', 45000, 'test', 0, 10000),
    'caltech101': ('train', 2753, 'test', 0, 6084),
    'dtd': ('validation', 0, 'test', 0, 1880),
    'flowers102': ('validation', 0, 'test', 0, 6149),
    'pets': ('train', 2944, 'test', 0, 3669),
    'svhn': ('train', 65931, 'test', 0, 26032),
    'sun397': ('validation', 0, 'test', 0, 21750),
    'patch_camelyon': ('validation', 0, 'test', 0, 32768),
    'eurosat': ('train', 16200, 'train', 21600, 5400),
    'resisc45': ('train', 18900, 'train', 25200, 6300),
    'retinopathy': ('validation', 0, 'test', 0, 42670),
    'clevr_count': ('train', 63000, 'validation', 0, 15000),
    'clevr_distance': ('train', 63000, 'validation', 0, 15000),
    'dmlab': ('validation', 0, 'test', 0, 22735),
    'kitti': ('validation', 0, 'test', 0, 711),
    'dsprites_location': ('train', 589824, 'train', 663552, 73728),
    'dsprites_orientation': ('train', 589824, 'train', 663552, 73728),
    'smallnorb_azimuth': ('test', 0, 'test', 12150, 12150),
    'smallnorb_elevation': ('test', 0, 'test', 12150, 12150),
}


def version_in_code(name):
    return str(tfds.builder(name, data_dir='/nowhere').info.version)


def write_metadata(root, name, counts, form='array_record'):
    """What TFDS leaves in a folder when it has prepared a set, without the examples."""
    builder = tfds.builder(name, data_dir=str(root), file_format=form)
    template = tfds.core.ShardedFileTemplate
    infos = [
        tfds.core.SplitInfo(
            name=split, shard_lengths=[count], num_bytes=0,
            filename_template=template(dataset_name=builder.name, data_dir=builder.data_dir, split=split,
                                       filetype_suffix=form),
        )
        for split, count in counts.items()
    ]  # fmt: skip
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.data_path.mkdir(parents=True, exist_ok=True)
    builder.info.write_to_directory(builder.data_dir)


class Invented(mocking.RandomFakeGenerator):
    """TFDS's generator of invented examples, with as many of every thing in a scene as of every other: 3 to 10."""

    def _generate_example(self, rng):
        self.objects = int(rng.integers(3, 11))
        return super()._generate_example(rng)

    def _generate_random_obj(self, feature, tensor_info, rng):
        shape = tensor_info.shape
        if isinstance(feature, tfds.features.Image) or not shape or shape[0] is not None:
            return super()._generate_random_obj(feature, tensor_info, rng)
        shape = (self.objects, *shape[1:])
        if tensor_info.np_dtype == np.object_:
            return np.array(['text'] * self.objects)
        high = getattr(feature, 'num_classes', None) or 25
        drawn = rng.uniform(0.5, high, shape)
        return np.minimum(drawn, high - 1).astype(tensor_info.np_dtype) if high < 25 else drawn.astype(np.float32)

    def __len__(self):
        return self._num_examples


@pytest.fixture
def invented(tmp_path):
    """Sets prepared in a folder, as far as TFDS can tell; few examples, so that all can be read."""
    few = 2000

    def as_data_source(builder, split, **_):
        return Invented(builder.info.features, builder.info.splits[split].num_examples, max_value=256)

    def prepared(name):
        counts = {split: min(count, few) for split, count in COUNTS[name].items()}
        for split in ('validation', 'test'):
            if split in counts:
                counts[split] = min(counts[split], 250)
        write_metadata(tmp_path, name, counts)
        return counts

    with tfds.testing.mock_data(data_dir=str(tmp_path), as_data_source_fn=as_data_source):
        yield prepared, tmp_path


def test_the_tables_are_complete():
    assert {kind: len(rows) for kind, rows in TASKS.items()} == {'vtab': 19, 'fgvc': 5, 'pgn': 12, 'ap': 4}
    groups = list(BENCHMARKS['vtab'].tasks.values())
    assert [groups.count(g) for g in ('Natural', 'Specialized', 'Structured')] == [7, 4, 8]
    classes = [task.classes for task in TASKS['vtab']]
    assert classes == [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    assert [task.classes for task in TASKS['fgvc']] == [200, 555, 102, 120, 196]
    assert len(BENCHMARKS['ap'].tasks) == 23
    for kind, rows in TASKS.items():
        names = [name for task in rows for name in (task.name, *task.aliases)]
        assert len(set(names)) == len(names)
        assert all(find_task(f'{kind}:{task.name}') is task for task in rows)


@pytest.mark.parametrize('task', TASKS['vtab'], ids=lambda task: task.name)
def test_vtab_is_cut_as_published(task):
    val_split, val_start, test_split, test_start, test_size = VTAB_CUTS[task.name]
    counts = COUNTS[task.tfds.name]
    cuts = task.tfds
    assert (cuts.train.split, cuts.train.bounds(counts['train'])) == ('train', (0, 800))
    assert (cuts.val.split, cuts.val.bounds(counts[val_split])) == (val_split, (val_start, val_start + 200))
    assert (cuts.test.split, cuts.test.bounds(counts[test_split])) == (test_split, (test_start, test_start + test_size))


@pytest.mark.parametrize(('kind', 'task'), WITH_TFDS, ids=[f'{kind}-{task.name}' for kind, task in WITH_TFDS])
def test_every_task_reads_its_builders_examples(invented, kind, task):
    prepared, folder = invented
    counts = prepared(task.tfds.name)
    dataset = load(f'{kind}:{task.name}', SMALL, data_dir=folder)
    assert dataset.num_classes == task.classes
    cuts = {'train': task.tfds.train, 'val': task.tfds.val, 'test': task.tfds.test}
    sizes = {split: np.ptp(cut.bounds(counts[cut.split])) for split, cut in cuts.items() if cut}
    if task.tfds.val is None:
        held_out = -(-sizes['train'] // 10)
        sizes = {'train': sizes['train'] - held_out, 'val': held_out, 'test': sizes['test']}
    if kind == 'vtab':
        assert (sizes['train'], sizes['val']) == (800, 200)
    for split, size in sizes.items():
        part = getattr(dataset, split)
        assert part.images.shape == (size, 8, 8, 3) and part.images.dtype == np.uint8
        assert part.labels.shape == (size,) and part.labels.min() >= 0 and part.labels.max() < task.classes
        assert len(set(part.names)) == size
    assert len(np.unique(dataset.train.labels)) > 1
    assert dataset.source == f'TFDS {task.tfds.name}:{version_in_code(task.tfds.name)}'
    both = dataset.with_val_in_train()
    assert len(both.train) == sizes['train'] + sizes['val'] and not len(both.val) and both.name.endswith('+val')


def test_a_builder_is_the_packages_own(invented):
    prepared, folder = invented
    prepared('clevr')
    builder = open_builder('clevr', version_in_code('clevr'), folder)
    assert type(builder).__module__.startswith('tensorflow_datasets.')
    assert builder.info.splits['train'].num_examples == 2000


def test_train_and_val_are_different_examples(invented):
    prepared, folder = invented
    prepared('cifar100')
    dataset = load('vtab:cifar100', SMALL, data_dir=folder)
    assert dataset.train.names[0] == 'cifar100/3.0.2 train[0]' and dataset.val.names[0] == 'cifar100/3.0.2 train[1800]'
    pixels = {image.tobytes() for split in (dataset.train, dataset.val) for image in split.images}
    assert len(pixels) == 1000


def test_classes_have_the_builders_names(invented):
    prepared, folder = invented
    prepared('eurosat/rgb')
    assert load('vtab:eurosat', SMALL, data_dir=folder).class_names[:2] == ('AnnualCrop', 'Forest')


def test_a_set_that_is_too_small_is_refused(invented):
    _, folder = invented
    write_metadata(folder, 'cifar100', {'train': 500, 'test': 10})
    with pytest.raises(UsageError, match='split train has 500 examples, too few for 800'):
        load('vtab:cifar100', SMALL, data_dir=folder)


def test_another_version_is_not_the_benchmark(tmp_path):
    (tmp_path / 'cifar100' / '2.0.0').mkdir(parents=True)
    (tmp_path / 'cifar100' / '2.0.0' / 'dataset_info.json').write_text('{}')
    with pytest.raises(UsageError, match='not on this machine'):
        load('vtab:cifar100', SMALL, data_dir=tmp_path)


def test_the_published_version_comes_before_newer_ones(tmp_path):
    for version in ('3.2.0', '3.3.0', '4.0.0', '5.0.0'):
        (tmp_path / 'oxford_iiit_pet' / version).mkdir(parents=True)
        (tmp_path / 'oxford_iiit_pet' / version / 'dataset_info.json').write_text('{}')
    pets = find_task('vtab:pets').tfds
    assert pets.find(tmp_path) == '3.2.0'
    (tmp_path / 'oxford_iiit_pet' / '3.2.0' / 'dataset_info.json').unlink()
    assert pets.find(tmp_path) == '4.0.0'


@pytest.mark.parametrize(
    ('name', 'parts'),
    [
        ('vtab:cifar100', ('cifar100 3.0.2', 'vtab-1k', 'python -m vpt_jax.fetch vtab:cifar100', '161 MiB', 'license')),
        ('fgvc:nabirds', ('nabirds.tar.gz', 'allaboutbirds', 'not for commercial use', 'vpt_jax.fetch fgvc:nabirds')),
        ('ap:gtsrb', ('GTSRB_Final_Test_GT.zip', '0.4 GiB')),
        ('pgn:ucf101', ('a folder ucf101', 'crcv.ucf.edu')),
    ],
)  # fmt: skip
def test_a_missing_task_says_how_to_get_it(tmp_path, name, parts):
    with pytest.raises(UsageError) as caught:
        load(name, SMALL, data_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f'{name} is not on this machine: looked in {tmp_path} for ') and '\n' not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ('name', 'flags', 'message'),
    [
        ('vtab:cifar10', {}, "unknown task of vtab 'cifar10': did you mean 'cifar100'"),
        ('fgvc:birds', {}, "unknown task of fgvc 'birds'"),
        ('vtab:svhn', {'source': 'torch'}, "unknown source 'torch'"),
        ('vtab', {}, 'must be written vtab:TASK'),
    ],
)
def test_mistakes_are_named(tmp_path, name, flags, message):
    with pytest.raises(UsageError, match=message):
        load(name, SMALL, data_dir=tmp_path, **flags)


def test_every_task_is_documented():
    page = (pathlib.Path(__file__).parents[2] / 'docs' / 'benchmarks.md').read_text()
    for rows in TASKS.values():
        for task in rows:
            assert f'| `{task.name}` | {task.classes} | ' in page
