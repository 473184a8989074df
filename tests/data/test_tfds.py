"""A real small TFDS set, written to disk and read back in both formats, and `tfds:NAME`."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from vpt_jax.data import Preprocess, load, tfds_files
from vpt_jax.data.records import Records, masked_crc32c
from vpt_jax.errors import UsageError

tfds = pytest.importorskip('tensorflow_datasets')
SIZES = {'train': 30, 'validation': 7, 'test': 9}


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (6, 5, 3), np.uint8)


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Image i of each split is `pixels(i)` and has class i % 3."""

    VERSION = tfds.core.Version('1.2.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ('whole', 'train_only', 'no_labels')]  # noqa: RUF012
    pkg_dir_path = '.'

    def _info(self):
        features = {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'label': tfds.features.ClassLabel(names=['a', 'b', 'c']),
            'objects': tfds.features.Sequence({'at': tfds.features.Tensor(shape=(3,), dtype=np.float32)}),
        }
        if self.builder_config.name == 'no_labels':
            features['label'] = np.float32
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=('image', 'label')
        )

    def _split_generators(self, dl_manager):
        only = self.builder_config.name == 'train_only'
        return {s: self._generate_examples(n) for s, n in SIZES.items() if not only or s == 'train'}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(pixels(i)).save(file, 'PNG')
            file.seek(0)
            yield i, {'image': file, 'label': i % 3, 'objects': [{'at': [i, j, 0.5]} for j in range(i % 4)]}


def write_tfrecord(path, records):
    with open(path, 'wb') as file:
        for record in records:
            header = struct.pack('<Q', len(record))
            file.write(header + struct.pack('<I', masked_crc32c(header)) + record)
            file.write(struct.pack('<I', masked_crc32c(record)))


def as_tfrecord(folder):
    """Turns a prepared set into the same in TFDS's older format, two shards a split."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    builder = tfds.builder_from_directory(str(folder))
    info = (folder / 'dataset_info.json').read_text().replace('array_record', 'tfrecord')
    for split, count in SIZES.items():
        if split not in builder.info.splits:
            continue
        (path,) = folder.glob(f'tiny-{split}.array_record-*')
        source = ArrayRecordDataSource([str(path)])
        records = [source[i] for i in range(count)]
        for shard, part in enumerate((records[:4], records[4:])):
            write_tfrecord(folder / f'tiny-{split}.tfrecord-0000{shard}-of-00002', part)
        path.unlink()
        info = info.replace(f'"{count}"', f'"4", "{count - 4}"', 1)
    (folder / 'dataset_info.json').write_text(info)


@pytest.fixture(scope='module', params=['array_record', 'tfrecord'])
def tiny(request, tmp_path_factory):
    """The folder of the prepared set."""
    root = tmp_path_factory.mktemp(request.param)
    for config in ('whole', 'train_only', 'no_labels'):
        Tiny(config=config, data_dir=str(root), file_format='array_record').download_and_prepare()
        if request.param == 'tfrecord':
            as_tfrecord(root / 'tiny' / config / '1.2.0')
    return root


@pytest.fixture(scope='module')
def both_formats(tmp_path_factory):
    root = tmp_path_factory.mktemp('both')
    Tiny(config='whole', data_dir=str(root), file_format='array_record').download_and_prepare()
    first = load('tfds:tiny/whole', Preprocess(6, 'bilinear'), data_dir=root)
    as_tfrecord(root / 'tiny' / 'whole' / '1.2.0')
    return first, load('tfds:tiny/whole', Preprocess(6, 'bilinear'), data_dir=root)


def test_what_was_written_is_read(tiny):
    preprocess = Preprocess(6, 'bilinear')
    dataset = load('tfds:tiny/whole', preprocess, data_dir=tiny)
    assert dataset.class_names == ('a', 'b', 'c') and dataset.source == 'TFDS tiny/whole:1.2.0'
    for split, count in (('train', 30), ('val', 7), ('test', 9)):
        part = getattr(dataset, split)
        expected = {preprocess.decode(pixels(i)).tobytes(): i % 3 for i in range(count)}
        assert len(part) == count
        assert {image.tobytes(): int(label) for image, label in zip(part.images, part.labels, strict=True)} == expected


def test_both_formats_have_the_same_order(both_formats):
    first, second = both_formats
    for split in ('train', 'val', 'test'):
        np.testing.assert_array_equal(getattr(first, split).images, getattr(second, split).images)
        np.testing.assert_array_equal(getattr(first, split).labels, getattr(second, split).labels)


def test_reading_does_not_import_tensorflow(tiny):
    load('tfds:tiny/whole', Preprocess(6), data_dir=tiny)
    assert 'tensorflow' not in sys.modules


def test_annotations_come_with_the_examples(tiny):
    builder = tfds_files.open_builder('tiny/whole', '1.2.0', tiny)
    counted = tfds_files.fields(builder, 'train', 3, 30, lambda e: (int(e['label']), len(e['objects']['at'])))
    by_number = [(i % 3, i % 4) for i in range(30)]
    assert len(counted) == 27 and set(counted) <= set(by_number)


def test_a_version_may_be_asked_for(tiny):
    assert load('tfds:tiny/whole:1.2.0', Preprocess(6), data_dir=tiny).num_classes == 3
    with pytest.raises(UsageError, match=r'tiny/whole:1.3.0 is not prepared in .* vpt_jax.fetch'):
        load('tfds:tiny/whole:1.3.0', Preprocess(6), data_dir=tiny)


def test_a_set_without_test_is_cut_by_seed(tiny):
    dataset = load('tfds:tiny/train_only', Preprocess(6), data_dir=tiny, seed=1)
    parts = [dataset.train, dataset.val, dataset.test]
    assert [len(part) for part in parts] == [24, 3, 3]
    assert len({name for part in parts for name in part.names}) == 30
    assert dataset.test.labels.tolist().count(0) == 1


def test_a_set_without_classes_is_refused(tiny):
    with pytest.raises(UsageError, match='is no image classification set: its features are image, label'):
        load('tfds:tiny/no_labels', Preprocess(6), data_dir=tiny)


def test_the_environment_says_where(tiny, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tiny))
    assert len(load('tfds:tiny/whole', Preprocess(6)).test) == 9


def test_checksums_are_googles():
    # Known values: CRC-32C of nine digits, and the masked form that TensorFlow writes for the length 3.
    unmasked = (masked_crc32c(b'123456789') - 0xA282EAD8) & 0xFFFFFFFF
    assert (unmasked << 15 | unmasked >> 17) & 0xFFFFFFFF == 0xE3069283


@pytest.mark.parametrize('damage', ['cut', 'header', 'count', 'missing', 'empty'])
def test_damaged_record_files_are_named(tmp_path, damage):
    path = tmp_path / 'set.tfrecord-00000-of-00001'
    write_tfrecord(path, [b'one', b'two', b''])
    assert [Records([path], [3])[i] for i in range(3)] == [b'one', b'two', b'']
    content = path.read_bytes()
    changed = {
        'cut': content[:-5],
        'header': b'\x09' + content[1:],
        'count': content[: len(content) - 16],
        'empty': b'',
    }
    path.write_bytes(changed.get(damage, content))
    if damage == 'missing':
        path.unlink()
    with pytest.raises(UsageError, match=r'record file .*set\.tfrecord.* prepare'):
        Records([path], [3])[0]


def test_a_damaged_set_is_named(tmp_path):
    folder = tmp_path / 'broken' / '1.0.0'
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text('{"name": ')
    with pytest.raises(UsageError, match='cannot be opened'):
        load('tfds:broken', Preprocess(6), data_dir=tmp_path)
