"""Weight files of ResNets: every spelling gives the same network, and what does not fit is told."""

import re

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.networks import drawn
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models import loading
from vpt_jax.models.bit import BiT
from vpt_jax.models.clip_resnet import CLIPResNet
from vpt_jax.models.resnet import ResNet
from vpt_jax.models.vit import ViT

BOTTLENECK = ResNet(depths=(2, 1), inner=(4, 8), outer=(8, 16), stem_width=8, groups=2, image_size=16)
BASIC = ResNet(depths=(1, 2), inner=(4, 8), outer=(4, 8), stem_width=4, bottleneck=False, image_size=16)
CLIP = CLIPResNet(depths=(1, 1), inner=(8, 16), outer=(32, 64), stem_width=8, heads=1, embed_width=6, image_size=16)
V1, V2 = (BiT(depths=(2, 1), width=32, preact=preact, image_size=16) for preact in (False, True))
HYBRID = ViT(width=8, depth=1, mlp_dim=12, heads=2, patch_size=8, image_size=16, stem_depths=(1, 1), stem_width=32,
             activation='gelu_tanh')  # fmt: skip

_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


def torch_file(params, prefix=''):
    """The names and layouts of torchvision for our parameters, with the rest that such files hold."""
    file = {}
    for name, array in flatten_dict(params, sep='/').items():
        *modules, leaf = name.split('/')
        module = re.sub(r'layer(\d)_(\d)', r'layer\1.\2', '.'.join(modules))
        module = module.replace('conv_proj', 'downsample.0').replace('bn_proj', 'downsample.1')
        file[f'{prefix}{module}.{_LEAVES[leaf]}'] = array.transpose(3, 2, 0, 1) if leaf == 'kernel' else array
        if leaf == 'mean':
            file[f'{prefix}{module}.num_batches_tracked'] = np.array(7)
    return file


def clip_file(params):
    """OpenAI's names for our parameters, with a text tower; half precision as published."""
    params, width = dict(params), 64
    pool, pos = params.pop('attnpool'), params.pop('pos_embedding')
    file = torch_file(params, 'visual.')
    file['visual.attnpool.positional_embedding'] = pos[0]
    for ours, theirs in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj'), ('out', 'c_proj')):
        file[f'visual.attnpool.{theirs}.weight'] = pool[ours]['kernel'].reshape(width, -1).T
        file[f'visual.attnpool.{theirs}.bias'] = pool[ours]['bias'].reshape(-1)
    file = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in file.items()}
    return file | {
        'transformer.resblocks.0.ln_1.weight': np.ones(4, np.float32),
        'token_embedding.weight': np.ones((3, 4), np.float32),
        'positional_embedding': np.ones((3, 4), np.float32),
        'ln_final.weight': np.ones(4, np.float32),
        'text_projection': np.ones((4, 6), np.float32),
        'logit_scale': np.array(4.6, np.float32),
        'input_resolution': np.array(16),
    }


def bit_file(params, spelling):
    """Our parameters as TensorFlow, big_vision (`bit_paper` or `bit`, old norms) or timm spell them, with a head."""
    file = {}
    for index, (name, array) in enumerate(flatten_dict(params, sep='/').items()):
        *unit, module, leaf = name.split('/')
        found = re.fullmatch(r'block(\d+)_unit(\d+)', unit[0]) if unit else None
        block, j = (int(n) for n in found.groups()) if found else (0, 0)
        number = module[-1]
        if spelling.startswith('tensorflow'):
            kind = 'standardized_conv2d' if leaf == 'kernel' else 'group_norm'
            kind += f'_{index}' if spelling.endswith('numbered') else ''
            branch = {'conv_root': 'root_block/', 'norm_pre_head': '', 'conv_proj': 'a/proj/'}.get(module)
            branch = 'abc'[int(number) - 1] + '/' if branch is None else branch
            place = f'block{block}/unit{j:02d}/' if unit else ''
            leaf = {'scale': 'gamma', 'bias': 'beta'}.get(leaf, leaf)
            file[f'resnet/{place}{branch}{kind}/{leaf}'] = array
        elif spelling == 'timm':
            module = {'conv_root': 'stem.conv', 'norm_pre_head': 'norm', 'conv_proj': 'downsample.conv'}.get(
                module, module.replace('gn', 'norm')
            )
            place = f'stages.{block - 1}.blocks.{j - 1}.' if unit else ''
            file[f'{place}{module}.{_LEAVES[leaf]}'] = array.transpose(3, 2, 0, 1) if leaf == 'kernel' else array
        else:
            padded = spelling == 'bit_paper'
            place = (f'block{block}/unit{j:02d}/' if padded else f'block{block}/unit{j}/') if unit else ''
            module = {'conv_root': 'root_block/conv_root', 'norm_pre_head': 'norm-pre-head'}.get(module, module) \
                if padded else module  # fmt: skip
            stored = array.reshape(1, 1, 1, -1) if spelling != 'bit' and leaf != 'kernel' else array
            file[f'params/{place}{module}/{leaf}'] = stored
    head = {'tensorflow': 'resnet/head/conv2d/kernel', 'timm': 'head.fc.weight'}.get(
        spelling.split('-')[0], 'params/head/kernel'
    )
    return file | {head: np.ones((1, 1, 256, 3), np.float32)}


