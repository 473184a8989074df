"""Activation prompts: where they are, what they cost, and what they have to do with norms."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import QUICK, drawn
from vpt_jax.errors import UsageError
from vpt_jax.methods import AP, VPT, Context, Linear, Stack, VPTPad, forward
from vpt_jax.methods.base import Places
from vpt_jax.models import batch_statistics, resnet
from vpt_jax.models.convolution import BatchNorm
from vpt_jax.models.network import Network
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.vit import VARIANTS, ViT

SMALL = ResNet(depths=(1, 2, 1), inner=(4, 8, 8), outer=(4, 8, 8), bottleneck=False, stem_width=4, image_size=32)


def count(method, model):
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), model, None, 2))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(('variant', 'at', 'full', 'channel'), [
    ('B', 5, 151_296, 768), ('L', 2, 201_728, 1_024), ('L', 'end', 201_728, 1_024),
    (101, 'layer1.0', 200_704, 64), (101, 'layer2', 802_816, 256), (101, 'layer3.0', 401_408, 512),
    (101, 'layer3.1', 200_704, 1_024), (101, 'layer4.0', 200_704, 1_024), (101, 'layer4.2', 100_352, 2_048),
    (101, 'end', 100_352, 2_048),
])  # fmt: skip
def test_numbers_of_parameters_at_224_pixels(variant, at, full, channel):
    model = ResNet(**resnet.variant(101)) if variant == 101 else ViT(**VARIANTS[variant], patch_size=16)
    assert count(AP(at=(at,)), model) == full
    assert count(AP(at=(at,), shape='channel'), model) == channel


def test_the_published_places_are_the_default():
    large, deep = ViT(**VARIANTS['L'], patch_size=16), ResNet(**resnet.variant(101))
    assert AP().first_block(large) == 2 and AP().boundaries(24) == (2, 3)
    assert deep.block_of('layer4.0') == 30 == AP().first_block(deep)
    for model in (large, deep):
        assert count(AP(), model) == count(AP(at=(AP().first_block(model),)), model)


def test_places_by_name():
    assert [SMALL.block_of(p) for p in ('layer1', 'layer2.1', 'layer3', 'end', 0, 4)] == [0, 2, 3, 4, 0, 4]
    for place in ('layer2.2', 'layer4', 'layer0', 5, -1, 'norm'):
        with pytest.raises(UsageError, match=f'no place {place!r}: give a number from 0 to 4, a block .layer3.0'):
            AP(at=(place,)).check(SMALL)
    with pytest.raises(UsageError, match="ViT of 12 blocks has no place 'layer1'"):
        AP(at=('layer1',)).check(ViT(**VARIANTS['B'], patch_size=16))


def test_first_blocks(tiny):
    model = tiny.model
    assert Stack(AP(at=(2,)), Linear()).first_block(model) == 2
    assert Stack(AP(at=(2,)), VPT(), Linear()).first_block(model) == 0
    assert AP(at=('end',)).first_block(model) == 2 and Linear().first_block(model) == 3
    assert AP(at=(0, 1, 'end')).boundaries(4) == (2, 3) and AP(at=(1, 2)).boundaries(4) == (1, 3)


class _Shifted(Places):
    """Adds to what enters some blocks and leaves the last, by hand."""

    def __init__(self, deltas):
        self.deltas = deltas

    def layer(self, prompts, block, x, i, ctx):
        x = block(x + self.deltas[i] if i in self.deltas else x)
        return x + self.deltas[ctx.model.depth] if i + 1 == ctx.model.depth and ctx.model.depth in self.deltas else x


@pytest.mark.parametrize('shape', ['full', 'channel'])
def test_prompts_are_added_to_what_enters_blocks_of_a_resnet(shape):
    params, rng = drawn(SMALL), np.random.default_rng(0)
    images = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    method = AP(at=('layer2.1', 'end', 'layer3', 'layer1.0'), shape=shape)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), SMALL, None, 2))
    prompts = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), shapes)
    sides = {0: '8x8x4', 2: '4x4x8', 3: '4x4x8', 4: '2x2x8'}
    rows: dict = {}
    deltas = {}
    for i, name in sides.items():
        name = name if shape == 'full' else name.split('x')[-1]
        deltas[i] = prompts['deltas'][name][rows.setdefault(name, 0)]
        rows[name] += 1
    assert {name: leaf.shape[0] for name, leaf in prompts['deltas'].items()} == rows
    run = jax.jit(lambda p: forward(SMALL, method, params, p, images)[0], **QUICK)
    by_hand = jax.jit(lambda d: SMALL.apply({'params': params}, images, _Shifted(d)), **QUICK)
    np.testing.assert_allclose(run(prompts), by_hand(deltas), atol=1e-5)


def test_inserted_tokens_get_no_prompt():
    ctx = Context()
    ctx.prefix, ctx.num_patches = 1, 4
    rows = jnp.arange(5.0)[:, None]
    x = jnp.zeros((2, 5, 1))
    np.testing.assert_array_equal(ctx.beside_own(rows, x), rows)
    x = ctx.insert(x, jnp.ones((2, 3, 1)))
    assert ctx.beside_own(rows, x)[:, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match='prompts for 7 tokens do not fit an image of 5'):
        ctx.beside_own(jnp.zeros((7, 1)), x)


def test_a_full_prompt_belongs_to_one_image_size(tiny):
    method = Stack(VPTPad(num_pixels=2), AP(), Linear())
    with pytest.raises(UsageError, match='prompts for 17 tokens do not fit an image of 26'):
        jax.eval_shape(lambda p: forward(tiny.model, method, tiny.params, p, tiny.images), tiny.shapes(method))
    larger = np.zeros((1, 64, 64, 3), np.float32)
    with pytest.raises(UsageError, match=r"prompts of 4x4x8 entries do not fit .* 8x8x8.*shape='channel' fits any"):
        method = AP(at=('layer3',))
        prompts = method.init(jax.random.key(0), SMALL, None, 2)
        jax.eval_shape(lambda: forward(SMALL, method, drawn(SMALL), prompts, larger))


class _One(Network):
    """A network of one block over maps."""

    depth, image_size, places = 1, 4, frozenset({'layer'})

    def activation_shape(self, i):
        return 4, 4, 3


def _around(block, x, at, delta, ctx=None):
    """What leaves a single block with a prompt per channel at one of its ends."""
    ctx = ctx or Context()
    ctx.model, ctx.start = _One(), 0
    return AP(at=(at,), shape='channel').layer({'deltas': {'3': delta[None]}}, block, x, 0, ctx)


@pytest.fixture
def norm():
    rng = np.random.default_rng(0)
    params = {'scale': rng.normal(size=3), 'bias': rng.normal(size=3), 'mean': rng.normal(size=3),
              'var': rng.uniform(0.5, 2, 3)}  # fmt: skip
    params = {name: jnp.asarray(a, jnp.float32) for name, a in params.items()}
    return params, jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32), jnp.asarray(rng.normal(size=3), jnp.float32)


def test_beside_a_frozen_batch_norm_a_channel_prompt_is_a_shift_of_beta(norm):
    params, x, delta = norm

    def normalised(x, shift=0.0):
        return BatchNorm().apply({'params': {**params, 'bias': params['bias'] + shift}}, x)

    before = params['scale'] * delta / jnp.sqrt(params['var'] + 1e-5)
    np.testing.assert_allclose(_around(normalised, x, 0, delta), normalised(x, before), atol=1e-5)
    np.testing.assert_allclose(_around(normalised, x, 'end', delta), normalised(x, delta), atol=1e-5)
    assert np.abs(normalised(x, before) - normalised(x)).max() > 0.1


def test_before_a_norm_by_the_batch_a_channel_prompt_does_nothing(norm):
    params, x, delta = norm

    def by_the_batch(x):
        ctx = Context(train=True, state={'kept': jnp.ones(()), 'added': {'mean': jnp.zeros(3), 'var': jnp.zeros(3)}})
        batch_statistics.track(ctx)
        return BatchNorm().apply({'params': params}, x, ctx)

    np.testing.assert_allclose(_around(by_the_batch, x, 0, delta), by_the_batch(x), atol=1e-5)
    assert np.abs(_around(by_the_batch, x, 'end', delta) - by_the_batch(x)).max() > 0.1


def test_before_a_layer_norm_a_channel_prompt_is_no_shift(norm):
    params, x, delta = norm

    def standardised(x, shift=0.0):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
        return y * params['scale'] + params['bias'] + shift

    np.testing.assert_allclose(_around(standardised, x, 'end', delta), standardised(x, delta), atol=1e-5)
    moved = _around(standardised, x, 0, delta) - standardised(x)
    assert np.abs(moved - moved[0, 0, 0]).max() > 0.1  # not the same everywhere
    np.testing.assert_allclose(_around(standardised, x, 0, jnp.full(3, 2.0)), standardised(x), atol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_nothing_below_the_first_place_is_kept_for_the_gradient(tiny_at_depth, scan):
    tiny = tiny_at_depth(depth=4)
    model = tiny.model.clone(scan=scan)

    def kept(method):
        def residuals(prompts, params):
            loss = lambda p: forward(model, method, model.stored(params), p, tiny.images)[0].sum()  # noqa: E731
            return jax.vjp(loss, prompts)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, tiny.shapes(method), tiny.params))
        # Weights are there anyway: what grows is what is computed for the batch.
        return sum(leaf.size for leaf in leaves if (leaf.shape[:1] == (4,) and leaf.ndim > 2) or leaf.ndim > 3)

    sizes = [kept(Stack(AP(at=(at,)), Linear())) for at in (0, 1, 2, 3, 'end')]
    assert all(late < early - 1000 for early, late in pairwise(sizes)), sizes


def test_the_gradient_gets_cheaper_with_depth(tiny):
    def flops(at):
        method = Stack(AP(at=(at,)), Linear())
        loss = lambda p, params: forward(tiny.model, method, params, p, tiny.images)[0].sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(tiny.shapes(method), tiny.params).cost_analysis()['flops']

    costs = [flops(at) for at in (0, 1, 2)]
    assert all(late < 0.95 * early for early, late in pairwise(costs)), costs
    assert flops('end') < costs[1]  # though it has the last block compute tokens that nobody reads


def test_bad_settings():
    with pytest.raises(UsageError, match="unknown shape of activation prompts 'chanel': did you mean 'channel'"):
        AP(shape='chanel')
    with pytest.raises(UsageError, match='init_std must be >= 0, got -1'):
        AP(init_std=-1)


def test_how_prompts_start(tiny):
    assert not jax.tree.leaves(tiny.init(AP()))[0].any()
    drawn = jax.tree.leaves(tiny.init(AP(at=(0, 1), init_std=0.02)))[0]
    assert drawn.shape == (2, 17, 16) and abs(drawn.std() - 0.02) < 0.003
