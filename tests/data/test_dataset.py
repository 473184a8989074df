import numpy as np
import pytest

from vpt_jax.data import Dataset, Preprocess, Split, load
from vpt_jax.data.dataset import READERS
from vpt_jax.data.stratify import eight_one_one, stratified
from vpt_jax.errors import UsageError


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('digit', "did you mean 'digits'.*folder:PATH"),
        ('cifar10', "unknown dataset 'cifar10'.*folder:PATH.*npz:PATH"),
        ('digits:3', 'must be written digits '),
        ('folder', 'must be written folder:PATH'),
        ('npz:', 'must be written npz:PATH'),
        ('birds.npz', 'a path is written npz:birds.npz'),
    ],
)
def test_a_wrong_name_says_how_to_write_it(name, message):
    with pytest.raises(UsageError, match=message):
        load(name, Preprocess(8))


def test_a_bare_path_says_how_to_write_it(tmp_path):
    with pytest.raises(UsageError, match='a path is written folder:'):
        load(str(tmp_path), Preprocess(8))


@pytest.mark.parametrize('flags', [{'on_bad_image': 'ignore'}, {'on_empty_class': 'drop'}, {'seed': -1}, {'seed': 0.5}])
def test_wrong_flags_are_named(flags):
    with pytest.raises(UsageError, match=next(iter(flags))):
        load('digits', Preprocess(8), **flags)


def test_a_new_kind_of_dataset_is_one_line(monkeypatch):
    monkeypatch.setitem(READERS, 'more', READERS['digits'])
    assert load('more', Preprocess(8)).num_classes == 10


def test_digits_are_split_the_same_for_everybody():
    dataset = load('digits', Preprocess(8, 'bicubic'))
    assert isinstance(dataset, Dataset) and dataset.class_names == tuple('0123456789')
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [800, 200, 797]
    names = {name for s in (dataset.train, dataset.val, dataset.test) for name in s.names}
    assert len(names) == 1797
    other = load('digits', Preprocess(8, 'bicubic'), seed=5)
    np.testing.assert_array_equal(dataset.val.labels, other.val.labels)
    for split in (dataset.train, dataset.val, dataset.test):
        share = np.bincount(split.labels, minlength=10) / len(split)
        assert abs(share - 0.1).max() < 0.011
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert split.images.min() == 0 and split.images.max() == 255
        assert (split.images == split.images[..., :1]).all()


def test_digits_equal_scikit_learns():
    datasets = pytest.importorskip('sklearn.datasets')
    original = datasets.load_digits()
    dataset = load('digits', Preprocess(8))
    parts = stratified(original.target, 800, 200, seed=0)
    for split, index in zip((dataset.train, dataset.val, dataset.test), parts, strict=True):
        np.testing.assert_array_equal(split.labels, original.target[index])
        np.testing.assert_allclose(split.images[..., 0], original.images[index] * 255 / 16, atol=0.5)


def test_digits_at_another_size():
    assert load('digits', Preprocess(12)).train.images.shape == (800, 12, 12, 3)


def test_stratified_parts_are_disjoint_and_complete():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    parts = stratified(labels, 333, 44, seed=3)
    assert [len(p) for p in parts] == [333, 44, 123]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(500))
    for part in parts:
        wanted = np.bincount(labels) * len(part) / 500
        assert abs(np.bincount(labels[part], minlength=7) - wanted).max() <= 2
    assert all(np.array_equal(a, b) for a, b in zip(parts, stratified(labels, 333, 44, seed=3), strict=True))
    assert not np.array_equal(parts[1], stratified(labels, 333, 44, seed=4)[1])


@pytest.mark.parametrize('counts', [[1, 1, 1, 40], [1] * 9, [3], [2, 2]])
def test_train_has_every_class_however_small(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    parts = eight_one_one(labels, seed=0)
    assert set(labels[parts[0]]) == set(labels) and sum(map(len, parts)) == len(labels)


def test_splits_join():
    first = Split(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1], np.int32), ('a', 'b'))
    second = Split(np.ones((1, 4, 4, 3), np.uint8), np.array([1], np.int32), ('c',))
    both = first.joined(second)
    assert len(both) == 3 and both.names == ('a', 'b', 'c') and both.images[2].all()
    ragged = Split([np.zeros((4, 5, 3), np.uint8)], np.array([0], np.int32), ('d',))
    assert len(ragged.joined(ragged).images) == 2


def test_a_split_of_unequal_lengths_is_refused():
    with pytest.raises(UsageError, match='2 images, 1 labels'):
        Split(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(1, np.int32), ('a', 'b'))
