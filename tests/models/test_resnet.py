"""ResNets: sizes against published counts, shapes at every place, BatchNorm on stored and on batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import QUICK, drawn, features, shapes
from vpt_jax.errors import UsageError
from vpt_jax.models import batch_statistics, clip_resnet
from vpt_jax.models.bit import BiT
from vpt_jax.models.clip_resnet import CLIPResNet
from vpt_jax.models.convolution import BatchNorm, Conv, max_pool
from vpt_jax.models.places import Context, Places
from vpt_jax.models.resnet import VARIANTS, ResNet

TINY = {'depths': (2, 1), 'inner': (6, 8), 'outer': (12, 16), 'stem_width': 8, 'image_size': 20}


def trained(model):
    """Number of parameters as papers count them, without running statistics."""
    return sum(leaf.size for name, leaf in shapes(model).items() if not name.endswith(('/mean', '/var')))


@pytest.mark.parametrize(
    ('name', 'count', 'norms', 'width', 'depth'),
    [
        ('resnet18', 11_689_512, 9_600, 512, 8),
        ('resnet50', 25_557_032, 53_120, 2048, 16),
        ('resnet101', 44_549_160, 105_344, 2048, 33),
    ],
)
def test_published_counts(name, count, norms, width, depth):
    model = ResNet(**VARIANTS[name])
    assert (model.feature_width, model.depth) == (width, depth)
    assert trained(model) + 1000 * (width + 1) == count
    found = shapes(model)
    assert sum(leaf.size for n, leaf in found.items() if n.endswith(('/scale', '/bias'))) == norms
    assert 2 * sum(batch_statistics.names(model).values()) == norms


def test_shapes_of_a_resnet101():
    # arXiv 2604.06440 names the places by these maps.
    model = ResNet(**VARIANTS['resnet101'])
    expected = {0: (56, 56, 64), 3: (56, 56, 256), 7: (28, 28, 512), 8: (14, 14, 1024), 30: (14, 14, 1024),
                31: (7, 7, 2048), 33: (7, 7, 2048)}  # fmt: skip
    assert {i: model.activation_shape(i) for i in expected} == expected


def test_resnext_kernels_are_grouped():
    found = shapes(ResNet(**VARIANTS['resnext101_32x8d']))
    assert found['layer1_0/conv2/kernel'].shape == (3, 3, 8, 256)
    assert found['layer4_0/conv2/kernel'].shape == (3, 3, 64, 2048)


@pytest.mark.parametrize(
    'model',
    [
        ResNet(**TINY),
        ResNet(**TINY | {'image_size': 33}),
        ResNet(**TINY | {'bottleneck': False, 'inner': (8, 16), 'outer': (8, 16)}),
        CLIPResNet(**TINY, heads=2, embed_width=5),
        CLIPResNet(**TINY | {'image_size': 27}, heads=2, embed_width=5),
        BiT((2, 1), width=32, image_size=20),
        BiT((1, 2), width=32, preact=False, image_size=21),
    ],
    ids=lambda model: f'{type(model).__name__}-{model.image_size}',
)
def test_activation_shapes_are_what_methods_see(model):
    seen = []

    class Spy(Places):
        def layer(self, prompts, block, x, i, ctx):
            assert ctx.start == i and ctx.model.depth == model.depth
            seen.append(x.shape[1:])
            return block(x)

        def readout(self, prompts, x, pool, ctx):
            seen.append(x.shape[1:])
            return pool(x)

    images = jnp.zeros((2, model.image_size, model.image_size, 3))
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, Spy()))[0]
    assert out.shape == (2, model.feature_width)
    assert seen == [model.activation_shape(i) for i in range(model.depth + 1)]


def test_clip_sizes():
    # The image tower of CLIP's RN50; arXiv 2103.00020 publishes the sizes of the towers' parts.
    model = CLIPResNet(**clip_resnet.VARIANTS['RN50'])
    assert trained(model) == 38_316_896 and model.feature_width == 1024
    assert shapes(model)['pos_embedding'].shape == (1, 50, 2048)
    with pytest.raises(UsageError, match='at least 31 pixels'):
        model.grids(30, 30)
    assert model.grids(31, 31)[-1] == (1, 1)


def test_clip_positions_follow_the_image():
    model = CLIPResNet(**TINY, heads=2, embed_width=5)
    params = drawn(model)
    assert params['pos_embedding'].shape == (1, 5, 16)
    images = np.random.default_rng(0).normal(size=(1, 28, 36, 3)).astype(np.float32)
    large = features(model, params, images)
    assert large.shape == (1, 5) and np.isfinite(large).all()
    # The mean's own position is not part of the grid: a constant on all positions moves every token alike.
    shifted = {**params, 'pos_embedding': np.full((1, 5, 16), 0.3, np.float32)}
    wide = model.clone(image_size=28)
    same = {**params, 'pos_embedding': np.full((1, 10, 16), 0.3, np.float32)}
    square = images[:, :, :28]
    np.testing.assert_allclose(features(model, shifted, square), features(wide, same, square), atol=1e-5)


def test_torch_padding_is_symmetric():
    image = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    torch, same = (Conv(1, 3, 2, same=same).apply({'params': {'kernel': kernel}}, image)[0, 0, 0, 0]
                   for same in (False, True))  # fmt: skip
    assert (float(torch), float(same)) == (4.0, 0.0)  # the first pixel is under the kernel's middle, or its corner


def test_max_pool_paddings():
    x = -jnp.arange(1.0, 17).reshape(1, 4, 4, 1)
    tops = {padding: float(max_pool(x, padding)[0, 0, 0, 0]) for padding in ('inf', 'zero', 'same')}
    assert tops == {'inf': -1.0, 'zero': 0.0, 'same': -1.0}
    assert float(max_pool(x, 'inf')[0, 1, 1, 0]) == -6.0 and float(max_pool(x, 'same')[0, 1, 1, 0]) == -11.0


def test_settings_from_files_are_lists():
    model = ResNet(**TINY | {'depths': [2, 1], 'inner': [6, 8]})
    assert model == ResNet(**TINY) and hash(model) == hash(ResNet(**TINY))
    with pytest.raises(UsageError, match='same stages'):
        ResNet(**TINY | {'inner': (6, 8, 9)})


NORM = {'scale': jnp.array([1.0, 2.0]), 'bias': jnp.array([0.0, -1.0]), 'mean': jnp.array([1.0, 3.0]),
        'var': jnp.array([4.0, 0.25])}  # fmt: skip
MAPS = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 3, 5, 2)).astype(np.float32)
FRESH = {'kept': jnp.ones(()), 'added': {'norm': {'mean': jnp.zeros(2), 'var': jnp.zeros(2)}}}


def _normalised(x, mean, var):
    return (x - mean) / np.sqrt(np.array(var) + 1e-5) * [1, 2] + [0, -1]


def _tracked(state, train, weight=None):
    """The norm's output where it is tracked, and the new state."""
    ctx = Context(state=state, train=train, weight=weight)
    batch_statistics.track(ctx, momentum=0.1)
    ctx.statistics[''] = ctx.statistics.pop('norm')  # the path of a module that is run by itself
    return np.asarray(BatchNorm().apply({'params': NORM}, MAPS, ctx)), ctx.updates


