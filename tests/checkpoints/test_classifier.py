"""The classifier that weights came with: left out, or kept behind the features."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.networks import drawn, features
from vpt_jax.checkpoints.classifier import with_classifier
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models.bit import BiT
from vpt_jax.models.clip_resnet import CLIPResNet
from vpt_jax.models.convnext import ConvNeXt
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import ViT
from vpt_jax.models.zoo import load_backbone

VIT = ViT(width=16, depth=1, mlp_dim=32, heads=2, patch_size=8, image_size=16)
RNG = np.random.default_rng(0)
HEAD = {'head/kernel': RNG.normal(size=(16, 5)).astype(np.float32), 'head/bias': RNG.normal(size=5).astype(np.float32)}


def write(path, head):
    np.savez(path, **flatten_dict(drawn(VIT), sep='/'), **head)
    return path


def test_the_scores_of_the_files_own_head_are_the_features(tmp_path):
    path = write(tmp_path / 'vit.npz', HEAD)
    plain, kept = load_backbone(path, heads=2), load_backbone(path, heads=2, own_classifier=True)
    assert (plain.model.classes, plain.model.feature_width) == (0, 16)
    assert (kept.model.classes, kept.model.feature_width) == (5, 5)
    assert kept.describe()['settings']['classes'] == 5 and kept.num_params == plain.num_params + 17 * 5
    images = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
    expected = features(plain.model, plain.params, images) @ HEAD['head/kernel'] + HEAD['head/bias']
    np.testing.assert_allclose(features(kept.model, kept.params, images), expected, atol=1e-5)
    # A prompt file has the setting, with which the same network comes back.
    again = load_backbone(path, heads=2, classes=5)
    assert again.model == kept.model
    with pytest.raises(UsageError, match=r"'classifier/bias' has shape \[5\] where the model has \[7\]"):
        load_backbone(path, heads=2, classes=7)


def test_files_without_one(tmp_path):
    path = write(tmp_path / 'vit.npz', {})
    with pytest.raises(UsageError, match=r'has no classifier that is one linear layer$'):
        load_backbone(path, heads=2, own_classifier=True)
    with pytest.raises(UsageError, match='is untrained and came with no classifier: give its number of classes='):
        load_backbone('random:mu/8@16', own_classifier=True)
    assert load_backbone('random:mu/8@16', classes=4).model.feature_width == 4


@pytest.mark.parametrize(('name', 'stored', 'ours'), [
    ('head.weight', (5, 16), lambda x: x.T),
    ('head.fc.weight', (5, 16, 1, 1), lambda x: x[:, :, 0, 0].T),
    ('resnet/head/conv2d/kernel', (1, 1, 16, 5), lambda x: x[0, 0]),
    ('classifier/kernel', (16, 5), lambda x: x),
])  # fmt: skip
def test_layouts(name, stored, ours):
    bias = name.replace('weight', 'bias').replace('kernel', 'bias')
    source = ArraySource({name: RNG.normal(size=stored), bias: np.zeros(5)})
    plan = with_classifier(source, Ported('vit', {}, {}, dict.fromkeys((name, bias), 'task head')))
    weight = plan.weights['classifier/kernel']
    assert weight.shape == (16, 5) and plan.settings == {'classes': 5} and plan.ignored == {}
    np.testing.assert_array_equal(weight.layout(source.read(name)), ours(source.read(name)))


def test_two_heads_are_not_one_classifier():
    names = ('head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias')
    source = ArraySource({name: np.zeros((5, 16)) for name in names})
    with pytest.raises(UsageError, match=r'one linear layer: it holds head\.bias, head\.weight, head_dist\.bias'):
        with_classifier(source, Ported('vit', {}, {}, dict.fromkeys(names, 'task head')))


@pytest.mark.parametrize('model', [
    VIT, ResNet(depths=(1,), inner=(4,), outer=(8,), stem_width=8, image_size=16, bottleneck=False),
    BiT(depths=(1,), width=32, image_size=16), ConvNeXt(depths=(1,), dims=(8,), image_size=16),
    Swin(embed_dim=8, depths=(1,), heads=(2,), windows=(2,), image_size=16),
    CLIPResNet(depths=(1,), inner=(8,), outer=(16,), stem_width=8, heads=2, embed_width=8, image_size=16),
], ids=lambda model: type(model).__name__)  # fmt: skip
def test_every_network_takes_a_classifier(model):
    with_scores = model.clone(classes=3)
    params = drawn(with_scores)
    assert set(params) - set(drawn(model)) == {'classifier'} and with_scores.feature_width == 3
    images = RNG.normal(size=(1, 16, 16, 3)).astype(np.float32)
    expected = features(model, params, images) @ params['classifier']['kernel'] + params['classifier']['bias']
    np.testing.assert_allclose(features(with_scores, params, images), expected, atol=1e-4)
