"""The table of backbones: every row makes a network, of the size that its published file has."""

import dataclasses
import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

import vpt_jax
from vpt_jax.checkpoints import fetch, scheme, transfer
from vpt_jax.checkpoints.schemes import SCHEMES, timm_vit
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models import catalog, loading, zoo
from vpt_jax.models.catalog import listing
from vpt_jax.models.catalog.row import stem
from vpt_jax.models.families import FAMILIES, settings_of

ROWS = catalog.rows()
MIB = 2**20

#: Sizes of files in MiB as published or as counted from the original code, and numbers of the image towers alone.
STATED = {
    'vit_b16_in21k': 394, 'vit_l16_in21k': 1246, 'vit_h14_in21k': 2519, 'vit_ti16_augreg_in21k': 37,
    'vit_s32_augreg_in21k': 118, 'vit_s16_augreg_in21k': 115, 'vit_b32_augreg_in21k': 398,
    'vit_b16_augreg_in21k': 391, 'vit_l16_augreg_in21k': 1243, 'r_vit_ti16_augreg_in21k': 40,
    'r26_vit_s32_augreg_in21k': 170, 'r50_vit_l32_augreg_in21k': 1337, 'vit_s16_i1k_300ep': 84, 'siglip_b16_224': 775,
    'siglip_l16_384': 2489, 'siglip_so400m14_384': 3349, 'siglip2_b16_224': 1431, 'siglip2_l16_256': 3363,
    'siglip2_so400m14_384': 4334, 'bit_m_r50x1': 260, 'bit_m_r50x3': 1318, 'bit_m_r101x1': 333, 'bit_m_r152x4': 4224,
    'bit_r50x1_224_distill': 97, 'siglip_b16_224_hf': 813e6 / MIB, 'vit_b16_in21k_hf': 346e6 / MIB,
}  # fmt: skip
TOWERS = {
    'siglip_b16_224': 354 * MIB / 4, 'siglip_l16_384': 1207 * MIB / 4, 'siglip_so400m14_384': 1634 * MIB / 4,
    'mae_b16': 85_798_656, 'mae_b16_vpt': 85_798_656, 'mocov3_b16': 85_798_656, 'clip_vit_b32': 87_849_216,
    'clip_vit_b16': 86_192_640, 'clip_vit_l14': 303_966_208, 'beitv2_b16': 106_143_056, 'beitv2_l16': 336_728_512,
    # With the statistics of BatchNorm, and without the 1,000 classes that the published numbers include.
    'resnet18_tv': 11_689_512 - 513_000 + 9_600, 'resnet50_tv2': 25_557_032 - 2_049_000 + 53_120,
    'resnet101_tv': 44_549_160 - 2_049_000 + 105_344, 'vit_b32_tv': 88_224_232 - 769_000,
    'beitv2_b16_in22k': 86_530_984 - 769_000,
}  # fmt: skip


@functools.cache
def count(family, settings):
    model = FAMILIES[family](**dict(settings))
    return sum(math.prod(leaf.shape) for leaf in loading.shapes(model).values())


#: Settings that change no number of parameters, so that rows share what was counted.
IDLE = ('activation', 'ln_eps', 'posemb_rule', 'pool_padding')


def numbers(row):
    """Parameters of the row's network as the file holds it: another image size is a convention, not the file's."""
    settings = {**row.resized, **row.conventions, **row.network}
    idle = (*IDLE, 'image_size') if row.family in ('bit', 'resnet', 'convnext') else IDLE
    return count(row.family, tuple(sorted((k, v) for k, v in settings.items() if k not in idle)))


def head(row, classes):
    return classes * (FAMILIES[row.family](**row.settings).feature_width + 1)


def text_tower(width, depth, mlp, vocab):
    """SigLIP's: tokens and 64 positions, blocks, a norm, a projection."""
    block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    return (vocab + 64) * width + depth * block + 2 * width + width * width + width


def beside(name, row):
    """How many numbers the row's file holds beside the network: task heads, a layer behind features, text towers."""
    width = row.network.get('width', 0)
    if re.match('mae|mocov3|dino|tiny|vit_b16_in21k_timm', name) or re.match('siglip.*_timm', name):
        return 0
    if 'siglip' in name:
        tokens = 256_000 if name.startswith('siglip2') else 32_000
        return text_tower(width, row.network['depth'], row.network['mlp_dim'], tokens) + 2
    if re.match('clip', name):
        return head(row, 768 if width == 1024 else 512)
    if name == 'deit_b16_distilled':
        return 2 * head(row, 1000)
    if re.search('(augreg_in21k(_timm)?|bit_m_r[0-9x]+(_timm)?)$', name):
        return head(row, 21843)
    if re.search('in21k(_tanh)?$', name):
        return head(row, 21843) + width * (width + 1)
    if re.match('swin|convnext|beit', name):
        return head(row, 21841)
    behind = width * (width + 1) if re.match('vit_s16_i1k|vit_b16_in21k_hf', name) else 0
    return behind + (0 if name.endswith('_hf') else head(row, 1000))


