"""Prompt inversion: plain networks answer to canvases as prompted ones do, and what follows from the algebra."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.conftest import OPTIONS, Tiny
from vpt_jax.errors import UsageError
from vpt_jax.methods import IIP, PGN, SPT, VAPT, VPT, Bias, Context, Linear, Stack, VPTPad, forward
from vpt_jax.methods.inversion import check_method, check_model, inverse_of, invert
from vpt_jax.models import canvas
from vpt_jax.models.beit import BEiT
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.vit import ViT

SIZES = {'width': 16, 'depth': 2, 'mlp_dim': 32, 'heads': 2, 'patch_size': 4, 'image_size': 16}
CLASSES = 5
GENERATOR = {'library': 3, 'channels': 4, 'groups': 2}
NETWORKS = {
    'clip': {'pre_norm': True, 'patch_bias': False, 'projection': 12},
    'dinov2_registers': {'registers': 2, 'pool': 'tok_gap', 'layer_scale': True},
    # Images of 18 pixels: 4 x 4 patches, and two pixels are left over.
    'deit_distilled': {'dist_token': True, 'posemb_prefix': 2, 'image_size': 18},
    'big_vision_map': {'posemb': 'sincos2d', 'cls_token': False, 'pool': 'map', 'posemb_prefix': 0},
    'without_positions': {'posemb': 'none', 'pool': 'gap', 'scan': True},
}
CASES = [*((name, 4) for name in NETWORKS), ('clip', 3), ('without_positions', 3)]


def network(**settings):
    """A ViT with weights that are not special, as it stores them."""
    model = ViT(**{**SIZES, **settings})
    size = model.image_size
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3))))['params']
    return model, Tiny.drawn(shapes, seed=1)


def prompted(model, params, method, images):
    """(Logits, prompts [B, K, D], the method's pytree) of a stack of a PGN and a head."""
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), model, params, CLASSES))
    tree, state, own = Tiny.drawn(shapes, 0.5), method.init_state(model), method.methods[0]

    def run(params, tree):
        ctx = Context(state=state['pgn'])
        ctx.model = model
        with jax.default_matmul_precision('highest'):
            logits, _ = forward(model, method, params, tree, images, state=state)
            return logits, own.generate(tree['pgn'], images, ctx)

    return *jax.jit(run, **OPTIONS)(params, tree), tree


@lru_cache
def _plain(model):
    def run(params, head, x):
        return forward(model, Linear(), params, head, x)[0]

    return jax.jit(run, **OPTIONS)


def plain(model, params, tree, canvases):
    """Logits of a network with a head and without any prompt."""
    with jax.default_matmul_precision('highest'):
        return np.asarray(_plain(model)(params, tree['linear'], jnp.asarray(canvases, jnp.float32)))


@pytest.mark.parametrize(('name', 'count'), CASES)
def test_a_plain_network_gives_the_same_scores_for_the_extended_image(name, count):
    model, params = network(**NETWORKS[name])
    size = model.image_size
    images = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    method = Stack(PGN(num_tokens=count, **GENERATOR), Linear())
    logits, prompts, tree = prompted(model, params, method, jnp.asarray(images))
    held = canvas.table(model, params)
    embedding = params['embedding']
    for pos in (np.zeros((count, 16), np.float32), held[np.arange(count) + 3]):
        patches = invert(prompts, embedding['kernel'], embedding.get('bias'), pos)
        other, extended = canvas.deployed(model, params, pos)
        whole = canvas.canvas(images, patches)
        assert whole.shape == ((3, 20, 16, 3) if count == 4 else (3, 4, 76, 3))
        np.testing.assert_allclose(plain(other, extended, tree, whole), logits, atol=2e-5)
        # The same network: other code is not run, and no other number has changed.
        assert type(other) is ViT and other.clone(window_rows=0, window_columns=0, posemb=model.posemb) == (
            model.clone(posemb_prefix=other.posemb_prefix)
        )
        same = jax.tree.map(lambda a, b: a is b, {**params, 'pos_embedding': 0}, {**extended, 'pos_embedding': 0})
        assert all(jax.tree.leaves({k: v for k, v in same.items() if k != 'pos_embedding'}))
        np.testing.assert_array_equal(extended['pos_embedding'][0, : len(held)], held)
        # And the patches are what does it.
        bare = plain(other, extended, tree, canvas.canvas(images, 0 * patches))
        assert np.abs(bare - logits).max() > 1e-2


def test_a_canvas_is_the_image_with_patches_in_order():
    images = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    patches = -1 - np.arange(2 * 3 * 4 * 4 * 3).reshape(2, 3, 4, 4, 3)
    whole = canvas.canvas(images, patches)
    np.testing.assert_array_equal(whole[:, :8], images)
    np.testing.assert_array_equal(whole[:, 8:, 4:8], patches[:, 1])
    strip = canvas.canvas(images, patches[:, :2])
    assert strip.shape == (2, 4, 32, 3)
    np.testing.assert_array_equal(strip[:, :, 12:16], images[:, 4:, :4])  # the fourth patch: second row, first column
    np.testing.assert_array_equal(strip[:, :, 28:], patches[:, 1])


@pytest.fixture
def kernel():
    return np.random.default_rng(1).normal(size=(4, 4, 3, 16))


