"""The methods of this round on a ViT, a ResNet, a Swin and a ConvNeXt: steps lower the loss and move every prompt."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods.conftest import Tiny
from tests.networks import QUICK, drawn
from vpt_jax.methods import AP, VP, LabelMapping, Linear, LoRA, NormTune, Stack, forward
from vpt_jax.models.convnext import ConvNeXt
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT

NETWORKS = {
    'vit': ViT(width=16, depth=3, mlp_dim=32, heads=2, patch_size=4, image_size=16),
    'resnet': ResNet(depths=(1, 1), inner=(4, 8), outer=(8, 16), bottleneck=False, stem_width=8, image_size=16),
    'swin': Swin(embed_dim=8, depths=(1, 1), heads=(2, 2), windows=(2, 2), image_size=16),
    'convnext': ConvNeXt(depths=(1, 1), dims=(8, 16), image_size=16),
}
PIXELS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


MEMBERS = (VP(kind='random_patch', size=4), AP(at=(0, 'end'), shape='channel'), LoRA(rank=2, targets='all'), Linear())


def descend(model, method, images, rate=0.02, count=4):
    """Losses on one batch, prompts before and after."""
    method.check(model)
    params, labels = drawn(model), jnp.arange(4) % 3
    shapes = jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p, 3), params)
    prompts = Tiny.drawn(shapes)  # drawing them by jax would take as long as the rest
    state = method.init_state(model, 3, jax.random.key(1))

    def loss(prompts, state):
        logits, state = forward(model, method, params, prompts, images, state=state, train=True, key=jax.random.key(2),
                                pixels=PIXELS)  # fmt: skip
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    step, first, losses = jax.jit(jax.value_and_grad(loss, has_aux=True), **QUICK), prompts, []
    for _ in range(count):
        (value, state), grads = step(prompts, state)
        losses.append(float(value))
        prompts = jax.tree.map(lambda p, g: p - rate * g, prompts, grads)
    return losses, first, prompts


@pytest.mark.parametrize('name', NETWORKS)
def test_the_loss_falls_and_every_prompt_moves(name):
    model = NETWORKS[name]
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    statistics = 'batch' if name == 'resnet' else 'stored'
    method = Stack(NormTune(statistics=statistics), *MEMBERS)
    losses, before, after = descend(model, method, images)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1e-3, losses
    still = {jax.tree_util.keystr(path) for path, same in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool((a == b).all()), before, after)) if same}  # fmt: skip
    assert not still


def test_scanned_blocks_tell_the_same(tiny):
    method = Stack(NormTune(), AP(at=(0, 1, 'end')), *MEMBERS[2:])
    prompts = tiny.prompts(method)
    logits, grads = tiny.gradient(method, prompts, train=True)
    scanned, scanned_grads = tiny.gradient(method, prompts, train=True, scan=True)
    np.testing.assert_allclose(logits, scanned, atol=2e-5)
    chex.assert_trees_all_close(grads, scanned_grads, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize('name', ['vit', 'resnet'])
def test_a_frame_learns_for_a_frozen_classifier(name):
    model = NETWORKS[name].clone(classes=5)
    images = np.random.default_rng(0).normal(size=(4, 11, 11, 3)).astype(np.float32)
    method = Stack(VP(kind='expansive', inner=11), LabelMapping(mapping='random'))
    losses, before, after = descend(model, method, images, rate=20.0)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1e-3, losses
    assert jax.tree.leaves(before)[0].shape == (16, 16, 3) and len(jax.tree.leaves(after)) == 1
