import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_jax.data import augment

KEY = jax.random.key(0)
# Under jit as in a step, and because op by op each test would compile dozens of programs.
crop = jax.jit(augment.random_resized_crop, static_argnames=('scale', 'ratio'))
pretrain = jax.jit(augment.pretrain)
mixup = jax.jit(augment.mixup)
SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(9), (6, 12, 16, 3))


def test_the_whole_box_reproduces_the_image(images):
    out = crop(KEY, images, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(out, images, atol=1e-6)


def test_a_crop_of_a_ramp_is_a_shorter_ramp():
    # Bilinear resampling keeps linear functions, and a box of a quarter of the area has half the slope.
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 32)[None, None, :, None], (8, 32, 32, 3))
    out = crop(KEY, ramp, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    inner = np.diff(np.asarray(out), axis=2)[:, :, 2:-2]
    np.testing.assert_allclose(inner, 0.5 / 31, atol=1e-5)


def test_zero_strength_changes_nothing(images):
    np.testing.assert_allclose(jax.jit(augment.colour_jitter)(KEY, images, 0.0), images, atol=1e-6)


def test_flip_mirrors_some_images_and_keeps_the_rest(images):
    out = augment.random_flip(jax.random.key(3), jnp.tile(images, (4, 1, 1, 1)))
    source = np.tile(images, (4, 1, 1, 1))
    kept = (np.asarray(out) == source).all((1, 2, 3))
    mirrored = (np.asarray(out) == source[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all() and 4 < kept.sum() < 20


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_pretrain_stays_in_range_and_follows_its_key(seed):
    images = jax.random.uniform(jax.random.key(9), (4, 8, 8, 3))
    out = pretrain(jax.random.key(seed), images)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= 0 and out.max() <= 1 and jnp.isfinite(out).all()
    np.testing.assert_array_equal(out, pretrain(jax.random.key(seed), images))
    assert not np.array_equal(out, pretrain(jax.random.key(seed ^ 1), images))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, alpha=st.floats(0.05, 4))
def test_mixup_blends_images_and_labels_alike(seed, alpha):
    labels = jax.nn.one_hot(jnp.arange(5), 5)
    images = jnp.broadcast_to(labels[:, None, None, :], (5, 2, 2, 5))
    mixed, soft = mixup(jax.random.key(seed), images, labels, alpha)
    np.testing.assert_allclose(soft.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed[:, 0, 0], soft, atol=1e-6)
    assert soft.min() >= 0


def test_mixup_of_strength_zero_changes_nothing_even_traced(images):
    labels = jnp.eye(6)
    mixed, soft = mixup(KEY, images, labels, jnp.float32(0))
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(soft, labels)


def test_half_precision_stays_half(images):
    half = images.astype(jnp.bfloat16)
    mixed, _ = mixup(KEY, half, jnp.eye(6), 0.2)
    assert pretrain(KEY, half).dtype == mixed.dtype == jnp.bfloat16