@pytest.fixture
def prompts():
    return np.random.default_rng(2).normal(size=(2, 3, 16))


def test_patches_are_the_smallest_or_the_nearest_to_a_picture(kernel, prompts):
    inverse = inverse_of(kernel, np.ones(16))
    found = inverse.patches(prompts, np.full(16, 0.5))
    np.testing.assert_allclose(np.einsum('bkrsc,rscd->bkd', found, kernel) + 1.5, prompts, atol=1e-12)
    matrix = kernel.reshape(-1, 16)
    expected = np.linalg.lstsq(matrix.T, (prompts - 1.5).reshape(-1, 16).T, rcond=None)[0].T
    np.testing.assert_allclose(found.reshape(6, -1), expected, atol=1e-12)
    assert inverse.residual(found, prompts, np.full(16, 0.5)).max() < 1e-13
    picture = np.random.default_rng(3).normal(size=(2, 3, 4, 4, 3))
    for toward in (picture, picture[0, 0], np.array([0.1, 0.2, 0.3])):
        near = inverse.patches(prompts, toward=toward)
        assert inverse.residual(near, prompts).max() < 1e-13
        # From the picture to the nearest solution is no step that leaves the tokens as they are.
        step = (near - toward).reshape(6, -1)
        np.testing.assert_allclose(step - step @ matrix @ inverse.pinv, 0, atol=1e-12)


def test_patches_move_into_range_without_changing_tokens(kernel, prompts):
    inverse = inverse_of(kernel)
    start = inverse.patches(prompts)
    low, high = np.full(3, -0.22), np.full(3, 0.2)
    share = []
    for rounds in (0, 5, 200):
        moved = inverse.into_range(start, low, high, rounds)
        assert inverse.residual(moved, prompts).max() < 1e-12
        share.append(np.maximum(moved - high, low - moved).max())
    assert share[0] > 0.05 and share[1] < share[0] / 2 and share[2] < 1e-3
    np.testing.assert_array_equal(inverse.into_range(start, low, high, 0), start)


def test_too_few_pixels_are_refused_with_the_reason(prompts):
    kernel = np.random.default_rng(1).normal(size=(2, 2, 3, 16))
    with pytest.raises(UsageError, match='a patch of 2 x 2 x 3 = 12 numbers cannot make every token of width 16'):
        invert(prompts, kernel)
    found = invert(prompts, kernel, least_squares=True)
    inverse = inverse_of(kernel, least_squares=True)
    assert inverse.rank == 12 and not inverse.exact
    residual = inverse.residual(found, prompts)
    assert residual.min() > 0.1 and residual.max() < 1
    # As near as it can be: what is missing is orthogonal to whatever patches can make.
    missed = np.einsum('bkrsc,rscd->bkd', found, kernel) - prompts
    np.testing.assert_allclose(np.einsum('bkd,rscd->bkrsc', missed, kernel), 0, atol=1e-12)


def test_a_patch_convolution_without_full_rank_is_refused(kernel, prompts):
    kernel[..., 5] = kernel[..., 3] - kernel[..., 4]
    with pytest.raises(UsageError, match='its patch convolution has rank 15, and tokens have width 16'):
        invert(prompts, kernel)
    prompts[..., 5] = prompts[..., 3] - prompts[..., 4]  # these it can make
    inverse = inverse_of(kernel, least_squares=True)
    assert inverse.residual(inverse.patches(prompts), prompts).max() < 1e-12
    with pytest.raises(UsageError, match='has rank 0'):
        inverse_of(0 * kernel)


def test_methods_that_do_more_than_insert_prompts_are_refused():
    for method in (PGN(), IIP(), VPT(), VPT(project=3), SPT(deep=False)):
        check_method(method)
        check_method(Stack(method, Linear()))
    check_method(Stack(PGN(), VPT(), Linear()))
    for method, name in (
        (VPT(deep=True), 'vpt'), (VPT(pool='img_pool'), 'vpt'), (VAPT(), 'vapt'), (VPTPad(), 'vpt_pad'),
        (Stack(VPT(), Bias(), Linear()), 'bias'), (Linear(), 'linear'),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"can be turned into pixels .*, and '{name}' does something else"):
            check_method(method)


def test_networks_whose_patches_are_not_the_images_or_know_their_places_are_refused():
    check_model(ViT(**SIZES))
    check_model(BEiT(**SIZES, relative='none'))
    for model, reason in (
        (ResNet(), 'a ResNet has no sequence that prompts could join'),
        (ViT(**{**SIZES, 'patch_size': 16}, stem_depths=(1, 1)), 'cut from the maps of a ResNet'),
        (BEiT(**SIZES), 'relative positions, prompts do not'),
    ):
        with pytest.raises(UsageError, match=reason):
            check_model(model)


def test_a_network_says_what_it_is_for(tiny):
    # Windows that are not square are a setting like others, which files of settings keep.
    model, params = canvas.deployed(tiny.model, tiny.params, np.zeros((8, 16)))
    assert (model.window_rows, model.window_columns) == (6, 4) and model.window == (6, 4)
    assert {f.name for f in dataclasses.fields(model)} >= {'window_rows', 'window_columns'}
    shape = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 24, 16, 3))))
    assert shape['params']['pos_embedding'].shape == params['pos_embedding'].shape
