import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_jax.data import Batches, Preprocess, Split
from vpt_jax.errors import UsageError

SQUARE = Preprocess(4, 'vtab', 'flip')
RAGGED = Preprocess(7, 'fgvc', 'fgvc')


def make_split(count, preprocess=SQUARE):
    """Example i has the label i and pixels that tell it apart."""
    rng = np.random.default_rng(0)
    shapes = [(4, 4, 3) if preprocess.fixed_size else (10, 14 + i % 5, 3) for i in range(count)]
    images = [preprocess.decode(rng.integers(0, 256, shape, np.uint8)) for shape in shapes]
    names = tuple(f'array[{i}]' for i in range(count))
    return Split(np.stack(images) if preprocess.fixed_size else images, np.arange(count, dtype=np.int32), names)


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in ('image', 'label', 'weight'))


@pytest.mark.parametrize('preprocess', [SQUARE, RAGGED, Preprocess(4, 'vtab', 'pretrain')])
def test_a_batch_depends_on_seed_and_number_only(preprocess):
    split = make_split(11, preprocess)
    straight = Batches(split, preprocess, 4, seed=7)
    run = [straight.batch(t) for t in range(9)]
    for t in (8, 0, 5, 5, 2):
        assert same(Batches(split, preprocess, 4, seed=7).batch(t), run[t])
        assert same(straight.batch(t), run[t])
    assert not same(Batches(split, preprocess, 4, seed=8).batch(0), run[0])
    assert not same(run[0], run[3])
    assert all(b['image'].shape == (4, preprocess.size, preprocess.size, 3) for b in run)
    assert all(b['image'].dtype == np.uint8 and b['label'].dtype == np.int32 for b in run)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 30), batch_size=st.integers(1, 40), train=st.booleans(), number=st.integers(0, 3))
def test_every_epoch_has_every_example_once(count, batch_size, train, number):
    batches = Batches(make_split(count), SQUARE, batch_size, seed=1, train=train)
    epoch = list(batches.epoch(number))
    assert len(epoch) == batches.steps_per_epoch == -(-count // batch_size)
    labels, weights = (np.concatenate([b[key] for b in epoch]) for key in ('label', 'weight'))
    assert weights.dtype == np.float32 and set(weights) <= {0.0, 1.0}
    counted = labels[weights == 1]
    assert sorted(counted) == list(range(count))
    if not train:
        assert counted.tolist() == list(range(count))


def test_evaluation_is_in_order_and_unaugmented():
    for preprocess in (SQUARE, RAGGED):
        split = make_split(5, preprocess)
        images = np.concatenate([b['image'] for b in Batches(split, preprocess, 2, train=False).epoch()])
        expected = np.stack([preprocess.eval_view(image) for image in split.images])
        np.testing.assert_array_equal(images[:5], expected)
        np.testing.assert_array_equal(images[5], expected[4])  # padding repeats an example of the same batch


def test_training_flips_about_half():
    split = make_split(64)
    batch = Batches(split, SQUARE, 64).batch(0)
    plain = (batch['image'] == split.images[batch['label']]).all((1, 2, 3))
    mirrored = (batch['image'] == split.images[batch['label'], :, ::-1]).all((1, 2, 3))
    assert (plain | mirrored).all() and 16 < plain.sum() < 48


def test_epochs_are_shuffled_differently():
    batches = Batches(make_split(50), SQUARE, 50)
    assert batches.batch(0)['label'].tolist() != batches.batch(1)['label'].tolist()


def test_batches_do_not_share_memory_with_the_split():
    split = make_split(4)
    before = split.images.copy()
    batch = Batches(split, SQUARE, 4, train=False).batch(0)
    batch['image'][:] = 0
    batch['label'][:] = 0
    np.testing.assert_array_equal(split.images, before)
    assert split.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'batch_size': 0}, 'batch size .* got 0'),
        ({'batch_size': -3}, 'batch size .* got -3'),
        ({'batch_size': 2.0}, r'batch size .* got 2\.0'),
        ({'seed': -1}, 'seed .* got -1'),
        ({'split': Split(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0), ())}, 'empty'),
        ({'preprocess': Preprocess(5)}, 'same Preprocess'),
        ({'preprocess': RAGGED}, 'same Preprocess'),
    ],
)
def test_mistakes_are_named(flags, message):
    arguments = {'split': make_split(3), 'preprocess': SQUARE, 'batch_size': 2} | flags
    with pytest.raises(UsageError, match=message):
        Batches(**arguments)