@pytest.mark.parametrize('name', ROWS)
def test_every_row_makes_a_network_of_the_size_of_its_file(name):
    row = ROWS[name]
    assert numbers(row) > 1e6
    if row.mib is not None:
        bytes_each = 2 if name == 'tiny_vit64' else 4
        assert (numbers(row) + beside(name, row)) * bytes_each / MIB == pytest.approx(row.mib, abs=0.6)


def test_sizes_that_are_stated():
    assert {name: ROWS[name].mib for name in STATED} == pytest.approx(STATED, abs=0.6)
    assert {name: numbers(ROWS[name]) for name in TOWERS} == pytest.approx(TOWERS, abs=0.5 * MIB / 4)
    exact = {name: value for name, value in TOWERS.items() if isinstance(value, int)}
    assert {name: numbers(ROWS[name]) for name in exact} == exact


def test_rows_are_consistent():
    files: dict[str, str] = {}
    for name, row in ROWS.items():
        assert re.fullmatch(r'[a-z0-9_]+', name)
        known = settings_of(FAMILIES[row.family])
        assert {*row.network, *row.conventions, *row.resized} <= {*known}, name
        assert not row.conventions.keys() & row.resized.keys()
        both = row.network.keys() & row.conventions.keys() - {'image_size'}
        assert row.network.get('image_size', 0) % row.network.get('patch_size', 1) == 0, name
        assert {key: row.network[key] for key in both} == {key: row.conventions[key] for key in both}, name
        assert row.scheme in (None, *(module.NAME for module in SCHEMES))
        assert row.license and row.note and row.note[0].isalpha()
        assert files.setdefault(row.file, row.source) == row.source, name
        assert row.noncommercial == name.startswith(('mae', 'mocov3', 'resnext'))
        assert row.file.endswith(('.npz', '.safetensors')) or row.how == catalog.PACKAGE
        assert row.url.startswith('https://') or row.how == catalog.PACKAGE
    assert {row.how for row in ROWS.values()} == {'package', 'download', 'convert', 'by hand'}


def test_images_that_are_no_whole_patches():
    row = ROWS['siglip_so400m14_384']
    assert row.network['image_size'] == 27 * 14 and row.settings['image_size'] == 384
    model = FAMILIES['vit'](**row.settings)
    assert model.grid(384) == model.grid(378) == (27, 27)


def test_both_conventions_of_one_file():
    ours, theirs = ROWS['vit_b16_in21k'], ROWS['vit_b16_in21k_tanh']
    assert ours.url == theirs.url == 'https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz'
    assert (ours.conventions, ours.pixels) == ({'activation': 'gelu'}, zoo.IMAGENET)
    assert (theirs.conventions, theirs.pixels) == ({'activation': 'gelu_tanh'}, zoo.HALF)
    assert ROWS['mae_b16'].source == ROWS['mae_b16_vpt'].source == ROWS['mae_b16_spt'].source


def test_addresses():
    bucket = 'https://storage.googleapis.com/'
    file = 'S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz'
    assert ROWS['vit_s16_augreg_in21k'].url == f'{bucket}vit_models/augreg/{file}'
    assert ROWS['r50_vit_b16_in21k'].url == f'{bucket}vit_models/imagenet21k/R50%2BViT-B_16.npz'
    assert ROWS['siglip_so400m14_384'].url == f'{bucket}big_vision/siglip/webli_en_so400m_384_58765454.npz'
    assert ROWS['siglip_so400m16_256_i18n'].url.endswith('/siglip/webli_i18n_so400m_16_256_78061115.npz')
    assert ROWS['siglip2_g_opt16_384'].url.endswith('/siglip2/siglip2_g-opt16_384.npz')
    assert ROWS['deit3_b_384_21k'].url.endswith('/zoo/deit3/bv_deit_3_base_384_21k.npz')
    assert ROWS['flexivit_b_i21k_300ep'].url.endswith('/flexivit/flexivit_b_i21k_300ep.npz')
    assert ROWS['swin_b_in22k'].url == (
        'https://huggingface.co/timm/swin_base_patch4_window7_224.ms_in22k/resolve/main/model.safetensors'
    )
    assert ROWS['mocov3_b16'].file == 'linear-vit-b-300ep.safetensors'
    assert ROWS['mae_b16'].file == 'hf/timm/vit_base_patch16_224.mae/model.safetensors'


