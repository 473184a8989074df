import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.checkpoints import google_npz
from vpt_jax.errors import UsageError
from vpt_jax.models import vit, zoo

FILE = pathlib.Path(__file__).parent.parent / 'checkpoints' / 'fixtures' / 'augreg_vit_a.ckpt.npz'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path))
    return tmp_path


def features(backbone, images):
    return jax.jit(backbone.model.apply)({'params': backbone.params}, images)


def test_table():
    table = zoo.backbones()
    assert len(table) == 1 + 2 * 5 + 6
    row = table['vit_b16_in21k']
    assert row.url == 'https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz'
    assert (row.activation, row.pixels) == ('gelu', zoo.IMAGENET)
    assert table['vit_b16_in21k_tanh'].file == row.file
    assert (table['vit_b16_in21k_tanh'].activation, table['vit_b16_in21k_tanh'].pixels) == ('gelu_tanh', zoo.HALF)
    file = 'S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz'
    assert table['vit_s16_augreg_in21k'].url == f'https://storage.googleapis.com/vit_models/augreg/{file}'


def test_absent_weights_say_what_to_fetch(cache):
    with pytest.raises(UsageError) as caught:
        zoo.load_backbone('vit_b16_in21k')
    assert f'download {zoo.backbones()["vit_b16_in21k"].url} to {cache / "ViT-B_16.npz"}' in str(caught.value)


def test_cached_file_of_another_size_is_refused(cache):
    shutil.copy(FILE, cache / 'ViT-B_16.npz')
    with pytest.raises(UsageError, match='is not vit_b16_in21k: its width is 32, expected 768'):
        zoo.load_backbone('vit_b16_in21k')


def test_cached_file_is_read_by_its_entry(cache, monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, 'Ti', {'width': 32, 'depth': 3, 'mlp_dim': 80, 'heads': 4})
    monkeypatch.setattr(zoo, '_AUGREG', {('Ti', 8): 'x'})
    shutil.copy(FILE, cache / zoo.backbones()['vit_ti8_augreg_in21k'].file)
    backbone = zoo.load_backbone('vit_ti8_augreg_in21k')
    assert (backbone.name, backbone.pixels) == ('vit_ti8_augreg_in21k', zoo.HALF)
    assert backbone.model.activation == 'gelu_tanh'


def test_path(tmp_path):
    backbone = zoo.load_backbone(FILE)
    assert backbone.name == FILE.name and backbone.pixels == zoo.IMAGENET and backbone.model.activation == 'gelu'
    assert backbone.model.image_size == 32 and backbone.model.pre_logits == 0
    assert backbone.sha256 == hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert backbone.num_params == sum(a.size for a in jax.tree.leaves(google_npz.read(FILE)))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(backbone.params))
    assert zoo.load_backbone(str(FILE), pixels=zoo.HALF).pixels == zoo.HALF
    google_npz.write(tmp_path / 'half.npz', backbone.params, 'bfloat16')
    half = zoo.load_backbone(tmp_path / 'half.npz')
    assert half.params['cls'].dtype == jnp.float32 and half.sha256 != backbone.sha256


def test_describe_is_json():
    described = json.loads(json.dumps(zoo.load_backbone(FILE, dtype='bfloat16').describe()))
    assert described['settings']['dtype'] == 'bfloat16' and described['settings']['width'] == 32
    assert vit.ViT(**described['settings']).depth == 3


def test_image_size_and_dtype():
    backbone = zoo.load_backbone(FILE, image_size=40, dtype='bfloat16')
    assert backbone.params['pos_embedding'].shape == (1, 26, 32)
    out = jax.eval_shape(lambda images: features(backbone, images), jnp.zeros((2, 40, 40, 3), jnp.bfloat16))
    assert out.shape == (2, 32) and out.dtype == jnp.bfloat16
    with pytest.raises(UsageError, match='45 pixels does not fit patches of 8 pixels: use 40 or 48'):
        zoo.load_backbone(FILE, image_size=45)
    with pytest.raises(UsageError, match='image_size must be'):
        zoo.load_backbone(FILE, image_size=0)
    for dtype in ('float23', 'int8'):
        with pytest.raises(UsageError, match='dtype must be a floating-point type'):
            zoo.load_backbone(FILE, dtype=dtype)


def test_scan_gives_the_same_features():
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    loop = zoo.load_backbone(FILE)
    scan = zoo.load_backbone(FILE, scan=True)
    np.testing.assert_allclose(features(scan, images), features(loop, images), atol=1e-5)
    assert loop.with_scan().model == scan.model and loop.with_scan(False) is loop
    jax.tree.map(np.testing.assert_array_equal, loop.with_scan().params, scan.params)
    jax.tree.map(np.testing.assert_array_equal, scan.with_scan(False).params, loop.params)
    assert scan.num_params == loop.num_params


def test_random():
    backbone = zoo.load_backbone('random:Ti/16@32', depth=2)
    assert backbone.sha256 == 'random:Ti/16@32:seed0:depth=2' and backbone.model.depth == 2
    again = zoo.load_backbone('random:Ti/16', image_size=32, depth=2, scan=True).with_scan(False)
    assert again.sha256 == backbone.sha256
    jax.tree.map(np.testing.assert_array_equal, again.params, backbone.params)


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    ('vit_b16_in21', {}, "unknown backbone 'vit_b16_in21': did you mean 'vit_b16_in21k'"),
    ('random:B', {}, "written 'random:B/16'"),
    ('random:XL/16', {}, "unknown ViT variant 'XL'"),
    ('random:B/0', {}, 'patches of 0 pixels'),
    ('random:Ti/16@32', {'image_size': 64}, 'disagree'),
    ('random:Ti/16@32', {'activaton': 'gelu'}, "unknown backbone setting 'activaton': did you mean 'activation'"),
    ('random:Ti/16@32', {'activation': 'relu'}, "unknown activation 'relu'"),
    ('mae.pth', {}, 'from .npz files, not .pth files'),
    ('model.SAFETENSORS', {}, 'not .safetensors files'),
    ('nowhere/vit.npz', {}, 'no file nowhere/vit.npz'),
    (FILE, {'depth': 2}, "holds 'Transformer/encoderblock_2/"),
    (FILE, {'pre_logits': 5}, r"'pre_logits/(bias|kernel)' has shape"),
    (FILE, {'posemb': 'none'}, "holds 'pos_embedding' that the model has no place for"),
])  # fmt: skip
def test_mistakes(name, kwargs, message):
    with pytest.raises(UsageError, match=message):
        zoo.load_backbone(name, **kwargs)


def test_embedded_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, '_ASSETS', tmp_path)
    with pytest.raises(UsageError, match='should be in the package'):
        zoo.load_backbone()
    google_npz.write(tmp_path / 'tiny_vit64.npz', google_npz.read(FILE), 'bfloat16')
    backbone = zoo.load_backbone()
    assert (backbone.model.image_size, backbone.model.depth, backbone.model.activation) == (32, 3, 'gelu_tanh')
    assert backbone.name == 'tiny_vit64' and backbone.pixels == zoo.HALF
