"""VPTM: its limits and symmetries, every readout against numpy, and what it trains."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods.conftest import OPTIONS, Tiny
from tests.models import beit_reference as reference
from vpt_jax import methods
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.methods import VPTM, Context, forward
from vpt_jax.models import loading
from vpt_jax.models.transformer import Block

WINDOW, WIDTH, VOCAB, CLASSES, CODE = (2, 2), 16, 7, 5, 3


class SeenVPTM(VPTM):
    """VPTM that hands out the encoder's tokens."""

    def readout(self, prompts, x, pool, ctx: Context):
        ctx.updates['tokens'] = x
        return super().readout(prompts, x, pool, ctx)


@pytest.fixture(scope='module')
def beit():
    """A network of masked pretraining with codes, and its weights in numpy."""
    rng = np.random.default_rng(0)
    state = reference.weights(rng, window=WINDOW, depth=3, shared=True, vocab=VOCAB)
    state['quantize.embedding.weight'] = rng.normal(size=(VOCAB, CODE)).astype(np.float32)
    part, ported = scheme.port(ArraySource(state))
    model, params = loading.build(part, ported)
    images = rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    return SimpleNamespace(model=model, params=params, state=state, images=images)


def prompts_of(method, model, size=0.5):
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), model, drawn_mask(model), CLASSES))
    return Tiny.drawn(shapes, size)


def drawn_mask(model):
    return {'mask_token': jnp.ones((1, 1, model.width))}


def scores(beit, method, prompts, model=None, images=None):
    model = model or beit.model
    images = beit.images if images is None else images

    def run(params, prompts):
        with jax.default_matmul_precision('highest'):
            return forward(model, method, params, prompts, images)

    return jax.jit(run, **OPTIONS)(model.stored(beit.params), prompts)


def read_by_numpy(beit, method, prompts, mode):
    """What is read of every image, block by block."""
    rows, state, count = np.asarray(prompts.get('prompts', np.zeros((0, WIDTH)))), beit.state, method.num_tokens

    def inserted(x, rows, mask):
        rows = np.broadcast_to(rows, (len(x), *np.shape(rows)))
        return np.concatenate([x[:, :1], rows, np.broadcast_to(mask, (len(x), 1, WIDTH)), x[:, -4:]], axis=1)

    def replaced(x, i):
        return inserted(x, prompts['deep'][i - 1], x[:, 1 + count : 2 + count]) if method.deep and i else x

    x = inserted(reference.embed(state, beit.images), rows, state['mask_token'][0])
    x = reference.blocks(state, x, 2, WINDOW, count + 1, mode, replaced)[-1]
    h = reference.norm(state, 'norm', x)[:, 1 + count]
    z = h @ state['lm_head.weight'].T + state['lm_head.bias']
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    return {'hidden': h, 'logits': z, 'probs': p, 'codebook': p @ state['quantize.embedding.weight']}[method.read]


def compared_by_numpy(u, c, similarity):
    if similarity == 'cosine':
        u, c = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (u, c))
    if similarity == 'neg_sq_l2':
        return -((u[:, None] - c[None]) ** 2).sum(-1)
    return u @ c.T


@pytest.mark.parametrize(
    ('settings', 'mode', 'scan'),
    [
        ({'num_tokens': 3}, 'zero', False),
        ({'num_tokens': 2, 'deep': True, 'read': 'codebook', 'similarity': 'neg_sq_l2'}, 'zero', True),
        ({'num_tokens': 2, 'deep': True, 'read': 'hidden', 'similarity': 'dot', 'prototype_dim': 0}, 'cls', False),
        ({'num_tokens': 0, 'read': 'probs', 'temperature': 0.05}, 'cls', True),
    ],
)
def test_scores_are_those_of_numpy(beit, settings, mode, scan):
    method = VPTM(**{'prototype_dim': 4, **settings})
    method.check(beit.model)
    prompts = prompts_of(method, beit.model)
    ours, _ = scores(beit, method, prompts, beit.model.clone(scan=scan, extra_bias=mode))
    read = read_by_numpy(beit, method, prompts, mode)
    u = read @ np.asarray(prompts['projection']) if method.prototype_dim else read
    theirs = compared_by_numpy(u, np.asarray(prompts['prototypes']), method.similarity) / method.temperature
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


def test_the_order_of_the_four_groups_does_not_matter(beit):
    method = SeenVPTM(num_tokens=2, prototype_dim=4)
    prompts, model = prompts_of(method, beit.model), beit.model
    seen = scores(beit, method, prompts)[1]['tokens']
    groups = np.split(np.arange(8), [1, 3, 4])  # CLS, prompts, MASK, patches

    class Fixed:
        own_shape = None

        def __init__(self, bias):
            self.bias = bias

        def __call__(self, tokens, own):
            return self.bias

    def entering(params):
        def run(model):
            ctx = Context()
            ctx.model, ctx.prefix = model, 1
            return method.tokens(prompts, model.embed(beit.images), ctx), model.relative_bias(beit.images)(8)

        return model.apply({'params': params}, method=run)

    @jax.jit
    def in_order(order):
        x, bias = entering(beit.params)
        x, bias = x[:, order], bias[:, :, order][..., order]
        for i in range(3):
            block = Block(**model.block_settings(), relative=Fixed(bias))
            x = block.apply({'params': beit.params['Transformer'][f'encoderblock_{i}']}, x)
        return model.apply({'params': beit.params}, x, method=lambda model, x: model.encoder.norm(x))

    for permuted in itertools.permutations(groups):
        order = np.concatenate(permuted)
        with jax.default_matmul_precision('highest'):
            np.testing.assert_allclose(in_order(order), seen[:, order], atol=1e-5)


