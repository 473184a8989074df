"""ViT files of PyTorch's world: whose they are, what names and shapes tell, what is left out, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.schemes import SCHEMES, clip_text, timm_vit
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models.loading import build

CASES = Path(__file__).parents[1] / 'parity' / 'cases'
#: A text tower beside an image tower is read when it is asked for by name.
IMAGE = [module for module in SCHEMES if module is not clip_text]
#: Cases of the dialects by the scheme that reads them.
OWN = {
    'timm_vit': ('timm_deit_dist_c', 'dino_official_a', 'dinov2_official_reg_b', 'mae_vit_a', 'mocov3_vit_a',
                 'made_timm_siglip', 'made_timm_clip', 'made_timm_fc_norm', 'made_timm_swiglu', 'made_dinov2_swiglu'),
    'torchvision_vit': ('torchvision_vit_a',),
    'hf_vit': ('hf_flax_vit_a', 'made_hf_vit_modules'),
    'hf_dinov2': ('hf_dinov2reg_a', 'made_hf_dinov2_swiglu', 'made_hf_dinov2_modules'),
    'siglip': ('hf_siglip_a',),
    'clip': ('openai_clip_vit_a', 'made_hf_clip_tower'),
}  # fmt: skip


def arrays(case):
    """The backbone of a case by the file's names."""
    with np.load(CASES / f'{case}.npz') as file:
        return {n.removeprefix('backbone/'): file[n] for n in file.files if n.startswith('backbone/')}


def port(held, config=None, **hints):
    return scheme.port(ArraySource(held, 'file.pth', config=config), hints=hints)[1]


def timm(width=8, depth=1, grid=2, patch=2, prefix=1, mlp=12):
    """A ViT in timm's names; its arrays are views of one number, so any width is cheap."""
    shapes = {'cls_token': (1, 1, width), 'pos_embed': (1, prefix + grid**2, width),
              'patch_embed.proj.weight': (width, 3, patch, patch), 'patch_embed.proj.bias': (width,)}  # fmt: skip
    for i in range(depth):
        for name, rows, columns in (('attn.qkv', 3 * width, width), ('attn.proj', width, width),
                                    ('mlp.fc1', mlp, width), ('mlp.fc2', width, mlp)):  # fmt: skip
            shapes |= {f'blocks.{i}.{name}.weight': (rows, columns), f'blocks.{i}.{name}.bias': (rows,)}
        for name in ('norm1', 'norm2'):
            shapes |= {f'blocks.{i}.{name}.weight': (width,), f'blocks.{i}.{name}.bias': (width,)}
    shapes |= {'norm.weight': (width,), 'norm.bias': (width,)}
    return {name: np.broadcast_to(np.float32(0.5), shape) for name, shape in shapes.items()}


def without(held, *names):
    return {name: array for name, array in held.items() if name not in names}


@pytest.mark.parametrize('path', sorted(CASES.glob('*.json')), ids=lambda path: path.stem)
def test_every_case_is_claimed_by_one_scheme(path):
    names = [n.removeprefix('backbone/') for n in json.loads(path.read_text()).get('arrays', ())
             if n.startswith('backbone/')]  # fmt: skip
    claimed = []
    for prefix in scheme._CONTAINERS:
        for tower in ('', 'img/'):
            inside = [n.removeprefix(prefix + tower) for n in names if n.startswith(prefix + tower)]
            claimed += [module.NAME for module in IMAGE if inside and module.claims(inside)]
    # VPT's own wrapper of a network, and BEiT's tokenizer, are not what files hold.
    none = not names or any(name.startswith(('enc.', 'encoder.cls_token')) for name in names)
    assert len(claimed) == (0 if none else 1)


@pytest.mark.parametrize(('name', 'case'), [(name, case) for name, cases in OWN.items() for case in cases])
def test_every_dialect_is_recognised(name, case):
    module, _, prefix = scheme._recognised(ArraySource(arrays(case), case), None, None)
    assert name == module.NAME and prefix == ('module.base_encoder.' if case.startswith('moco') else '')


