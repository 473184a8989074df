"""Norm tuning and LoRA: which weights, how many, and that they can be merged into the backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import drawn, shapes
from vpt_jax.errors import UsageError
from vpt_jax.methods import AP, VPT, Bias, Linear, LoRA, MLPHead, NormTune, Stack, merge
from vpt_jax.models import loading, resnet
from vpt_jax.models.bit import BiT
from vpt_jax.models.convnext import ConvNeXt
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import VARIANTS, ViT

SMALL = ResNet(depths=(1, 1), inner=(4, 8), outer=(16, 32), stem_width=8, image_size=16)


@pytest.mark.parametrize(('model', 'count'), [
    (ViT(**VARIANTS['B'], patch_size=16), 38_400), (ViT(**VARIANTS['L'], patch_size=16), 100_352),
    (ResNet(**resnet.variant(18)), 9_600), (ResNet(**resnet.variant(50)), 53_120),
])  # fmt: skip
def test_published_numbers_of_norm_parameters(model, count):
    method = NormTune()
    found = [leaf for name, leaf in loading.shapes(model).items() if method.selects(tuple(name.split('/')), model)]
    assert sum(leaf.size for leaf in found) == count


def test_norms_and_nothing_else_are_trained():
    for model, absent in (
        (SMALL, ('mean', 'var', 'kernel')),
        (BiT(depths=(1,), width=32, image_size=16), ('kernel',)),
    ):
        trained = NormTune().init(None, model, drawn(model), 2)
        names = {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in
                 jax.tree_util.tree_leaves_with_path(trained)}  # fmt: skip
        assert names and not any(name.endswith(absent) for name in names)
        assert {name.removesuffix('scale') for name in names if name.endswith('scale')} == {
            name.removesuffix('bias') for name in names if name.endswith('bias')
        }
        assert len([name for name in shapes(model) if name.endswith('scale')]) == len(names) / 2


def test_statistics_of_the_batch_are_for_batch_norms(tiny):
    with pytest.raises(UsageError, match="statistics='batch' is for BatchNorms, and this ViT has none"):
        NormTune(statistics='batch').check(tiny.model)
    with pytest.raises(UsageError, match="unknown statistics of method norm 'train'"):
        NormTune(statistics='train')
    method = NormTune(statistics='batch')
    method.check(SMALL)
    state = method.init_state(SMALL)
    assert state['kept'] == 1 and state['added']['layer2_0']['bn_proj']['mean'].shape == (32,)
    assert len(jax.tree.leaves(state['added'])) == 2 * len([n for n in shapes(SMALL) if n.endswith('scale')])
    assert NormTune().init_state(SMALL) == {}
    assert method.changes('pixels') and not NormTune().changes('pixels')


@pytest.mark.parametrize(('targets', 'layers'), [('qv', 2), ('qkv', 3)])
def test_numbers_of_lora_parameters(targets, layers):
    model = ViT(**VARIANTS['B'], patch_size=16)
    method = LoRA(rank=4, targets=targets)
    assert sum(4 * sum(sides) for sides in method.kernels(model).values()) == 12 * layers * 4 * (768 + 768)


def test_every_kernel_behind_the_first_layer():
    vit = ViT(width=16, depth=1, mlp_dim=32, heads=2, patch_size=4, image_size=16, projection=8)
    block = 'Transformer/encoderblock_0/'
    attention = block + 'MultiHeadDotProductAttention_0/'
    expected = {f'{attention}{part}': (16, 16) for part in ('query', 'key', 'value', 'out')}
    expected |= {f'{block}MlpBlock_0/Dense_0': (16, 32), f'{block}MlpBlock_0/Dense_1': (32, 16)}
    found = {'/'.join(path[:-1]): sides for path, sides in LoRA(targets='all').kernels(vit).items()}
    assert found == expected
    kernels = {'/'.join(path[:-1]): sides for path, sides in LoRA(targets='all').kernels(SMALL).items()}
    assert kernels['layer1_0/conv2'] == (9 * 4, 4) and 'conv1' not in kernels and len(kernels) == 8
    for model in (Swin(embed_dim=8, depths=(1, 1), heads=(2, 2), windows=(2, 2), image_size=16),
                  ConvNeXt(depths=(1, 1), dims=(8, 16), image_size=32)):  # fmt: skip
        prompts = jax.eval_shape(lambda m=model: LoRA(targets='all', rank=2).init(jax.random.key(0), m, None, 2))
        assert len(jax.tree.leaves(prompts)) == 2 * len(LoRA(targets='all').kernels(model))


def test_lora_starts_as_the_frozen_network_and_is_of_low_rank(tiny):
    method = LoRA(rank=2, alpha=6.0)
    prompts = jax.tree.map(np.asarray, tiny.init(method))
    same = method.weights(prompts, tiny.params)
    jax.tree.map(np.testing.assert_array_equal, same, tiny.params)
    layer = prompts['Transformer']['encoderblock_1']['MultiHeadDotProductAttention_0']['value']
    assert 0 < np.abs(layer['a']).max() <= 0.25 and layer['a'].std() > 0.1
    layer['b'] = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    changed = method.weights(prompts, tiny.params)
    kernels = [tree['Transformer']['encoderblock_1']['MultiHeadDotProductAttention_0']['value']['kernel']
               for tree in (changed, tiny.params)]  # fmt: skip
    update = (kernels[0] - kernels[1]).reshape(16, 16)
    np.testing.assert_allclose(update, 3.0 * layer['a'] @ layer['b'], atol=1e-6)
    assert np.linalg.matrix_rank(update, tol=1e-4) == 2


@pytest.mark.parametrize('scan', [False, True])
def test_merged_weights_give_the_same_scores(tiny, scan):
    model = tiny.model.clone(scan=scan)
    method = Stack(LoRA(rank=2, targets='all'), NormTune(), VPT(num_tokens=2), Linear())
    prompts = tiny.prompts(method)
    left, weights, kept = merge(model, method, model.stored(tiny.params), prompts)
    assert left == Stack(VPT(num_tokens=2), Linear()) and set(kept) == {'vpt', 'linear'}
    assert jax.tree.structure(weights) == jax.tree.structure(model.stored(tiny.params))
    unmerged = tiny.logits(method, prompts, scan=scan)
    tiny = type('Merged', (), {**vars(tiny), 'logits': type(tiny).logits, 'params': model.canonical(weights)})()
    np.testing.assert_allclose(tiny.logits(left, kept, scan=scan), unmerged, atol=2e-5)
    assert np.abs(tiny.logits(left, {**kept, 'linear': jax.tree.map(jnp.zeros_like, kept['linear'])}) - unmerged).max()


def test_what_is_more_than_weights_is_not_merged():
    method = Stack(NormTune(statistics='batch'), AP(), Bias(), MLPHead())
    params = drawn(SMALL)
    prompts = {m.name: {} for m in method.methods} | {'bias': {'bn1': {'bias': jnp.ones(8)}}}
    left, weights, _ = merge(SMALL, method, params, prompts)
    assert [m.name for m in left.methods] == ['norm', 'ap', 'mlp']
    np.testing.assert_array_equal(weights['bn1']['bias'], 1)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    _, weights, _ = merge(SMALL, Bias(), half, {'bn1': {'bias': jnp.ones(8)}})
    assert {a.dtype for a in jax.tree.leaves(weights)} == {jnp.dtype(jnp.bfloat16)}
    alone, weights, kept = merge(SMALL, Bias(), params, {'bn1': {'bias': jnp.ones(8)}})
    assert alone == Stack() and kept == {} and (weights['bn1']['bias'] == 1).all()


@pytest.mark.parametrize(('settings', 'message'), [
    ({'targets': 'qk'}, "unknown targets of LoRA 'qk'"),
    ({'rank': 0}, 'rank must be >= 1 and alpha > 0, got 0 and 8.0'),
    ({'alpha': 0.0}, 'rank must be >= 1 and alpha > 0, got 8 and 0.0'),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        LoRA(**settings)


def test_layers_of_attention_where_there_are_none():
    with pytest.raises(UsageError, match="targets='qv' are layers of attention, which ResNet does not have"):
        LoRA().check(SMALL)
    LoRA(targets='all').check(SMALL)
