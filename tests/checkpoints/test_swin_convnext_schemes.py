"""Swin and ConvNeXt files: two namings each, what names and shapes tell, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError

CASES = Path(__file__).parents[1] / 'parity' / 'cases'
TABLE = 'attn.relative_position_bias_table'


def arrays(case):
    """The backbone of a case by the file's names, and the case's config."""
    with np.load(CASES / f'{case}.npz') as file:
        held = {n.removeprefix('backbone/'): file[n] for n in file.files if n.startswith('backbone/')}
    return held, json.loads((CASES / f'{case}.json').read_text())['config']


def port(held, **hints):
    return scheme.port(ArraySource(held, 'file.pth'), hints=hints)


def tree(held):
    return flatten_dict(scheme.load(*port(held)), sep='/')


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def renamed(held, *rules):
    """The arrays under names in which the first rule that applies has replaced its text."""

    def new(name):
        for old, other in rules:
            if old in name:
                return name.replace(old, other)
        return name

    return {new(name): a for name, a in held.items()}


@pytest.mark.parametrize('case', ['ms_swin_a', 'timm_swin_a'])
def test_swin_settings_come_from_names_and_shapes(case):
    held, config = arrays(case)
    head = {'head.weight': np.zeros((5, 32), np.float32)}
    _, ported = port(held | head)
    assert ported.family == 'swin' and ported.pixels == 'imagenet'
    settings = dict(ported.settings)
    microsoft = case == 'ms_swin_a'
    # timm writes no masks, so its image size is that of a last map of one window.
    assert settings.pop('image_size') == (config['img_size'] if microsoft else 2 * 2 * 4)
    assert settings.pop('pad_windows') is not microsoft
    assert settings == {
        'embed_dim': config['embed_dim'],
        'depths': tuple(config['depths']),
        'heads': tuple(config['num_heads']),
        'windows': (config['window_size'],) * 2,
        'patch_size': config['patch_size'],
        'mlp_ratio': config['mlp_ratio'],
        'activation': 'gelu',
        'ln_eps': 1e-5,
    }
    buffers = {n for n in held if n.endswith(('attn_mask', 'relative_position_index'))}
    assert set(ported.ignored) == buffers | {'head.weight'} and bool(buffers) == microsoft
    assert ported.ignored['head.weight'] == 'task head'


def test_both_namings_of_swin_are_one_network():
    held, _ = arrays('ms_swin_a')
    timm = renamed(held, ('layers.0.downsample', 'layers.1.downsample'))
    assert timm.keys() != held.keys()
    assert_same(tree(held), tree(timm))
    assert_same(tree(held), tree({f'model.{name}': a for name, a in held.items()}))


def test_fused_layers_are_split_by_rows_then_heads():
    held, _ = arrays('timm_swin_a')
    ours = tree(held)
    fused, at = held['layers.1.blocks.0.attn.qkv.weight'], 'block_2/MultiHeadDotProductAttention_0'
    x = np.random.default_rng(0).normal(size=32).astype(np.float32)
    rows = (fused @ x).reshape(3, 4, 8)
    for part, expected in zip(('query', 'key', 'value'), rows, strict=True):
        np.testing.assert_allclose(np.einsum('d,dhk->hk', x, ours[f'{at}/{part}/kernel']), expected, atol=1e-5)
    np.testing.assert_allclose(
        np.einsum('hk,hkd->d', x.reshape(4, 8), ours[f'{at}/out/kernel']),
        held['layers.1.blocks.0.attn.proj.weight'] @ x,
        atol=1e-5,
    )


def test_windows_may_shrink_with_the_maps():
    held, _ = arrays('timm_swin_a')
    small = {n: np.zeros((9, 4), np.float32) if n.startswith('layers.1') and n.endswith(TABLE) else a
             for n, a in held.items()}  # fmt: skip
    _, ported = port(small)
    assert ported.settings['windows'] == (4, 2)
    assert ported.settings['image_size'] == 2 * 2 * 2  # patch, halving, a last map of one window


@pytest.mark.parametrize('case', ['fair_convnext_a', 'timm_convnext_a'])
def test_convnext_settings_come_from_names_and_shapes(case):
    held, config = arrays(case)
    _, ported = port(held | {'head.fc.bias' if case.startswith('timm') else 'head.bias': np.zeros(5, np.float32)})
    assert ported.family == 'convnext'
    assert ported.settings == {
        'depths': tuple(config['depths']),
        'dims': tuple(config['dims']),
        'layer_scale': True,
        'activation': 'gelu',
        'ln_eps': 1e-6,
    }
    assert list(ported.ignored.values()) == ['task head']


def test_both_namings_of_convnext_are_one_network():
    held, _ = arrays('fair_convnext_a')
    timm = {}
    for name, a in held.items():
        parts = name.split('.')
        if parts[0] == 'stages':
            last = {'dwconv': 'conv_dw', 'pwconv1': 'mlp.fc1', 'pwconv2': 'mlp.fc2'}.get(parts[3], parts[3])
            parts = ['stages', parts[1], 'blocks', parts[2], last, *parts[4:]]
        elif parts[0] == 'downsample_layers':
            parts = ['stem' if parts[1] == '0' else f'stages.{parts[1]}.downsample', *parts[2:]]
        elif parts[0] == 'norm':
            parts = ['head', *parts]
        timm['.'.join(parts)] = a
    assert timm.keys() == arrays('timm_convnext_a')[0].keys()
    assert_same(tree(held), tree(timm))


def test_kernels_are_transposed():
    held, _ = arrays('fair_convnext_a')
    ours = tree(held)
    assert ours['block_0/depthwise/kernel'].shape == (7, 7, 1, 8)
    at = held['stages.0.0.dwconv.weight']
    assert ours['block_0/depthwise/kernel'][2, 5, 0, 3] == at[3, 0, 2, 5]
    assert ours['downsample_1/Conv_0/kernel'][1, 0, 7, 15] == held['downsample_layers.1.1.weight'][15, 7, 1, 0]


def test_without_gamma_there_is_no_layer_scale():
    held, _ = arrays('fair_convnext_a')
    _, ported = port({n: a for n, a in held.items() if not n.endswith('gamma')})
    assert ported.settings['layer_scale'] is False
    assert not any(name.endswith('layer_scale') for name in ported.weights)


FAIR = 'stages.0.0.'


@pytest.mark.parametrize(
    ('case', 'change', 'message'),
    [
        ('ms_swin_a', {'norm.weight': None}, "is not a Swin Transformer that vpt_jax knows: it has no 'norm.weight'"),
        ('ms_swin_a', {'absolute_pos_embed': (1, 256, 16)}, "it holds 'absolute_pos_embed'"),
        ('ms_swin_a', {f'layers.1.blocks.0.{TABLE}': (48, 4)}, 'is no square window'),
        ('ms_swin_a', {f'layers.0.blocks.0.{TABLE}': (49, 3)}, "'layers.0.blocks.0.attn.qkv.weight' has shape"),
        ('ms_swin_a', {'patch_embed.proj.weight': (16, 3, 2, 4)}, 'has patches of 2x4 pixels'),
        ('timm_swin_a', {'layers.1.downsample.norm.weight': (64, 1)}, 'expected 1 axes'),
        ('timm_swin_a', {'layers.1.blocks.0.attn.qkv.bias': None}, "it has no 'layers.1.blocks.0.attn.qkv.bias'"),
        ('fair_convnext_a', {f'{FAIR}grn.gamma': (32,), f'{FAIR}grn.beta': (32,)}, r"'stages.0.0.grn.beta' and 1 more"),
        ('fair_convnext_a', {f'{FAIR}pwconv1.weight': None}, r"it has no 'stages.0.0.pwconv1.weight'"),
        ('timm_convnext_a', {'head.norm.weight': None}, "it has no 'head.norm.weight'"),
    ],
)
def test_what_does_not_fit_is_named(case, change, message):
    held, _ = arrays(case)
    held = {n: a for n, a in held.items() if change.get(n, ()) is not None}
    held |= {n: np.zeros(shape, np.float32) for n, shape in change.items() if shape is not None}
    with pytest.raises(UsageError, match=message):
        port(held)