@pytest.mark.parametrize(
    ('case', 'hints', 'expected'),
    [
        ('timm_deit_dist_c', {}, {'activation': 'gelu', 'ln_eps': 1e-6, 'posemb_rule': 'cubic_antialias', 'pool': 'tok',
                                  'dist_token': True, 'posemb_prefix': 2}),
        ('mae_vit_a', {}, {'posemb_rule': 'cubic', 'pool': 'tok', 'fc_norm': False, 'final_norm': True}),
        ('dinov2_official_reg_b', {}, {'posemb_rule': 'cubic_antialias', 'registers': 4, 'layer_scale': True}),
        ('made_dinov2_swiglu', {}, {'activation': 'swiglu', 'registers': 2, 'posemb_prefix': 0, 'mlp_dim': 20}),
        ('made_timm_clip', {}, {'activation': 'quick_gelu', 'ln_eps': 1e-5, 'pre_norm': True}),
        ('made_timm_siglip', {}, {'activation': 'gelu_tanh', 'ln_eps': 1e-6, 'pool': 'map', 'cls_token': False}),
        ('made_timm_fc_norm', {}, {'pool': 'gap', 'fc_norm': True, 'final_norm': False}),
        ('torchvision_vit_a', {}, {'activation': 'gelu', 'ln_eps': 1e-6}),
        ('hf_flax_vit_a', {}, {'activation': 'gelu', 'ln_eps': 1e-12, 'posemb_rule': 'cubic'}),
        ('made_hf_dinov2_modules', {}, {'activation': 'swiglu', 'posemb_rule': 'cubic', 'pool': 'tok_gap'}),
        ('hf_dinov2reg_a', {}, {'posemb_rule': 'cubic_antialias', 'pool': 'tok_gap', 'registers': 4}),
        ('hf_siglip_a', {}, {'activation': 'gelu_tanh', 'ln_eps': 1e-6, 'pool': 'map', 'posemb_prefix': 0}),
        ('openai_clip_vit_a', {}, {'activation': 'quick_gelu', 'ln_eps': 1e-5, 'pre_norm': True, 'patch_bias': False,
                                   'projection': 20}),
        ('openai_clip_vit_a', {'projection': 0}, {'projection': 0}),
    ],
)  # fmt: skip
def test_conventions_of_the_families(case, hints, expected):
    ported = port(arrays(case), heads=2, **hints)
    assert ported.family == 'vit' and ported.settings['heads'] == 2
    assert {name: ported.settings[name] for name in expected} == expected
    pixels = {'made_timm_clip': 'clip', 'openai_clip_vit_a': 'clip', 'made_timm_siglip': 'half', 'hf_siglip_a': 'half',
              'hf_flax_vit_a': 'half'}  # fmt: skip
    assert ported.pixels == pixels.get(case, 'imagenet')


@pytest.mark.parametrize(('width', 'heads'), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (1536, 24)])
def test_heads_are_64_wide_except_in_larger_networks(width, heads):
    assert port(timm(width, mlp=16)).settings['heads'] == heads


def test_moco_has_12_heads_and_its_table_tells():
    held = timm(384, grid=3)
    for first, heads, rule in (('row', 12, 'cubic_antialias'), ('column', 6, 'cubic')):
        table = {'pos_embed': timm_vit.sincos(3, 384, first).astype(np.float16)}
        settings = port(held | table).settings
        assert (settings['heads'], settings['posemb_rule']) == (heads, rule)
        assert port(held | table, heads=4).settings['heads'] == 4


def test_heads_that_nobody_tells_are_asked_for():
    with pytest.raises(UsageError, match='does not tell how many heads its width of 40 is for: give it with heads='):
        port(timm(40))
    assert port(timm(40), config={'num_attention_heads': 5}).settings['heads'] == 5
    with pytest.raises(UsageError, match='3 heads do not divide its width of 40'):
        port(timm(40), heads=3)


