"""What must hold between the variants of VPT, whatever the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.methods import VPT, Context, Linear, Stack, VPTPad, VPTPixels


def test_deep_with_one_prompted_block_is_shallow(tiny, tiny_at_depth):
    shallow = Stack(VPT(num_tokens=2), Linear())
    prompts = tiny.prompts(shallow)
    expected = tiny.logits(shallow, prompts)
    one = Stack(VPT(num_tokens=2, deep=True, deep_layers=1), Linear())
    assert set(tiny.shapes(one)['vpt']) == {'prompts'}
    np.testing.assert_allclose(tiny.logits(one, prompts), expected, atol=1e-6)
    small = tiny_at_depth(1)
    deep = Stack(VPT(num_tokens=2, deep=True), Linear())
    np.testing.assert_allclose(small.logits(deep, prompts), small.logits(shallow, prompts), atol=1e-6)


def test_shared_is_deep_with_equal_prompts(tiny):
    shared = Stack(VPT(num_tokens=2, deep=True, shared=True), Linear())
    prompts = tiny.prompts(shared)
    deep = {**prompts, 'vpt': {**prompts['vpt'], 'deep': jnp.stack([prompts['vpt']['prompts']] * 2)}}
    expected = tiny.logits(Stack(VPT(num_tokens=2, deep=True), Linear()), deep)
    np.testing.assert_allclose(tiny.logits(shared, prompts), expected, atol=1e-6)


def test_projected_is_deep_with_projected_prompts(tiny):
    method = VPT(num_tokens=2, deep=True, project=6)
    prompts = tiny.prompts(Stack(method, Linear()))
    proj = prompts['vpt']['proj']
    wide = {k: prompts['vpt'][k] @ proj['kernel'] + proj['bias'] for k in ('prompts', 'deep')}
    expected = tiny.logits(Stack(dataclasses.replace(method, project=None), Linear()), {**prompts, 'vpt': wide})
    np.testing.assert_allclose(tiny.logits(Stack(method, Linear()), prompts), expected, atol=1e-5)


def test_pixel_prompts_are_the_tokens_of_their_patches(tiny):
    method = Stack(VPTPixels(num_tokens=2), Linear())
    prompts = tiny.prompts(method)
    strip = prompts['vpt_pixels']['pixels']
    tokens = tiny.model.apply({'params': tiny.params}, strip[None], method='patches').reshape(2, 16)
    expected = tiny.logits(Stack(VPT(num_tokens=2), Linear()), {**prompts, 'vpt': {'prompts': tokens}})
    np.testing.assert_allclose(tiny.logits(method, prompts), expected, atol=1e-5)


def test_frame_surrounds_the_image(tiny):
    method = VPTPad(num_pixels=2)
    prompts = {'top_bottom': jnp.full((4, 20, 3), 2.0), 'left_right': jnp.full((16, 4, 3), 3.0)}
    out = np.asarray(method.pixels(prompts, jnp.zeros((1, 16, 16, 3)), Context()))[0]
    top, side = ((np.array(v) - 0.485) / 0.229 for v in (2.0, 3.0))
    assert out.shape == (20, 20, 3) and (out[2:-2, 2:-2] == 0).all()
    np.testing.assert_allclose(np.concatenate([out[:2], out[-2:]])[..., 0], top, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([out[2:-2, :2], out[2:-2, -2:]], 1)[..., 0], side, rtol=1e-6)


@pytest.mark.parametrize('width', [16, 6])
def test_initial_range(tiny, width):
    method = VPT(num_tokens=50, deep=True, project=None if width == 16 else width)
    prompts = tiny.init(method)
    bound = (6 / (3 * 16 + width)) ** 0.5
    for name in ('prompts', 'deep'):
        largest = np.abs(prompts[name]).max()
        assert prompts[name].shape[-1] == width and 0.97 * bound < largest <= bound


def test_dropout_is_per_example_and_keeps_the_mean():
    method = VPT(num_tokens=10, dropout=0.25)
    ctx = Context(train=True, key=jax.random.key(0))
    out = np.asarray(method.expand({}, jnp.ones((10, 64)), 32, 0, ctx))
    assert set(np.unique(out).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(out.mean() - 1) < 0.02 and (out[0] != out[1]).any()
    assert (np.asarray(method.expand({}, jnp.ones((10, 64)), 32, 1, ctx)) != out).any()
    assert (method.expand({}, jnp.ones((10, 64)), 32, 0, Context()) == 1).all()