def hybrid_file(params, old=False):
    """Google's names for a hybrid's parameters."""
    attention = 'MultiHeadDotProductAttention'
    rename = {f'{attention}_0': f'{attention}_1', 'LayerNorm_1': 'LayerNorm_2', 'MlpBlock_0': 'MlpBlock_3'}
    file = {}
    for name, array in flatten_dict(params, sep='/').items():
        if name.startswith('stem/'):
            name = re.sub(r'block(\d)_unit(\d)', r'block\1/unit\2', name.removeprefix('stem/'))
            array = array.reshape(1, 1, 1, -1) if old and array.ndim == 1 else array
        name = '/'.join(rename.get(part, part) for part in name.split('/'))
        file['Transformer/posembed_input/pos_embedding' if name == 'pos_embedding' else name] = array
    return file


def build(file, **settings):
    part, ported = scheme.port(ArraySource(file, 'the file'), hints=settings)
    return ported, *loading.build(part, ported, **settings)


def same(ours, theirs, atol=0.0):
    ours, theirs = flatten_dict(ours, sep='/'), flatten_dict(theirs, sep='/')
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=atol, err_msg=name)


@pytest.mark.parametrize('model', [BOTTLENECK, BASIC], ids=['bottleneck', 'basic'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'state_dict.', 'state_dict.module.base_encoder.'])
def test_torch_resnets(model, prefix):
    params = drawn(model)
    file = torch_file(params, prefix) | {f'{prefix}fc.weight': np.ones((3, 16), np.float32)}
    ported, found, weights = build(file, image_size=16)
    assert found == model
    same(weights, params)
    assert ported.ignored[f'{prefix}fc.weight'] == 'task head'
    assert ported.ignored[f'{prefix}bn1.num_batches_tracked'] == 'counter of training steps'
    assert ported.pixels == 'imagenet'


def test_clip_resnets():
    params = drawn(CLIP)
    ported, found, weights = build(clip_file(params))
    assert found == CLIP  # the size of images too
    same(weights, params, atol=1e-3)
    assert (ported.pixels, ported.ignored['token_embedding.weight']) == ('clip', 'text tower')
    file = {n: a.astype(ml_dtypes.bfloat16) if a.dtype == np.float16 else a for n, a in clip_file(params).items()}
    same(build(file)[2], params, atol=2e-2)


@pytest.mark.parametrize(
    ('spelling', 'padding'),
    [('tensorflow', 'zero'), ('tensorflow-numbered', 'zero'), ('timm', 'zero'), ('bit_paper', 'inf')],
)
def test_bit(spelling, padding):
    params = drawn(V2)
    ported, found, weights = build(bit_file(params, spelling), image_size=16)
    assert found == V2.clone(pool_padding=padding)
    same(weights, params)
    assert ported.pixels == 'half' and list(ported.ignored.values()) == ['task head']
    assert build(bit_file(params, spelling), pool_padding='inf')[1].pool_padding == 'inf'


@pytest.mark.parametrize('spelling', ['bit', 'bit-old'])
def test_big_vision_resnets(spelling):
    params = drawn(V1)
    _, found, weights = build(bit_file(params, spelling), image_size=16)
    assert found == V1
    same(weights, params)


@pytest.mark.parametrize('old', [False, True])
def test_hybrids(old):
    params = drawn(HYBRID)
    ported, found, weights = build(hybrid_file(params, old) | {'head/kernel': np.ones((8, 3), np.float32)})
    assert found == HYBRID and ported.family == 'vit'
    same(weights, params)


def test_what_is_missing_or_left_over_is_named():
    file = torch_file(drawn(BOTTLENECK))
    lacking = {n: a for n, a in file.items() if n != 'layer1.1.bn3.running_var'}
    with pytest.raises(UsageError, match=r"not a ResNet that vpt_jax knows: it has no 'layer1\.1\.bn3\.running_var'"):
        build(lacking)
    with pytest.raises(UsageError, match=r"it holds 'layer1\.0\.se\.fc1\.weight'$"):
        build(file | {'layer1.0.se.fc1.weight': np.ones((1, 1, 1, 1), np.float32)})
    wide = {**file, 'layer2.0.conv3.weight': np.ones((16, 9, 1, 1), np.float32)}
    with pytest.raises(UsageError, match=r"'layer2_0/conv3/kernel' has shape \[1, 1, 9, 16\] where"):
        build(wide)
    without_projection = {n: a for n, a in file.items() if 'layer2.0.downsample' not in n}
    with pytest.raises(UsageError, match="lacks 'layer2_0/bn_proj/bias' and 4 more"):
        build(without_projection)


def test_bits_that_do_not_fit():
    file = bit_file(drawn(V2), 'tensorflow')
    name = 'resnet/block1/unit02/b/group_norm/gamma'
    with pytest.raises(UsageError, match=r"lacks 'block1_unit2/gn2/scale'$"):
        build({n: a for n, a in file.items() if n != name})
    with pytest.raises(UsageError, match='mean the same weights'):
        build(file | {name.replace('norm', 'norm_4'): file[name]})
    with pytest.raises(UsageError, match="it holds 'resnet/block1/unit01/d/surprise'"):
        build(file | {'resnet/block1/unit01/d/surprise': np.ones(1, np.float32)})


def test_clips_that_do_not_fit():
    file = clip_file(drawn(CLIP))
    with pytest.raises(UsageError, match=r'width 64 of .* is not divisible by 3 heads'):
        build(file, heads=3)
    assert build(file, heads=2)[1].heads == 2
    with pytest.raises(UsageError, match='has 4 positions'):
        build(file | {'visual.attnpool.positional_embedding': np.ones((4, 64), np.float32)})