@pytest.mark.parametrize(('path', 'name'), [
    ('x/ViT-B_16.npz', 'vit_b16_in21k'),
    ('ViT-L_16.safetensors', 'vit_l16_in21k'),
    ('webli_en_b16_256_60500360.npz', 'siglip_b16_256'),
    ('linear-vit-s-300ep.pth.tar', 'mocov3_s16'),
    ('linear-vit-s-300ep.safetensors', 'mocov3_s16'),
    ('mae_pretrain_vit_large.safetensors', 'mae_l16'),
    ('dinov2_vitb14_reg4_pretrain.pth', 'dinov2_b14_reg'),
    ('dino_deitsmall16_pretrain.safetensors', 'dino_s16'),
    ('clones/vit_base_patch16_224.mae/model.safetensors', 'mae_b16'),
    ('clones/vit_base_patch16_224.mae', 'mae_b16'),
    ('pt_224.npz', 'paligemma_224'),
    ('pt_3b_224.bf16.npz', 'paligemma2_3b_224'),
    ('model.safetensors', None),
    ('vit.npz', None),
])  # fmt: skip
def test_rows_by_path(path, name):
    found = catalog.of_file(path)
    assert (found and found[0]) == name


@pytest.mark.parametrize(('address', 'name'), [
    ('gs://vit_models/imagenet21k/ViT-B_16.npz', 'vit_b16_in21k'),
    ('https://storage.googleapis.com/big_vision/siglip2/siglip2_b16_224.npz', 'siglip2_b16_224'),
    ('hf:timm/vit_base_patch16_224.mae', 'mae_b16'),
    ('hf:timm/vit_base_patch16_224.mae:model.safetensors', 'mae_b16'),
    ('hf:timm/vit_base_patch32_clip_224.openai', 'clip_vit_b32_timm'),
    ('hf:timm/vit_base_patch32_clip_224.openai:open_clip_model.safetensors', 'clip_vit_b32'),
    ('hf:timm/vit_base_patch16_224.mae:pytorch_model.bin', None),
    ('gs://vit_models/sam/ViT-B_16.npz', 'vit_b16_sam_in1k'),
    ('gs://vit_models/imagenet21k/ViT-Z_16.npz', None),
])  # fmt: skip
def test_rows_by_address(address, name):
    found = catalog.of_address(address)
    assert (found and found[0]) == name


def test_stems():
    assert stem('linear-vit-b-300ep.pth.tar') == 'linear-vit-b-300ep'
    assert stem('vit_base_patch16_224.mae') == 'vit_base_patch16_224.mae'
    with pytest.raises(UsageError, match='names no file'):
        fetch.url('gs://bucket/')


def timm(width, depth, patch, entries, **others):
    """A file with timm's names and a ViT's shapes, which takes no memory."""
    block = {
        'norm1.weight': (width,), 'norm1.bias': (width,), 'norm2.weight': (width,), 'norm2.bias': (width,),
        'attn.qkv.weight': (3 * width, width), 'attn.qkv.bias': (3 * width,), 'attn.proj.weight': (width, width),
        'attn.proj.bias': (width,), 'mlp.fc1.weight': (4 * width, width), 'mlp.fc1.bias': (4 * width,),
        'mlp.fc2.weight': (width, 4 * width), 'mlp.fc2.bias': (width,),
    }  # fmt: skip
    shapes = {
        'cls_token': (1, 1, width), 'pos_embed': (1, entries, width), 'norm.weight': (width,), 'norm.bias': (width,),
        'patch_embed.proj.weight': (width, 3, patch, patch), 'patch_embed.proj.bias': (width,), **others,
        **{f'blocks.{i}.{name}': shape for i in range(depth) for name, shape in block.items()},
    }  # fmt: skip
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items() if shape}


def scales(width):
    return {f'blocks.{i}.ls{j}.gamma': (width,) for i in range(12) for j in (1, 2)}


def moco(width):
    arrays = timm(width, 12, 16, 197)
    return {f'module.{k}': v for k, v in arrays.items()} | {
        'module.pos_embed': timm_vit.sincos(14, width, 'row').astype(np.float32),
        'module.head.weight': np.zeros((1000, width), np.float32),
        'module.head.bias': np.zeros(1000, np.float32),
    }