def test_config_json_decides_where_there_is_one():
    held, config = arrays('hf_siglip_a'), {'num_attention_heads': 8, 'hidden_act': 'gelu', 'layer_norm_eps': 1e-5}
    settings = port(held, {'vision_config': {**config, 'image_size': 35}}).settings
    assert settings['heads'] == 8 and settings['activation'] == 'gelu' and settings['ln_eps'] == 1e-5
    assert settings['image_size'] == 35  # 4 patches of 8 pixels, and a remainder
    assert port(held, {**config, 'image_size': 224}).settings['image_size'] == 32  # not what these positions are for
    with pytest.raises(UsageError, match=r"unknown hidden_act of file.pth 'mish'"):
        port(held, {**config, 'hidden_act': 'mish'})


def test_queries_keys_and_values_are_split_by_heads():
    held, width, heads = timm(8), 8, 2
    rows = np.arange(3 * width * width, dtype=np.float32).reshape(3 * width, width)
    held |= {'blocks.0.attn.qkv.weight': rows, 'blocks.0.attn.qkv.bias': np.arange(24, dtype=np.float32)}
    source = ArraySource(held, 'file.pth')
    tree = flatten_dict(scheme.load(*scheme.port(source, hints={'heads': heads})), sep='/')
    attention = 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0'
    for i, part in enumerate(('query', 'key', 'value')):
        kernel = tree[f'{attention}/{part}/kernel']
        assert kernel.shape == (width, heads, 4)
        for head in range(heads):  # head h of part i has rows 8 i + 4 h and on
            np.testing.assert_array_equal(kernel[:, head].T, rows[8 * i + 4 * head :][:4])
        np.testing.assert_array_equal(tree[f'{attention}/{part}/bias'].ravel(), np.arange(8 * i, 8 * i + 8))


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('blocks.1.norm2.bias', None, "it has no 'blocks.1.norm2.bias'"),
        ('blocks.1.attn.qkv.weight', (23, 8), "'blocks.1.attn.qkv.weight' has shape .23, 8., which does not fit"),
        ('blocks.0.mlp.fc1.weight', (12, 8, 1), "'blocks.0.mlp.fc1.weight' has shape .12, 8, 1., expected 2 axes"),
        ('cls_token', (1, 7), "'cls_token' has shape .1, 7., which does not fit"),
        ('pos_embed', (1, 8, 8), 'has 8 position embeddings, which is no square grid'),
        ('patch_embed.proj.weight', (8, 3, 2, 4), 'patches of 2x4 pixels'),
        ('blocks.0.attn.q_norm.weight', (4,), "it holds 'blocks.0.attn.q_norm.weight'"),
        ('norm.weight', None, "it has no 'norm.weight'"),
    ],
)
def test_what_is_missing_misshaped_or_unknown_is_named(name, change, message):
    held = timm(depth=2)
    held = without(held, name) if change is None else held | {name: np.zeros(change, np.float32)}
    with pytest.raises(UsageError, match=f'^file.pth.*{message}'):
        port(held, heads=2)


def test_a_network_is_built_from_every_dialect():
    for cases in OWN.values():
        for case in cases:
            source = ArraySource(arrays(case), case)
            model, params = build(*scheme.port(source, hints={'heads': 2}))
            assert model.feature_width and sum(a.size for a in flatten_dict(params).values()) > 1000


def test_convolutional_stem_of_moco_is_refused():
    held = without(timm(), 'patch_embed.proj.weight', 'patch_embed.proj.bias')
    with pytest.raises(UsageError, match='is a MoCo v3 with a convolutional stem, which vpt_jax does not run'):
        port(held | {'patch_embed.proj.0.weight': np.zeros((1, 3, 3, 3), np.float32)})


@pytest.mark.parametrize('prefix', ['model.', 'state_dict.', 'module.', 'state_dict.module.', 'teacher.backbone.',
                                    'teacher.module.backbone.', 'student.module.backbone.'])  # fmt: skip
def test_prefixes_of_trainers_are_stripped(prefix):
    stored = {prefix + name: array for name, array in timm().items()} | {'optimizer.step': np.zeros(3, np.float32)}
    ported = port(stored, heads=2)
    assert ported.settings['width'] == 8 and list(ported.ignored) == ['optimizer.step']


