"""The tokenizer: what goes in, what its tokens depend on, and the rules that train its codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.conftest import OPTIONS
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models import vqkd
from vpt_jax.models.beit import BEiT


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope='module')
def tokenizer():
    small = {'depth': 1, 'mlp_dim': 16, 'heads': 2, 'relative': 'none', 'final_norm': False, 'fc_norm': True,
             'pool': 'none'}  # fmt: skip
    model = vqkd.VQKD(
        BEiT(width=16, patch_size=4, image_size=8, **small), BEiT(width=8, patch_size=1, image_size=2, **small),
        codes=12, code_width=4, target_width=6,
    )  # fmt: skip
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params'], **OPTIONS)()
    return model, params


def tokens_of(tokenizer, images, **changes):
    model, params = tokenizer
    run = jax.jit(lambda p, x: model.clone(**changes).apply({'params': p}, x), **OPTIONS)
    return run(params, images)


def test_tokens_are_the_nearest_codes_also_when_those_have_several_lengths(tokenizer, rng):
    model, params = tokenizer
    images = rng.random((3, 8, 8, 3)).astype(np.float32)
    stretched = {**params, 'codebook': params['codebook'] * rng.uniform(0.2, 3, (12, 1)).astype(np.float32)}
    seen = tokens_of((model, stretched), images)
    z, codes = np.asarray(seen.z, np.float64), np.asarray(stretched['codebook'], np.float64)
    nearest = ((z[:, :, None] - codes) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(seen.ids, nearest)
    assert (nearest != (z @ codes.T).argmax(-1)).any()  # the largest product would not do
    np.testing.assert_allclose(seen.codes, codes[nearest], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, atol=1e-5)
    assert seen.rebuilt.shape == (3, 4, 6) and seen.ids.shape == (3, 4)


def test_an_image_has_the_same_tokens_whatever_its_neighbours(tokenizer, rng):
    images = rng.random((4, 8, 8, 3)).astype(np.float32)
    images[1:] *= 0.01
    together = tokens_of(tokenizer, images).ids
    apart = np.concatenate([tokens_of(tokenizer, images[i : i + 1]).ids for i in range(4)])
    np.testing.assert_array_equal(together, apart)


def test_pixels_are_normalised_inside(tokenizer):
    images = jnp.linspace(0, 1, 48).reshape(1, 4, 4, 3)
    assert float(tokenizer[0].normalise(images).min()) == -1 and float(tokenizer[0].normalise(images).max()) == 1
    imagenet = np.asarray(tokenizer[0].clone(pixels='imagenet').normalise(images))
    np.testing.assert_allclose(imagenet[0, 0, 0], (np.arange(3) / 47 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
                               rtol=1e-5)  # fmt: skip
    with pytest.raises(UsageError, match='unknown normalisation'):
        tokenizer[0].clone(pixels='clip')


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (np.zeros((1, 8, 8, 3), np.float32) - 0.1, r'in \[0, 1\], before any normalisation, .* in \[-0.1, -0.1\]'),
        (np.full((1, 8, 8, 3), 255, np.float32), r'these are in \[255, 255\]'),
        (np.full((1, 8, 8, 3), np.nan, np.float32), r'\[nan, nan\]'),
        (np.zeros((8, 8, 3), np.float32), r'got shape \[8, 8, 3\]'),
        (np.zeros((1, 3, 8, 8), np.float32), r'got shape \[1, 3, 8, 8\]'),
        (np.zeros((1, 8, 8, 3), np.int32), 'got int32'),
    ],
)
def test_images_out_of_range_are_refused(images, message):
    with pytest.raises(UsageError, match=message):
        vqkd.check_images(images)


def test_bytes_are_scaled(rng):
    images = rng.integers(0, 256, (1, 2, 2, 3), np.uint8)
    np.testing.assert_allclose(vqkd.check_images(images), images / 255, rtol=1e-6)
    assert jax.jit(vqkd.check_images)(jnp.asarray(images / 255, jnp.float32)).dtype == jnp.float32


def test_the_reconstruction_trains_the_encoder_and_not_the_codes(tokenizer, rng):
    model, params = tokenizer
    images, target = rng.random((2, 8, 8, 3)), rng.normal(size=(2, 4, 6))

    def rebuild(params):
        seen = model.apply({'params': params}, images)
        return vqkd.losses(seen, target)[0].mean()

    grads = jax.jit(jax.grad(rebuild), **OPTIONS)(params)
    assert np.abs(grads['encoder']['embedding']['kernel']).max() > 1e-6
    np.testing.assert_array_equal(grads['codebook'], 0)


def test_losses(tokenizer, rng):
    seen = tokens_of(tokenizer, rng.random((2, 8, 8, 3)).astype(np.float32))
    target = rng.normal(size=(2, 4, 6))
    cosine = (np.asarray(seen.rebuilt) * target).sum(-1)
    cosine /= np.linalg.norm(seen.rebuilt, axis=-1) * np.linalg.norm(target, axis=-1)
    rebuild, quantization = vqkd.losses(seen, target)
    np.testing.assert_allclose(rebuild, 1 - cosine.mean(-1), rtol=1e-5)
    squares = (np.asarray(seen.codes) - np.asarray(seen.z)) ** 2
    np.testing.assert_allclose(quantization, squares.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(vqkd.losses(seen, seen.rebuilt * 3)[0], 0, atol=1e-6)


def test_codes_follow_their_vectors_and_idle_ones_stay(rng):
    codebook = np.asarray(vqkd.unit(rng.normal(size=(4, 3))))
    z = np.asarray(vqkd.unit(rng.normal(size=(1, 6, 3))))
    ids = np.array([[0, 0, 2, 2, 2, 3]])
    ours = np.asarray(vqkd.averaged_codes(jnp.asarray(codebook), jnp.asarray(z), jnp.asarray(ids), 0.9))
    for code in range(4):
        mine = z[0][ids[0] == code]
        target = mine.mean(0) / np.linalg.norm(mine.mean(0)) if len(mine) else codebook[code]
        moved = 0.9 * codebook[code] + 0.1 * target
        np.testing.assert_allclose(ours[code], moved / np.linalg.norm(moved), atol=1e-6)
    np.testing.assert_allclose(ours[1], codebook[1], atol=1e-6)
    padded = [np.concatenate([a, a[:, ::-1]]) for a in (z, ids)]
    again = vqkd.averaged_codes(codebook, *map(jnp.asarray, padded), 0.9, jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(again, ours, atol=1e-6)


def test_first_codes_find_the_clusters(rng):
    centres = np.eye(3)
    z = np.asarray(vqkd.unit(centres[np.arange(60) % 3] + 0.05 * rng.normal(size=(60, 3))))
    codes = np.asarray(vqkd.kmeans_codes(jax.random.key(1), jnp.asarray(z), 6))
    # Six codes for three clusters: every cluster has some, and all lie in one.
    owner = (codes @ centres).argmax(-1)
    assert set(owner) == {0, 1, 2}
    np.testing.assert_allclose((codes @ centres).max(-1), 1, atol=0.02)
    assert vqkd.kmeans_codes(jax.random.key(0), jnp.asarray(z[:4]), 6).shape == (6, 3)


def test_a_file_without_its_parts_is_refused(rng):
    with pytest.raises(UsageError, match=r"x\.pth is no VQ-KD tokenizer: it has no 'encoder\.cls_token'"):
        vqkd.load(ArraySource({'cls_token': np.zeros((1, 1, 4))}, 'x.pth'))
