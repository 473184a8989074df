"""BiT and the stems of hybrid ViTs: published sizes, standardised weights, what padding changes."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.networks import drawn, features, shapes
from vpt_jax.errors import UsageError
from vpt_jax.models.bit import VARIANTS, BiT, HybridStem
from vpt_jax.models.vit import VARIANTS as VITS
from vpt_jax.models.vit import ViT

TINY = {'depths': (1, 1), 'width': 32, 'image_size': 16}
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def _mib(model, classes=21_843):
    """Size of a file with a head of ImageNet-21k's classes, in MiB."""
    count = sum(leaf.size for leaf in shapes(model).values()) + classes * (model.feature_width + 1)
    return round(4 * count / 2**20)


@pytest.mark.parametrize(('name', 'mib'), [('R50x1', 260), ('R50x3', 1318), ('R101x1', 333), ('R152x4', 4224)])
def test_published_sizes(name, mib):
    assert _mib(BiT(**VARIANTS[name])) == mib


@pytest.mark.parametrize(
    ('name', 'patch', 'mib', 'tokens'),
    [('R+Ti', 32, 40, 50), ('R26+S', 32, 170, 50), ('R50+L', 32, 1337, 50), ('R50+B', 16, None, 197)],
)
def test_published_hybrids(name, patch, mib, tokens):
    model = ViT(**VITS[name], patch_size=patch)
    assert model.activation_shape(0) == (tokens, model.width)
    assert mib is None or _mib(model) == mib


@pytest.mark.parametrize('preact', [True, False])
def test_weights_are_standardised(preact):
    model = BiT(**TINY, preact=preact)
    params = drawn(model)
    expected = features(model, params, IMAGES)
    changed = flatten_dict(params, sep='/')
    for name in ('conv_root/kernel', 'block1_unit1/conv2/kernel', 'block2_unit1/conv_proj/kernel'):
        changed[name] = 3 * changed[name] + 0.5
    changed = unflatten_dict(changed, sep='/')
    np.testing.assert_allclose(features(model, changed, IMAGES), expected, atol=1e-4)


def test_pool_padding_matters_in_v2():
    model = BiT(**TINY)
    params = drawn(model)
    zero, inf = (features(model.clone(pool_padding=padding), params, IMAGES) for padding in ('zero', 'inf'))
    assert np.abs(zero - inf).max() > 1e-3
    with pytest.raises(UsageError, match="unknown padding of the max-pooling 'zeros': did you mean 'zero'"):
        BiT(**TINY, pool_padding='zeros')


def test_forms_have_their_own_norms():
    v1, v2 = (set(shapes(BiT(**TINY, preact=preact))) for preact in (False, True))
    assert v1 - v2 == {f'{n}/{leaf}' for n in ('gn_root', 'block1_unit1/gn_proj', 'block2_unit1/gn_proj')
                       for leaf in ('scale', 'bias')}  # fmt: skip
    assert v2 - v1 == {'norm_pre_head/scale', 'norm_pre_head/bias'}


def test_a_hybrid_is_a_vit_on_the_maps_of_its_stem():
    settings = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'heads': 2, 'image_size': 16}
    model = ViT(**settings, patch_size=8, stem_depths=[1], stem_width=32)
    params = drawn(model)
    assert params['embedding']['kernel'].shape == (2, 2, 128, 8) and model.stem_depths == (1,)
    maps = features(HybridStem((1,), 32), params['stem'], IMAGES)
    assert maps.shape == (2, 4, 4, 128)
    plain = ViT(**settings | {'image_size': 4}, patch_size=2)
    expected = features(plain, {k: v for k, v in params.items() if k != 'stem'}, maps)
    np.testing.assert_allclose(features(model, params, IMAGES), expected, atol=1e-5)


def test_grids_of_hybrids():
    model = ViT(width=8, depth=1, mlp_dim=12, heads=2, patch_size=16, stem_depths=(3, 4, 9))
    assert model.grid(224) == (14, 14) and model.grid(40, 31) == (3, 2)  # SAME padding rounds up
    with pytest.raises(UsageError, match='patches of 12 pixels cannot be cut from maps of a hybrid'):
        model.clone(patch_size=12, stem_depths=(1, 1))