def test_the_teacher_of_a_dino_comes_before_its_student():
    stored = {f'{who}.backbone.{name}': a for who in ('student', 'teacher') for name, a in timm().items()}
    _, part, prefix = scheme._recognised(ArraySource(stored, 'file.pth'), None, None)
    assert prefix == 'teacher.backbone.' and len(part.members) == len(timm())


def test_decoys_are_ignored_with_reasons():
    decoder = {'mask_token': 'what masked', 'decoder_pos_embed': 'what masked', 'head.weight': 'task head',
               'head.3.weight': 'projection head'}  # fmt: skip
    ported = port(timm() | {name: np.zeros((1, 1, 4), np.float32) for name in decoder}, heads=2)
    assert ported.ignored.keys() == decoder.keys()
    assert all(ported.ignored[name].startswith(reason) for name, reason in decoder.items())
    ported = port(arrays('mocov3_vit_a'), heads=4)
    others = ('module.momentum_encoder.', 'module.predictor.', 'module.base_encoder.head.')
    assert all(name.startswith(others) for name in ported.ignored) and len(ported.ignored) > 20
    assert 'module.momentum_encoder.cls_token' in ported.ignored
    ported = port(arrays('openai_clip_vit_a'), heads=4)
    assert ported.ignored['token_embedding.weight'] == 'text tower' and 'logit_scale' in ported.ignored
    assert not any(name.startswith('visual.') for name in ported.ignored)


@pytest.mark.parametrize(
    ('hints', 'norms', 'pool'),
    [
        ({}, {'Transformer/encoder_norm/scale': 'norm.weight'}, 'tok'),
        ({'fc_norm': 'norm'}, {'fc_norm/scale': 'norm.weight'}, 'gap'),
        ({'fc_norm': 'new'}, {'fc_norm/scale': None}, 'gap'),
        ({'fc_norm': 'new', 'final_norm': True},
         {'fc_norm/scale': None, 'Transformer/encoder_norm/scale': 'norm.weight'}, 'gap'),
    ],
)  # fmt: skip
def test_which_norm_mae_features_have(hints, norms, pool):
    ported = port(timm(), heads=2, **hints)
    found = {name: (w.names or (None,))[0] for name, w in ported.weights.items() if name.endswith('norm/scale')}
    assert found == norms and ported.settings['pool'] == pool
    assert set(ported.ignored) == (set() if 'norm.weight' in norms.values() else {'norm.weight', 'norm.bias'})
    if None in norms.values():
        source = ArraySource(timm(), 'file.pth')
        tree = scheme.load(source, ported)
        np.testing.assert_array_equal(tree['fc_norm']['scale'], np.ones(8))
        np.testing.assert_array_equal(tree['fc_norm']['bias'], np.zeros(8))


def test_a_norm_that_a_file_lacks_is_not_made_up():
    with pytest.raises(UsageError, match="no norm for pooled features: give fc_norm='new' for one without training"):
        port(timm(), heads=2, fc_norm=True)


def test_attention_pooling_can_be_left_out():
    for case, name in (('made_timm_siglip', 'attn_pool.latent'), ('hf_siglip_a', 'vision_model.head.probe'),
                       ('bv_vit_map_c', 'img/MAPHead_0/probe')):  # fmt: skip
        ported = port(arrays(case), heads=2, pool='gap')
        assert not any(n.startswith('MAPHead_0') for n in ported.weights)
        assert ported.ignored[name].startswith('attention pooling')


def test_naflex_is_refused():
    held = arrays('hf_siglip_a')
    linear = held['vision_model.embeddings.patch_embedding.weight'].reshape(32, -1)
    with pytest.raises(UsageError, match='is a NaFlex ViT'):
        port(held | {'vision_model.embeddings.patch_embedding.weight': linear})


def test_tables_of_mae_and_moco_are_each_others_transposed():
    mae, moco = (timm_vit.sincos(3, 16, first)[0, 1:].reshape(3, 3, 16) for first in ('column', 'row'))
    np.testing.assert_allclose(mae, moco.swapaxes(0, 1))
    np.testing.assert_allclose(mae[1, 2, :4], np.sin(2 * 10000.0 ** (-np.arange(4) / 4)))
    assert not timm_vit.sincos(3, 16, 'row')[0, 0].any()
