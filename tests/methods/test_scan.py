"""Scanned and unrolled blocks, compiled and not, float32 and bfloat16 must tell the same story for every method."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.methods import (
    VAPT,
    VPT,
    Adapter,
    Bias,
    ClsToken,
    Full,
    Linear,
    MLPHead,
    Partial,
    Stack,
    VPTAdd,
    VPTBelow,
    VPTPad,  # fmt: skip
    VPTPixels,
    forward,
)

METHODS = {
    'vpt_two_deep_then_dropped': VPT(num_tokens=2, deep=True, deep_layers=2, drop_after=True, project=6),
    'vpt_last_two': VPT(num_tokens=2, deep=True, last_layers_overwriting_patches=2, dropout=0.2),
    'vpt_shared': Stack(VPT(num_tokens=2, deep=True, shared=True, pool='img_pool'), VPTAdd(deep=True, dropout=0.2)),
    # Full without its dropout: scanned and unrolled blocks draw it from different streams.
    'full_vpt_pixels': Stack(VPTPixels(num_tokens=2, pixel_init='imagenet'), VPT(num_tokens=1), VPTPad(num_pixels=2),
                             Full(dropout=0.0)),
    'vpt_below': Stack(VPTBelow(num_channels=2), Partial(blocks=2), MLPHead(layers=2)),
    'vapt_unshared': VAPT(num_tokens=2, static_layers=2, shared_projector=False, learnable_scale=True, depthwise=True),
    'all_at_once': Stack(VPT(num_tokens=2, deep=True, dropout=0.2), VAPT(num_tokens=3, dropout=0.2), Adapter(), Bias(),
                         ClsToken()),
}  # fmt: skip


def _with_head(method):
    return method if method.changes('logits') else Stack(method, Linear())


# Compiling two programs with their gradients takes seconds a method; these hold one of every kind.
QUICK = ('vpt_two_deep_then_dropped', 'vapt_unshared', 'all_at_once')


@pytest.mark.parametrize('name', [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in METHODS])
def test_scan_equals_unrolled_in_training(tiny, name):
    method = _with_head(METHODS[name])
    prompts = tiny.prompts(method)
    logits, grads = tiny.gradient(method, prompts, train=True)
    scanned, scanned_grads = tiny.gradient(method, prompts, train=True, scan=True)
    np.testing.assert_allclose(logits, scanned, atol=2e-5)
    chex.assert_trees_all_close(grads, scanned_grads, atol=2e-5, rtol=1e-3)
    # Every prompt matters, and gradients are of the prompts and of nothing else.
    chex.assert_trees_all_equal_shapes(grads, prompts)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', ['vpt_two_deep_then_dropped'])
def test_scan_equals_unrolled_in_evaluation(tiny, name):
    method = _with_head(METHODS[name])
    prompts = tiny.prompts(method)
    np.testing.assert_allclose(tiny.logits(method, prompts), tiny.logits(method, prompts, scan=True), atol=2e-5)


def test_compiled_equals_not_compiled(tiny):
    method = Stack(VPT(num_tokens=2, deep=True), Linear())
    prompts = tiny.prompts(method)
    # One operation at a time, as Python runs it.
    eager, _ = forward(tiny.model, method, tiny.params, prompts, tiny.images)
    np.testing.assert_allclose(eager, tiny.logits(method, prompts), atol=2e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_bfloat16_is_close(tiny, scan):
    method = Stack(VPT(num_tokens=2, deep=True), VPTPad(num_pixels=2), Linear())
    prompts = tiny.prompts(method, size=0.05)
    exact = tiny.logits(method, prompts)
    rounded = tiny.logits(method, prompts, scan=scan, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()
