"""VP: what becomes of the pixels, in the space of either original."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import VP, Context, Stack
from vpt_jax.methods.vp import frame_mask
from vpt_jax.models.network import Network

SIDE = 12
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@dataclasses.dataclass(frozen=True)
class Model(Network):
    image_size: int = SIDE
    depth: int = 1


def drawn(method, side=SIDE, seed=0):
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), Model(side), None, 2))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), shapes)


def run(method, prompts, images, **ctx):
    return np.asarray(method.pixels(prompts, jnp.asarray(images), Context(pixels=PIXELS, **ctx)))


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)


def test_the_frame_lies_on_top_of_the_whole_image(images):
    method = VP(size=3)
    prompts = drawn(method)
    added = run(method, prompts, images) - images
    np.testing.assert_allclose(added[0], added[2], atol=1e-6)  # one pattern for all
    np.testing.assert_array_equal(added[0, 3:-3, 3:-3], 0)
    np.testing.assert_allclose(added[0, :3], prompts['up'], atol=1e-6)  # with its corners
    np.testing.assert_allclose(added[0, -3:], prompts['down'], atol=1e-6)
    np.testing.assert_allclose(added[0, 3:-3, :3], prompts['left'], atol=1e-6)
    np.testing.assert_allclose(added[0, 3:-3, -3:], prompts['right'], atol=1e-6)


def test_a_fixed_patch_is_in_the_upper_left_corner(images):
    method = VP(kind='fixed_patch', size=5)
    prompts = drawn(method)
    added = run(method, prompts, images) - images
    np.testing.assert_allclose(added[1, :5, :5], prompts['patch'], atol=1e-6)
    assert not added[:, 5:].any() and not added[:, :, 5:].any()


def test_a_random_patch_has_one_place_a_batch_never_at_the_far_border(images):
    method = VP(kind='random_patch', size=SIDE - 3)  # places 0, 1, 2; 3 is never drawn
    prompts, seen = drawn(method), set()
    for seed in range(40):
        ctx = Context(train=True, key=jax.random.key(seed), state=method.init_state(Model()))
        added = np.asarray(method.pixels(prompts, images, ctx)) - images
        row, column = ctx.updates['location'].tolist()
        seen.add((row, column))
        np.testing.assert_allclose(added[2, row : row + 9, column : column + 9], prompts['patch'], atol=1e-5)
        np.testing.assert_allclose(added[0], added[2], atol=1e-5)
    assert {row for row, _ in seen} == {column for _, column in seen} == {0, 1, 2}
    assert len(seen) > 3  # rows and columns are drawn apart


def test_evaluation_keeps_the_place_of_the_last_step(images):
    method = VP(kind='random_patch', size=4)
    prompts = drawn(method)
    added = run(method, prompts, images, state={'location': jnp.array([2, 5])}) - images
    np.testing.assert_allclose(added[0, 2:6, 5:9], prompts['patch'], atol=1e-6)


def test_an_additive_frame_is_the_padding_prompt_cut_out_of_a_canvas(images):
    method = VP(kind='additive', size=3)
    prompts = drawn(method)
    padding = {'up': prompts['program'][:3], 'down': prompts['program'][-3:],
               'left': prompts['program'][3:-3, :3], 'right': prompts['program'][3:-3, -3:]}  # fmt: skip
    np.testing.assert_allclose(run(method, prompts, images), run(VP(size=3), padding, images), atol=1e-6)
    grads = jax.grad(lambda p: jnp.square(method.pixels(p, images, Context())).sum())(prompts)['program']
    assert not grads[3:-3, 3:-3].any() and grads[:3].all() and grads[:, :3].all()


def test_the_full_canvas_is_everywhere(images):
    method = VP(kind='full')
    prompts = drawn(method)
    np.testing.assert_allclose(run(method, prompts, images), images + prompts['program'], atol=1e-6)


def small(side):
    """Images in [0, 1], and normalised."""
    unit = np.random.default_rng(2).uniform(size=(2, side, side, 3)).astype(np.float32)
    return unit, (unit - np.float32(PIXELS[0])) / np.float32(PIXELS[1])


def test_a_small_image_comes_into_a_frame_of_bounded_pixels():
    method = VP(kind='expansive', inner=7)  # a gap of 5: 3 on top and left, 2 on bottom and right
    assert method.input_size(Model()) == Stack(method).input_size(Model()) == 7
    unit, images = small(7)
    prompts = jax.tree.map(lambda a: 20 * a, drawn(method))
    out = run(method, prompts, images) * np.float32(PIXELS[1]) + np.float32(PIXELS[0])
    np.testing.assert_allclose(out[:, 3:-2, 3:-2], unit, atol=1e-5)
    frame = frame_mask(SIDE, 7, ())[..., 0].astype(bool)
    assert frame.sum() == SIDE**2 - 49 and not frame[3:-2, 3:-2].any()
    np.testing.assert_allclose(out[0][frame], jax.nn.sigmoid(prompts['program'])[frame], atol=1e-5)
    assert out.min() > -1e-5 and out.max() < 1 + 1e-5
    grey = run(method, method.init(jax.random.key(0), Model(), None, 2), images)
    half = (0.5 - np.float32(PIXELS[0])) / np.float32(PIXELS[1])
    np.testing.assert_allclose(grey[0][frame], np.broadcast_to(half, (frame.sum(), 3)), atol=1e-5)


def test_masked_pixels_get_no_gradient_and_the_mask_opens_some():
    rows = tuple('1' * i + '0' * (6 - i) for i in range(6))  # below the diagonal
    method, (unit, images) = VP(kind='expansive', mask=rows), small(6)
    assert method.input_size(Model()) == 6
    prompts = drawn(method)
    out = run(method, prompts, images) * np.float32(PIXELS[1]) + np.float32(PIXELS[0])
    mask = frame_mask(SIDE, 6, rows)
    np.testing.assert_allclose(out[:, 3:9, 3:9] - unit, np.broadcast_to(
        (jax.nn.sigmoid(prompts['program']) * mask)[3:9, 3:9], unit.shape), atol=1e-5)  # fmt: skip
    ctx = Context(pixels=PIXELS)
    grads = jax.grad(lambda p: jnp.square(method.pixels(p, images, ctx)).sum())(prompts)['program']
    np.testing.assert_array_equal(np.asarray(grads) != 0, np.broadcast_to(mask > 0, grads.shape))


def test_an_expansive_prompt_must_know_the_pixels():
    method, (_, images) = VP(kind='expansive', inner=6), small(6)
    with pytest.raises(ValueError, match='tell the forward pass'):
        method.pixels(drawn(method), images, Context())
    with pytest.raises(UsageError, match='images of 12 pixels do not fit'):
        run(method, drawn(method), np.zeros((1, SIDE, SIDE, 3), np.float32))


@pytest.mark.parametrize(('method', 'count'), [
    (VP(), 69_840), (VP(kind='fixed_patch'), 2_700), (VP(kind='random_patch', size=50), 7_500),
    (VP(kind='expansive', inner=32), 150_528), (VP(kind='additive'), 150_528), (VP(kind='full'), 150_528),
])  # fmt: skip
def test_published_numbers_of_parameters(method, count):
    assert sum(a.size for a in jax.tree.leaves(drawn(method, side=224))) == count


def test_live_entries_of_a_canvas():
    assert 3 * frame_mask(224, 32, ()).sum() == 147_456 and 3 * frame_mask(224, 128, ()).sum() == 101_376
    assert 3 * frame_mask(224, 224 - 60, ()).sum() == 69_840


def test_how_prompts_start():
    def first(method):
        leaves = jax.tree.leaves(method.init(jax.random.key(0), Model(40), None, 2))
        return np.concatenate([np.asarray(a).ravel() for a in leaves])

    for kind in ('additive', 'full', 'expansive'):
        assert not first(VP(kind=kind, size=12)).any()
    for method in (VP(size=12), VP(kind='full', pixel_init='normal')):
        assert abs(first(method).mean()) < 0.1 and abs(first(method).std() - 1) < 0.1
    assert not first(VP(size=12, pixel_init='zeros')).any()
    assert VP(kind='expansive').input_size(Model(224)) == 128


@pytest.mark.parametrize(('settings', 'message'), [
    ({'kind': 'padding'}, "unknown kind of VP 'padding': did you mean 'pad'"),
    ({'size': 0}, 'size must be >= 1, got 0'),
    ({'inner': 0, 'kind': 'expansive'}, 'inner must be >= 1, got 0'),
    ({'inner': 5}, "for kind='expansive', not 'pad'"),
    ({'kind': 'expansive', 'mask': ('01', '2x')}, "rows of s characters '0' and '1'"),
    ({'kind': 'expansive', 'mask': ('01',)}, "rows of s characters '0' and '1'"),
    ({'pixel_init': 'uniform'}, "unknown pixel initialisation 'uniform'"),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        VP(**settings)


@pytest.mark.parametrize(('method', 'message'), [
    (VP(size=6), "size=6 does not fit kind='pad' on images of 12 pixels"),
    (VP(kind='random_patch', size=12), "size=12 does not fit kind='random_patch'"),
    (VP(kind='expansive', inner=12), "inner=12 does not fit kind='expansive'"),
    (VP(kind='expansive', inner=5, mask=('00', '00')), 'a mask of 2 rows does not fit inner=5'),
])  # fmt: skip
def test_prompts_that_do_not_fit_the_network(method, message):
    with pytest.raises(UsageError, match=message):
        method.check(Model())
    VP(size=5).check(Model())
