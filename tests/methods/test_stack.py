"""Composition: members keep to themselves, and each finds its own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import (
    VAPT,
    VPT,
    Adapter,
    Bias,
    ClsToken,
    Context,
    Full,
    Linear,
    MLPHead,
    Stack,
    VPTAdd,
    with_head,  # fmt: skip
)


def test_members_keep_their_prompts_apart(tiny):
    method = Stack(VPT(deep=True), Stack(Bias(), MLPHead(layers=2)))
    assert [m.name for m in method.methods] == ['vpt', 'bias', 'mlp']
    shapes = tiny.shapes(method)
    for member in method.methods:
        alone = tiny.shapes(member)
        assert jax.tree.map(jnp.shape, shapes[member.name]) == jax.tree.map(jnp.shape, alone)
    assert set(shapes) == {'vpt', 'bias', 'mlp'}
    assert set(method.init_state(tiny.model)) == {'mlp'}


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ((Linear(), MLPHead()), 'have a head, got linear and mlp'),
        ((VPT(), VPT(deep=True)), 'different names, got vpt, vpt'),
        ((VPT(), Stack(VPT())), 'different names'),
    ],
)
def test_what_cannot_be_stacked(members, message):
    with pytest.raises(UsageError, match=message):
        Stack(*members)


def test_a_second_readout_is_refused():
    class Other(VPT):
        name = 'other'

    with pytest.raises(UsageError, match='change the readout, got vpt and other'):
        Stack(VPT(pool='img_pool'), Other(pool='img_pool'))


def test_with_head():
    assert with_head(Linear()) == Linear()
    assert with_head(VPT()) == Stack(VPT(), Linear())
    assert with_head(VPT(), MLPHead()).changes('logits')


def test_an_adapter_is_innermost_and_does_nothing_at_first(tiny):
    method = Stack(Adapter(reduction=4), VPT(num_tokens=2, deep=True), Linear())
    assert [m.name for m in method.methods] == ['vpt', 'linear', 'adapter']
    prompts = tiny.prompts(method)
    plain = tiny.logits(Stack(VPT(num_tokens=2, deep=True), Linear()), prompts)
    noisy = tiny.logits(method, prompts)
    prompts['adapter']['up'] = jax.tree.map(jnp.zeros_like, prompts['adapter']['up'])
    np.testing.assert_allclose(tiny.logits(method, prompts), plain, atol=1e-6)
    assert np.abs(noisy - plain).max() > 1e-2


def test_order_of_prompts_does_not_matter(tiny):
    # Prompts have no position, so attention cannot tell whose come first; VAPT must not take VPT's for patches.
    vpt, vapt = VPT(num_tokens=2, deep=True), VAPT(num_tokens=3)
    one, other = Stack(VPTAdd(), vpt, vapt, Linear()), Stack(vpt, VPTAdd(), vapt, Linear())
    prompts = tiny.prompts(one)
    one, other = tiny.logits(one, prompts), tiny.logits(other, prompts)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_spans_follow_insertions_and_replacements():
    ctx = Context()
    ctx.prefix, ctx.num_patches = 1, 4
    a, b = ctx.scoped('a'), ctx.scoped('b')
    x = np.zeros((2, 5, 1), np.float32)
    x = a.insert(x, jnp.full((2, 2, 1), 1.0))
    x = b.insert(x, jnp.full((2, 3, 1), 2.0))
    assert x.shape == (2, 10, 1) and (a.own(x) == 1).all() and (b.own(x) == 2).all()
    x = b.replace(x, jnp.full((2, 1, 1), 3.0))  # in front of a's
    assert x.shape == (2, 8, 1) and (a.own(x) == 1).all() and (b.own(x) == 3).all()
    x = a.replace(x, None)
    assert x.shape == (2, 6, 1) and a.own(x).shape == (2, 0, 1) and (b.own(x) == 3).all()
    x = a.replace(x, jnp.full((2, 2, 1), 4.0))
    assert (a.own(x) == 4).all() and (b.own(x) == 3).all() and (a.patches(x) == 0).all()


def test_the_largest_backbone_dropout_wins():
    assert Stack(VPT(), Full(dropout=0.3), Linear()).backbone_dropout == 0.3
    assert Stack(VPT(), Linear()).backbone_dropout == 0.0


def test_members_draw_different_random_numbers():
    ctx = Context(train=True, key=jax.random.key(0))
    keys = [ctx.scoped('a').rng('x'), ctx.scoped('b').rng('x'), ctx.scoped('a').rng('y'), ctx.scoped('a').rng('x', 1)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 4
    with pytest.raises(ValueError, match='give it a key'):
        Context(train=True).rng('x')


def test_a_missing_place_is_named(tiny):
    class Closed:
        places = frozenset({'tokens', 'logits'})
        depth, cls_token = 3, False

    with pytest.raises(UsageError, match="'vpt' changes the 'layer' of a network, which Closed does not offer"):
        Stack(VPT(deep=True), Linear()).check(Closed())
    with pytest.raises(UsageError, match='does not offer'):
        ClsToken().check(Closed())
