"""Where SPT's prompts come from: which tokens, how they are pooled and clustered, what passes through the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from tests.methods.conftest import OPTIONS
from vpt_jax.errors import UsageError
from vpt_jax.methods import SPT, VPT, Linear, Stack
from vpt_jax.methods.kmeans import lloyd
from vpt_jax.methods.spt import pool_windows, tokens_of


class Images:
    """Training images that remember which of them were asked for, and how many at once."""

    def __init__(self, count=12, size=16, seed=0):
        self.array = np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)
        self.asked, self.largest = [], 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        self.asked += list(index)
        self.largest = max(self.largest, len(index))
        return self.array[index]


def started(tiny, method, images, seed=0, model=None):
    """[L, P, D], the prompts that a method makes of images."""
    prompts = jax.tree.map(lambda leaf: np.zeros(leaf.shape), tiny.shapes(method))
    found = method.init_from(jax.random.key(seed), model or tiny.model, tiny.params, prompts, images)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, prompts)
    return np.concatenate([found['prompts'][None], found.get('deep', np.zeros((0, *found['prompts'].shape)))])


def tokens_in(tiny, images, model=None):
    """[3, M, N, D], every token of images [M, H, W, 3], block by block."""
    model = model or tiny.model
    run = jax.jit(lambda params, images: tokens_of(model, model.stored(params), images, 3), **OPTIONS)
    return np.asarray(run(tiny.params, images))


def test_tokens_are_those_that_enter_the_blocks(tiny):
    images = Images(2).array
    tokens = tokens_in(tiny, images)
    patches = tiny.model.bind({'params': tiny.params}).patches(jnp.asarray(images))
    np.testing.assert_allclose(tokens[0], patches.reshape(2, 16, 16), atol=1e-5)  # no positions
    short = tiny.model.clone(depth=2, final_norm=False, pool='none')
    after_two = jax.jit(lambda x: short.apply({'params': tiny.params}, x), **OPTIONS)(images)
    np.testing.assert_allclose(tokens[2], after_two[:, 1:], atol=1e-4)  # no CLS
    np.testing.assert_allclose(tokens, tokens_in(tiny, images, tiny.model.clone(scan=True)), atol=1e-5)


@pytest.mark.parametrize('deep', [False, True])
def test_random_prompts_are_different_tokens_of_few_images(tiny, deep):
    images = Images(400)
    method = SPT(num_tokens=4, deep=deep)
    found = started(tiny, method, images)
    asked = sorted(set(images.asked))
    assert len(asked) <= found.size // 16 and images.largest <= 8
    np.testing.assert_array_equal(found, started(tiny, method, Images(400)))
    assert np.abs(found - started(tiny, method, images, seed=1)).max() > 0.1
    tokens = tokens_in(tiny, images.array[asked]).reshape(3, -1, 16)
    for block, rows in zip(tokens, found, strict=False):
        nearest = np.abs(block[None] - rows[:, None]).max(-1)
        assert nearest.min(1).max() < 1e-5
        assert len(set(nearest.argmin(1))) == 4


def test_one_image_is_enough_for_moco(tiny):
    images = Images()
    found = started(tiny, SPT(num_tokens=16, images=1), images)
    assert len(set(images.asked)) == 1
    # 16 different tokens of an image of 16 patches: all of them.
    tokens = tokens_in(tiny, images.array[images.asked[:1]])[:, 0]
    for ours, theirs in zip(found, tokens, strict=True):
        np.testing.assert_allclose(np.sort(ours, axis=0), np.sort(theirs, axis=0), atol=1e-5)


@pytest.mark.parametrize(('count', 'width', 'rest'), [(6, 3, 1), (9, 2, 0), (17, 1, 0), (2, 16, 0)])
def test_windows_of_the_raster_order(count, width, rest):
    tokens = np.random.default_rng(0).normal(size=(2, 16, 5)).astype(np.float32)
    for name in ('mean', 'max'):
        ours = np.asarray(pool_windows(jnp.asarray(tokens), count, getattr(jnp, name)))
        for k in range(count - 1):
            window = tokens[:, k * width : (k + 1) * width]
            np.testing.assert_allclose(ours[:, k], getattr(window, name)(axis=1), atol=1e-6)
        last = tokens[:, 16 - rest :] if rest else tokens
        np.testing.assert_allclose(ours[:, -1], getattr(last, name)(axis=1), atol=1e-6)


@pytest.mark.parametrize('strategy', ['mean_pooling', 'max_pooling'])
def test_pooled_prompts_are_different_windows_of_images(tiny, strategy):
    images = Images()
    found = started(tiny, SPT(num_tokens=6, strategy=strategy), images)
    reduce = {'mean_pooling': jnp.mean, 'max_pooling': jnp.max}[strategy]
    windows = np.asarray(pool_windows(jnp.asarray(tokens_in(tiny, images.array)), 6, reduce)).reshape(3, -1, 16)
    for rows, of_block in zip(found, windows, strict=True):
        nearest = np.abs(of_block[None] - rows[:, None]).max(-1)
        assert nearest.min(1).max() < 1e-5


def test_lloyd_is_scikit_learns():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 4)) + rng.integers(0, 3, (300, 1)) * 4
    centers, labels, steps = lloyd(points, points[:7])
    theirs = KMeans(7, init=points[:7], n_init=1, tol=0, algorithm='lloyd').fit(points)
    np.testing.assert_allclose(centers, theirs.cluster_centers_, atol=1e-9)
    np.testing.assert_array_equal(labels, theirs.labels_)
    assert steps == theirs.n_iter_
    one, _, _ = lloyd(points, points[:7], max_steps=1)
    nearest = np.square(points[:, None] - points[:7]).sum(-1).argmin(1)
    np.testing.assert_allclose(one[2], points[nearest == 2].mean(0))


def test_lloyd_moves_centers_that_lost_their_points():
    # Ten equal points, as the background of digits has, and three others.
    points = np.concatenate([np.zeros((10, 2)), [[5.0, 0], [0, 7], [9, 9]]])
    centers, labels, _ = lloyd(points, points[:4])
    assert len(np.unique(labels)) == 4
    np.testing.assert_allclose(sorted(map(tuple, centers)), [(0, 0), (0, 7), (5, 0), (9, 9)])


def test_clusters_of_all_tokens_and_of_a_sample(tiny):
    images = Images()
    method = SPT(num_tokens=5, strategy='kmeans', images=12)
    found = started(tiny, method, images)
    np.testing.assert_array_equal(found, started(tiny, method, Images()))
    drawn = np.array(images.asked)
    assert 1 < len(set(drawn)) < 12  # with replacement
    rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(0))).tolist())
    tokens = tokens_in(tiny, images.array[rng.integers(12, size=12)])
    for points, centers in zip(tokens.reshape(3, -1, 16), found, strict=True):
        moved, _, steps = lloyd(points, centers)
        assert steps == 2  # nothing moves
        np.testing.assert_allclose(moved, centers, atol=1e-5)
    sampled = started(tiny, SPT(num_tokens=5, strategy='kmeans', kmeans_tokens=20), Images())
    assert np.abs(sampled - found).max() > 1e-3


def test_the_forward_pass_is_that_of_vpt(tiny):
    spt, vpt = Stack(SPT(num_tokens=3), Linear()), Stack(VPT(num_tokens=3, deep=True), Linear())
    prompts = tiny.prompts(spt)
    assert set(prompts['spt']) == {'prompts', 'deep'}
    expected = tiny.logits(vpt, {'vpt': prompts['spt'], 'linear': prompts['linear']})
    np.testing.assert_array_equal(tiny.logits(spt, prompts), expected)


def test_in_a_stack_only_it_looks_at_images(tiny):
    method = Stack(VPT(num_tokens=2), SPT(num_tokens=3), Linear())
    assert method.looks_at_images and not Stack(VPT(num_tokens=2), Linear()).looks_at_images
    prompts = tiny.prompts(method)
    found = method.init_from(jax.random.key(0), tiny.model, tiny.params, prompts, Images())
    for name in ('vpt', 'linear'):
        jax.tree.map(np.testing.assert_array_equal, found[name], prompts[name])
    assert np.abs(found['spt']['deep'] - prompts['spt']['deep']).max() > 0.1


REFUSED = [
    ({'strategy': 'kmean'}, "unknown SPT strategy 'kmean': did you mean 'kmeans'"),
    (
        {'strategy': 'mean_pooling', 'deep': False},
        "strategy='mean_pooling' needs deep=True; shallow prompts are always",
    ),
    ({'strategy': 'kmeans', 'deep': False}, "strategy='kmeans' needs deep=True"),
    ({'strategy': 'max_pooling', 'num_tokens': 1}, "strategy='max_pooling' needs num_tokens >= 2, got 1"),
    ({'project': 8}, 'prompts start as tokens of every block, which excludes project'),
    ({'images': -1}, 'images must be >= 0'),
    ({'strategy': 'kmeans', 'kmeans_tokens': 19}, 'method spt: kmeans_tokens must be >= 20, got 19'),
    ({'num_tokens': 0}, 'method spt: num_tokens must be >= 1, got 0'),
]


@pytest.mark.parametrize(('settings', 'message'), REFUSED)
def test_refused_at_once(settings, message):
    with pytest.raises(UsageError, match=message):
        SPT(**settings)


def test_refused_by_the_backbone_or_the_images(tiny):
    with pytest.raises(UsageError, match='num_tokens - 1 = 17 windows, but an image has 16 patches'):
        SPT(num_tokens=18, strategy='mean_pooling').check(tiny.model)
    with pytest.raises(UsageError, match='17 prompts cannot be drawn from the 16 tokens of 1 images'):
        started(tiny, SPT(num_tokens=17, images=1), Images())