def test_batch_norm_on_stored_statistics():
    out = BatchNorm().apply({'params': NORM}, MAPS)
    np.testing.assert_allclose(out, _normalised(MAPS, [1, 3], [4, 0.25]), atol=1e-5)
    np.testing.assert_allclose(_tracked(FRESH, train=False)[0], out, atol=1e-6)


def test_batch_norm_on_the_batch():
    out, updates = _tracked(FRESH, train=True)
    mean, var = MAPS.mean((0, 1, 2)), MAPS.var((0, 1, 2))
    np.testing.assert_allclose(out, _normalised(MAPS, mean, var), atol=1e-5)
    added = updates['added']['norm']
    np.testing.assert_allclose(added['mean'], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(added['var'], 0.1 * MAPS.var((0, 1, 2), ddof=1), rtol=1e-5)
    assert float(updates['kept']) == np.float32(0.9)
    assert jax.tree.structure(updates) == jax.tree.structure(FRESH)


def test_batch_norm_on_running_statistics():
    added = {'norm': {'mean': jnp.array([0.5, 1.0]), 'var': jnp.array([1.0, 2.0])}}
    out, updates = _tracked({'kept': jnp.array(0.75), 'added': added}, train=False)
    np.testing.assert_allclose(out, _normalised(MAPS, [1.25, 3.25], [4.0, 2.1875]), atol=1e-5)
    assert not updates


def test_padding_examples_do_not_count():
    out, updates = _tracked(FRESH, train=True, weight=jnp.array([1.0, 1.0, 0.0, 1.0]))
    kept = MAPS[[0, 1, 3]]
    np.testing.assert_allclose(out[[0, 1, 3]], _normalised(kept, kept.mean((0, 1, 2)), kept.var((0, 1, 2))), atol=1e-5)
    np.testing.assert_allclose(updates['added']['norm']['var'], 0.1 * kept.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_a_network_uses_what_is_tracked():
    model = ResNet(**TINY | {'depths': (1, 1)})
    params = drawn(model)
    names = batch_statistics.names(model)
    assert names['bn1'] == 8 and names['layer2_0/bn_proj'] == 16 and len(names) == 9
    state = batch_statistics.initial(model, names)

    def run(params, images):
        ctx = Context(state=state, train=True)
        batch_statistics.track(ctx)
        return model.apply({'params': params}, images, ctx=ctx), ctx.updates

    images = np.random.default_rng(1).normal(size=(3, 20, 20, 3)).astype(np.float32)
    run = jax.jit(run, **QUICK)
    out, updates = run(params, images)
    assert jax.tree.structure(updates) == jax.tree.structure(state)
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(updates))
    # Statistics of the batch take out what the images are multiplied with; stored ones do not.
    np.testing.assert_allclose(run(params, 100 * images)[0], out, atol=1e-3)
    assert np.abs(features(model, params, 100 * images) - features(model, params, images)).max() > 1
