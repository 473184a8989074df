"""Bad settings: a sentence that names the value, before anything runs."""

import pytest

from vpt_jax.errors import UsageError
from vpt_jax.methods import METHODS, VAPT, VPT, Bias, ClsToken, Linear, Stack, build, describe, rebuild

AT_ONCE = [
    ('vpt', {'num_tokens': 0}, 'num_tokens must be >= 1, got 0'),
    ('vpt', {'num_tokens': -1}, 'num_tokens must be >= 1, got -1'),
    ('vapt', {'num_tokens': 0}, 'method vapt: num_tokens must be >= 1, got 0'),
    ('vpt_pixels', {'num_tokens': 0}, 'method vpt_pixels: num_tokens must be >= 1, got 0'),
    ('vpt_pad', {'num_pixels': 0}, 'num_pixels must be >= 1, got 0'),
    ('vpt_below', {'num_channels': -2}, 'num_channels must be >= 1, got -2'),
    ('vpt_below', {'pixel_init': 'gauss'}, "unknown pixel initialisation 'gauss': did you mean 'gaussian'"),
    ('vpt_pad', {'pixel_init': 'uniform'}, "unknown pixel initialisation 'uniform'"),
    ('vpt', {'dropout': 1.0}, r'dropout must be in \[0, 1\), got 1.0'),
    ('vpt_add', {'dropout': -0.1}, r'dropout must be in \[0, 1\), got -0.1'),
    ('vapt', {'map_dropout': 1.0}, r'map_dropout must be in \[0, 1\), got 1.0'),
    ('vapt', {'projector_dropout': 2.0}, r'projector_dropout must be in \[0, 1\), got 2.0'),
    ('vapt', {'activation': 'rellu'}, "unknown VAPT activation 'rellu': did you mean 'relu'"),
    ('vapt', {'kernel': 0}, 'kernel must be >= 1, got 0'),
    ('vapt', {'padding': -1}, 'padding must be >= 0, got -1'),
    ('vapt', {'static_layers': 0}, 'static_layers must be >= 1, got 0'),
    ('vapt', {'depthwise': True, 'conv': False}, 'depthwise=True needs conv=True'),
    ('vapt', {'projector': False, 'learnable_scale': True}, 'need projector=True'),
    ('vpt', {'pool': 'image_pool'}, "unknown VPT pooling 'image_pool': did you mean 'img_pool'"),
    ('vpt', {'project': 0}, 'project must be >= 1 or None, got 0'),
    ('vpt', {'deep_layers': 2}, 'deep_layers=2 needs deep=True'),
    ('vpt', {'deep': True, 'drop_after': True}, 'drop_after=True needs deep_layers'),
    ('vpt', {'deep': True, 'deep_layers': 2, 'drop_after': True, 'pool': 'prompt_pool'}, 'drop_after=True drops them'),
    ('vpt', {'deep': True, 'shared': True, 'last_layers_overwriting_patches': 1}, 'excludes deep_layers and shared'),
    ('vpt_pixels', {'pixel_init': 'gausian'}, "unknown pixel initialisation 'gausian': did you mean 'gaussian'"),
    ('adapter', {'reduction': 0}, 'reduction must be >= 1, got 0'),
    ('adapter', {'adapter_init': 'one'}, "unknown adapter initialisation 'one'"),
    ('linear', {'start': 'kaimin'}, "unknown initialisation of a linear head 'kaimin': did you mean 'kaiming'"),
    ('linear', {'deviation': 0.0}, 'deviation must be a finite number > 0, got 0.0'),
    ('partial', {'blocks': 0}, 'at least 1 block, got blocks=0'),
    ('vptt', {}, "unknown method 'vptt': did you mean 'vpt'"),
    ('vpt', {'num_token': 3}, "unknown setting of method 'vpt' 'num_token': did you mean 'num_tokens'"),
    ('vpt', {'deep': 1}, 'deep must be of type bool, got 1'),
    ('vpt', {'num_tokens': True}, 'num_tokens must be of type int, got True'),
    ('vpt+bias', {'vpr': {}}, r"unknown member of the stack 'vpt\+bias' 'vpr': did you mean 'vpt'"),
]

WITH_A_BACKBONE = [
    ('vpt', {'deep': True, 'deep_layers': 4}, 'deep_layers=4, but the backbone has 3 blocks'),
    ('vpt', {'deep': True, 'last_layers_overwriting_patches': 4}, '=4, but the backbone has 3 blocks'),
    ('vapt', {'static_layers': 4}, 'static_layers=4, but the backbone has 3 blocks'),
    ('vapt', {'kernel': 5}, r'a kernel of 5 with padding 0 does not fit a grid of \(4, 4\)'),
    ('vpt_pad', {'num_pixels': 3}, r'16 \+ 2 x 3 = 22 pixels is not a multiple of the patch size 4'),
    ('adapter', {'reduction': 17}, 'reduction=17 leaves no hidden unit at width 16'),
    ('partial', {'blocks': 4}, 'blocks=4, but the backbone has 3 blocks'),
]


@pytest.mark.parametrize(('name', 'settings', 'message'), AT_ONCE)
def test_refused_at_once(name, settings, message):
    with pytest.raises(UsageError, match=message):
        build(name, **settings)


@pytest.mark.parametrize(('name', 'settings', 'message'), WITH_A_BACKBONE)
def test_refused_by_the_backbone(tiny, name, settings, message):
    with pytest.raises(UsageError, match=message):
        Stack(build(name, **settings), Linear()).check(tiny.model)


def test_cls_needs_a_cls_token(tiny):
    with pytest.raises(UsageError, match='this backbone has none'):
        ClsToken().check(tiny.model.clone(cls_token=False, pool='gap'))


@pytest.mark.parametrize('name', METHODS)
def test_every_method_is_built_and_described_by_name(name):
    method = build(name)
    assert method.name == name and rebuild(describe(method)) == method


def test_stacks_are_built_and_described():
    method = build('vpt+bias', vpt={'num_tokens': 7, 'deep': True})
    assert method == Stack(VPT(num_tokens=7, deep=True), Bias())
    assert rebuild(describe(method)) == method
    assert describe(VAPT(kernel=3))[0]['settings']['kernel'] == 3
