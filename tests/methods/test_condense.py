"""Condensed prompts: which stay, and that taking the others out is what masking them everywhere would do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import SPT, VPT, Context, Linear, Stack
from vpt_jax.methods.condense import Condensed, condense, keep, prompts_of, rows_of

KEPT = [np.array([0, 3]), np.array([], int), np.array([1, 2, 4])]


class Masked(VPT):
    """VPT in which no query sees the prompts that are not in `KEPT`; all of them stay in the sequence."""

    def layer(self, prompts, block, x, i, ctx):
        if self.deep and i:
            x = ctx.replace(x, self.expand(prompts, self.rows(prompts, i), len(x), i, ctx))
        hidden = np.zeros(x.shape[1], np.float32)
        hidden[1:6] = -np.inf
        hidden[1 + KEPT[i if self.deep else 0]] = 0.0
        bias = jnp.broadcast_to(hidden, (1, 2, x.shape[1], x.shape[1]))
        x = x + block.attention(block.norm1(x), None, bias)
        return x + block.feed(x)


@pytest.mark.parametrize('settings', [{'deep': True}, {'deep': False}, {'deep': True, 'project': 6}], ids=str)
def test_taking_prompts_out_equals_masking_them_in_every_block(tiny, settings):
    masked = Stack(Masked(num_tokens=5, **settings), Linear())
    prompts = tiny.prompts(masked)
    kept = KEPT if settings['deep'] else KEPT[:1]
    method, condensed = condense(Stack(VPT(num_tokens=5, **settings), Linear()), prompts, kept)
    assert {k: len(v) for k, v in condensed['condensed']['rows'].items()} == (
        {'0': 2, '2': 3} if settings['deep'] else {'0': 2}
    )
    expected = tiny.logits(masked, prompts)
    np.testing.assert_allclose(tiny.logits(method, condensed), expected, atol=2e-5)
    # A prompt of zeros is not a prompt that is not there.
    zeroed = {k: np.zeros_like(v) for k, v in prompts['vpt'].items() if k != 'proj'}
    zeroed |= {'proj': prompts['vpt']['proj']} if 'proj' in prompts['vpt'] else {}
    for i, index in enumerate(kept):
        rows = zeroed['prompts'] if i == 0 else zeroed['deep'][i - 1]
        rows[index] = rows_of(prompts['vpt'], 3)[i][index]
    other = tiny.logits(Stack(VPT(num_tokens=5, **settings), Linear()), {**prompts, 'vpt': zeroed})
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize('settings', [{}, {'deep_layers': 2, 'drop_after': True}, {'deep_layers': 2}], ids=str)
def test_scanned_equals_unrolled_and_all_kept_equals_vpt(tiny, settings):
    whole = Stack(VPT(num_tokens=5, deep=True, **settings), Linear())
    prompts = tiny.prompts(whole)
    blocks = settings.get('deep_layers', 3)
    method, everything = condense(whole, prompts, [np.arange(5)] * blocks)
    method.check(tiny.model)
    np.testing.assert_allclose(tiny.logits(method, everything), tiny.logits(whole, prompts), atol=1e-6)
    method, part = condense(whole, prompts, KEPT[:blocks])
    np.testing.assert_allclose(tiny.logits(method, part), tiny.logits(method, part, scan=True), atol=2e-5)


def test_condensed_prompts_are_drawn_in_their_shapes_and_condensed_again(tiny):
    whole = Stack(SPT(num_tokens=5), Linear())
    prompts = tiny.prompts(whole)
    method, part = condense(whole, prompts, KEPT)
    shapes = tiny.shapes(method)
    assert jax.tree.map(np.shape, part) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert prompts_of(method).kept == (2, 0, 3)
    again, smaller = condense(method, part, [np.array([1]), np.array([], int), np.array([0, 2])])
    _, directly = condense(whole, prompts, [np.array([3]), np.array([], int), np.array([1, 4])])
    jax.tree.map(np.testing.assert_array_equal, smaller, directly)
    assert [m.name for m in again.methods] == [m.name for m in method.methods]


def test_ranking_over_all_blocks_or_inside_each():
    scores = [np.array([5.0, 1.0, 4.0]), np.array([0.1, 0.2, 0.3]), np.array([3.0, 4.0, 2.0])]
    assert [list(k) for k in keep(scores, 0.45)] == [[0, 2], [], [0, 1]]  # 4 of 9
    assert [list(k) for k in keep(scores, 0.45, per_layer=True)] == [[0], [2], [1]]  # 1.35 + 0.5
    assert [list(k) for k in keep(scores, 0.5, per_layer=True)] == [[0, 2], [1, 2], [0, 1]]  # 1.5 + 0.5
    assert [list(k) for k in keep(scores, 1.0)] == [[0, 1, 2]] * 3
    equal = [np.ones(2), np.ones(3)]
    assert [list(k) for k in keep(equal, 0.6)] == [[0, 1], [0]]  # ties to the lower block, then the lower index
    assert sum(map(len, keep([np.arange(45.0)], 0.7))) == 32  # 31.5, whatever 0.7 is in binary
    assert [len(k) for k in keep([np.arange(3.0), np.array([])], 0.34)] == [1, 0]


@pytest.mark.parametrize('ratio', [0.0, -0.1, 1.5, float('nan')])
def test_shares_out_of_range_are_refused(ratio):
    with pytest.raises(UsageError, match=r'share of prompts to keep must be in \(0, 1\]'):
        keep([np.ones(3)], ratio)


def test_keeping_none_is_refused():
    with pytest.raises(UsageError, match=r'keeping 0\.01 of 6 prompts leaves none'):
        keep([np.ones(3), np.ones(3)], 0.01)


def test_what_cannot_be_condensed_is_refused(tiny):
    for settings in ({'shared': True}, {'last_layers_overwriting_patches': 2}, {'pool': 'prompt_pool'}):
        with pytest.raises(UsageError, match='cannot be condensed'):
            condense(VPT(num_tokens=3, deep=True, **settings), {}, KEPT)
    with pytest.raises(UsageError, match=r'one set of VPT prompts \(vpt, spt or condensed\), got linear'):
        prompts_of(Linear())
    with pytest.raises(UsageError, match='kept has 2 numbers, but the backbone has 3 prompted blocks'):
        Condensed(deep=True, kept=(1, 2)).check(tiny.model)
    for kept in ((0, 0), (-1, 2)):
        with pytest.raises(UsageError, match='kept must be numbers >= 0, not all of them 0'):
            Condensed(deep=True, kept=kept)


def test_tokens_of_others_stay_theirs_around_a_block_without_prompts():
    # Number 0 has no tokens in block 0; when it gets some, they go before number 1's, which follow it.
    ctx = Context()
    ctx.prefix = 1
    first, second = ctx.scoped('first'), ctx.scoped('second')
    x = jnp.zeros((1, 3, 1))
    x = second.insert(x, jnp.full((1, 2, 1), 2.0))
    x = first.insert(x, jnp.zeros((1, 0, 1)))
    x = first.replace(x, jnp.full((1, 3, 1), 1.0))
    np.testing.assert_array_equal(x[0, :, 0], [0, 1, 1, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(first.own(x)[0, :, 0], [1, 1, 1])
    np.testing.assert_array_equal(second.own(x)[0, :, 0], [2, 2])
    x = second.replace(x, None)
    np.testing.assert_array_equal(first.own(x)[0, :, 0], [1, 1, 1])


def test_settings_are_those_of_the_vpt(tiny):
    vpt = VPT(num_tokens=5, deep=True, dropout=0.2, deep_layers=2, drop_after=True)
    method, _ = condense(vpt, tiny.prompts(vpt), KEPT[:2])
    same = {f.name: getattr(method, f.name) for f in dataclasses.fields(VPT)}
    assert same == dataclasses.asdict(vpt) and method.kept == (2, 0)