@pytest.mark.parametrize(('name', 'arrays'), [
    ('mae_b16', lambda: timm(768, 12, 16, 197)),
    ('mae_b16_vpt', lambda: timm(768, 12, 16, 197)),
    ('mae_b16_spt', lambda: timm(768, 12, 16, 197)),
    ('mae_h14', lambda: timm(1280, 32, 14, 257)),
    ('mocov3_b16', lambda: moco(768)),
    ('mocov3_s16', lambda: moco(384)),
    ('dino_s8', lambda: timm(384, 12, 8, 785)),
    ('dinov2_b14', lambda: timm(768, 12, 14, 1370, **scales(768))),
    ('dinov2_b14_reg', lambda: timm(768, 12, 14, 1369, reg_token=(1, 4, 768), **scales(768))),
    ('deit_b16_distilled', lambda: timm(768, 12, 16, 198, dist_token=(1, 1, 768))),
    ('clip_vit_b32_timm', lambda: timm(
        768, 12, 32, 50, **{'norm_pre.weight': (768,), 'norm_pre.bias': (768,), 'patch_embed.proj.bias': ()})),
])  # fmt: skip
def test_rows_know_the_names_and_shapes_of_their_files(name, arrays):
    row = ROWS[name]
    source, settings = ArraySource(arrays(), 'file'), {**row.conventions, **row.resized}
    part, ported = scheme.port(source, row.scheme, settings)
    zoo.check_row(source.path, name, row, ported)
    model = loading.network(part, ported, **settings)
    assert {key: getattr(model, key) for key in row.settings} == row.settings


def test_a_file_of_another_size_is_refused():
    _, ported = scheme.port(ArraySource(timm(384, 12, 16, 197), 'small.safetensors'))
    with pytest.raises(UsageError, match=r'small\.safetensors is not mae_b16: its width is 384, expected 768'):
        zoo.check_row('small.safetensors', 'mae_b16', ROWS['mae_b16'], ported)
    with pytest.raises(UsageError, match='is not swin_b_in22k: it holds a vit, expected a swin'):
        zoo.check_row('small.safetensors', 'swin_b_in22k', ROWS['swin_b_in22k'], ported)


DOCS = (Path(__file__).parents[2] / 'docs' / 'backbones.md').read_text()


def test_the_page_has_the_table_of_this_code():
    table = re.search(r'<!-- backbones -->\n(.*)\n<!-- /backbones -->', DOCS, re.DOTALL)[1]
    assert table == listing.markdown(ROWS), 'python -m vpt_jax.zoo --markdown writes the table of the page'
    names = set(re.findall(r'`((?:vit|mae|siglip|siglip2|mocov3)_\w+?)`', DOCS.split('<!-- backbones -->')[0]))
    assert names and names <= ROWS.keys()


def test_the_snippet_of_the_page_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r'## A big_vision checkpoint in Colab\n\n```python\n(.*?)```', DOCS, re.DOTALL)[1]
    tower = zoo.load_backbone('random:mu/16@32', pool='map', cls_token=False, posemb_prefix=0)
    arrays = {f'params/img/{k}': np.asarray(v) for k, v in traverse_util.flatten_dict(tower.params, sep='/').items()}
    asked, backbones, fit = [], [], vpt_jax.fit

    def download(url, path, verify, where):
        asked.append(url)
        path.parent.mkdir(parents=True)
        np.savez(path, **arrays, **{'params/txt/head/bias': np.zeros(3, np.float32), 'params/t': np.zeros(1)})

    def shorter(method, dataset, backbone, *, workdir, recipe):
        backbones.append(backbone)
        short = dataclasses.replace(recipe, epochs=1, warmup_epochs=0)
        return fit(method, dataset, backbone, workdir=workdir, recipe=short)

    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transfer, 'download', download)
    monkeypatch.setattr(zoo, 'check_row', lambda *args: None)  # it is another size than the published one
    monkeypatch.setattr(vpt_jax, 'fit', shorter)
    exec('\n'.join(line for line in code.splitlines() if not line.startswith('%')), {})
    assert asked == [ROWS['siglip_b16_256'].url]
    assert all(backbone.model.pool == 'map' and backbone.num_params == tower.num_params for backbone in backbones)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if re.match('linear |vapt ', line))
    assert printed.keys() == {'linear', 'vapt'} and all(0 < float(value) <= 1 for value in printed.values())


def test_listing(monkeypatch, tmp_path):
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path))
    tmp_path.joinpath('ViT-B_16.npz').touch()
    lines = listing.text({name: ROWS[name] for name in ('tiny_vit64', 'vit_b16_in21k', 'mae_b16', 'mocov3_b16')})
    assert [re.split(r' {2,}', line)[:4] for line in lines.splitlines()] == [
        ['name', 'MiB', 'weights', 'licence'],
        ['tiny_vit64', '5.4', 'in the package', 'Apache-2.0'],
        ['vit_b16_in21k', '394', 'in the cache', 'Apache-2.0'],
        ['mae_b16', '327', 'downloads', 'CC-BY-NC-4.0'],
        ['mocov3_b16', '327', 'convert', 'CC-BY-NC-4.0'],
    ]


def test_the_program_lists_what_is_asked_for():
    done = subprocess.run([sys.executable, '-m', 'vpt_jax.zoo', 'clippo'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[1:] if line.startswith('clippo')]
    assert names == [name for name in ROWS if 'clippo' in name]
    assert done.stdout.splitlines()[-1].startswith(f'{len(names)} backbones; the cache is ')