def test_a_mask_token_equal_to_cls_is_a_second_cls(beit):
    method = SeenVPTM(num_tokens=0, read='hidden', train_mask=True)
    prompts = prompts_of(method, beit.model) | {'mask_token': beit.params['cls'].reshape(-1)}
    tokens = scores(beit, method, prompts, beit.model.clone(extra_bias='cls'))[1]['tokens']
    np.testing.assert_allclose(tokens[:, 1], tokens[:, 0], atol=1e-5)
    assert not np.allclose(*scores(beit, method, prompts)[1]['tokens'][:, :2].swapaxes(0, 1), atol=1e-3)


def test_deep_prompts_taken_from_a_shallow_run_reproduce_it(beit):
    class Watched(VPTM):
        def layer(self, prompts, block, x, i, ctx):
            ctx.updates[str(i)] = ctx.own(x)[0, :-1]
            return super().layer(prompts, block, x, i, ctx)

    one = beit.images[:1]
    shallow, deep = (kind(num_tokens=2, deep=kind is VPTM, prototype_dim=4) for kind in (Watched, VPTM))
    prompts = prompts_of(shallow, beit.model)
    expected, seen = scores(beit, shallow, prompts, images=one)
    ours, _ = scores(beit, deep, prompts | {'deep': jnp.stack([seen['1'], seen['2']])}, images=one)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_temperature_only_rescales(beit):
    cold, warm = (
        VPTM(num_tokens=1, prototype_dim=4, temperature=0.05),
        VPTM(num_tokens=1, prototype_dim=4, temperature=1),
    )
    prompts = prompts_of(cold, beit.model)
    np.testing.assert_allclose(scores(beit, cold, prompts)[0], 20 * scores(beit, warm, prompts)[0], rtol=1e-4)


def test_the_plainest_readout_is_a_linear_probe_without_bias(beit):
    method = VPTM(num_tokens=2, read='hidden', prototype_dim=0, similarity='dot', temperature=1)
    prompts = prompts_of(method, beit.model)
    hidden = read_by_numpy(beit, method, prompts, 'zero')
    np.testing.assert_allclose(
        scores(beit, method, prompts)[0], hidden @ np.asarray(prompts['prototypes']).T, atol=1e-4
    )


@pytest.mark.parametrize('settings', [{'deep': True}, {'read': 'hidden', 'prototype_dim': 0}, {'train_mask': True}])
def test_only_prompts_and_verbalizer_are_trained(beit, settings):
    method = VPTM(**{'num_tokens': 2, 'prototype_dim': 4, **settings})
    draw = jax.jit(lambda: method.init(jax.random.key(0), beit.model, beit.params, CLASSES), **OPTIONS)
    prompts = draw()
    read = WIDTH if method.read == 'hidden' else VOCAB
    count = (3 if method.deep else 1) * 2 * WIDTH + CLASSES * (method.prototype_dim or read)
    count += read * method.prototype_dim + (WIDTH if method.train_mask else 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(prompts)) == count
    state = optax.adam(1e-3).init(prompts)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * count + 1
    if method.train_mask:
        np.testing.assert_array_equal(prompts['mask_token'], beit.params['mask_token'].ravel())
    np.testing.assert_array_less(np.abs(prompts['prompts']), (6 / (3 * 4 * 4 + WIDTH)) ** 0.5)


def test_every_part_gets_a_gradient(beit):
    method = VPTM(num_tokens=2, deep=True, prototype_dim=4, train_mask=True)
    prompts = prompts_of(method, beit.model)

    def loss(prompts):
        logits, _ = forward(beit.model, method, beit.params, prompts, beit.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(3)).mean()

    grads = jax.jit(jax.grad(loss), **OPTIONS)(prompts)
    assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(grads))


def test_parameters_of_the_base_size():
    model = SimpleNamespace(width=768, depth=12, patch_size=16, vocab=8192, code_width=32)
    counts = {}
    for deep in (False, True):
        made = jax.eval_shape(lambda d=deep: VPTM(num_tokens=20, deep=d).init(jax.random.key(0), model, {}, 100))
        counts |= {name: leaf.size for name, leaf in made.items()}
    assert counts == {'prompts': 15_360, 'deep': 168_960, 'projection': 1_048_576, 'prototypes': 12_800}


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_tokens': -1}, 'num_tokens must be >= 0, got -1'),
        ({'prototype_dim': -1}, 'prototype_dim must be >= 0'),
        ({'temperature': 0.0}, 'temperature must be > 0, got 0'),
        ({'read': 'logit'}, "did you mean 'logits'"),
        ({'similarity': 'cos'}, "did you mean 'cosine'"),
        ({'num_tokens': 0, 'deep': True}, 'deep=True needs num_tokens >= 1'),
        ({'prototype_dim': 1.5}, 'must be of type int'),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        methods.build('vptm', **settings)


def test_networks_that_cannot_name_tokens_are_refused(beit):
    with pytest.raises(UsageError, match=r'masked pretraining.*this ViT lacks them'):
        VPTM().check(Tiny().model)
    with pytest.raises(UsageError, match='this BEiT lacks them'):
        VPTM().check(beit.model.clone(vocab=0, code_width=0))
    with pytest.raises(UsageError, match="read='codebook' needs the code vectors"):
        VPTM(read='codebook').check(beit.model.clone(code_width=0))
