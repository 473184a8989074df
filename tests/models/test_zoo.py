import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vpt_jax.checkpoints import containers, fetch, scheme, transfer
from vpt_jax.checkpoints.schemes import big_vision
from vpt_jax.errors import UsageError
from vpt_jax.models import catalog, loading, swin, vit, zoo
from vpt_jax.models.catalog import Row

FILE = pathlib.Path(__file__).parent.parent / 'checkpoints' / 'fixtures' / 'augreg_vit_a.ckpt.npz'
SMALL = {'width': 32, 'depth': 3, 'mlp_dim': 80, 'heads': 4, 'patch_size': 8, 'image_size': 32}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('VPT_JAX_OFFLINE', '1')
    return tmp_path / 'cache'


@pytest.fixture
def small(cache, monkeypatch):
    """A catalog with the fixture's file under two conventions and under a non-commercial licence."""

    def row(**changes):
        values = {'source': 'gs://bucket/small.npz', 'family': 'vit', 'network': SMALL,
                  'conventions': {'activation': 'gelu'}, 'pixels': zoo.IMAGENET, 'license': 'Apache-2.0',
                  'note': 'a small ViT', 'mib': 0.1, **changes}  # fmt: skip
        return Row(**values)

    rows = {
        'tiny_vit64': catalog.rows()['tiny_vit64'],
        'small': row(),
        'small_tanh': row(conventions={'activation': 'gelu_tanh'}, pixels=zoo.HALF),
        'small_nc': row(license='CC-BY-NC-4.0'),
        'other': row(source='gs://bucket/other.npz', network={**SMALL, 'width': 64}),
        'small_36': row(conventions={'activation': 'gelu', 'image_size': 36}),
    }
    monkeypatch.setattr(catalog, 'rows', lambda: rows)
    monkeypatch.setattr(zoo, '_told', set())
    return cache


def put(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copy(FILE, path)


def features(backbone, images):
    return jax.jit(backbone.model.apply)({'params': backbone.params}, images)


def test_absent_weights_say_what_to_put_where(cache):
    rows = catalog.rows()
    with pytest.raises(UsageError) as caught:
        zoo.load_backbone('vit_b16_in21k')
    assert f'download {rows["vit_b16_in21k"].url} to {cache / "ViT-B_16.npz"}' in str(caught.value)
    with pytest.raises(UsageError) as caught:
        zoo.load_backbone('mae_b16')
    path = cache / 'hf' / 'timm' / 'vit_base_patch16_224.mae' / 'model.safetensors'
    assert f'download {rows["mae_b16"].url} to {path}' in str(caught.value)
    with pytest.raises(UsageError) as caught:
        zoo.load_backbone('mocov3_b16')
    command = f'python -m vpt_jax.convert linear-vit-b-300ep.pth.tar {cache / "linear-vit-b-300ep.safetensors"}'
    assert f'download {rows["mocov3_b16"].url} (its md5 starts with 8f39ce), then run {command}' in str(caught.value)
    with pytest.raises(UsageError, match=rf'accept the Gemma terms at https://.* put .* pt_224.npz at {cache}/pt_'):
        zoo.load_backbone('paligemma_224')
    assert not cache.exists()


def test_a_row_is_downloaded(small, monkeypatch, capsys):
    monkeypatch.delenv('VPT_JAX_OFFLINE')
    asked = []

    def download(url, path, verify, where):
        asked.append(url)
        put(path.parent, path.name)
        verify(path)

    monkeypatch.setattr(transfer, 'download', download)
    backbone = zoo.load_backbone('small')
    url = 'https://storage.googleapis.com/bucket/small.npz'
    assert asked == [url] and f'fetching {url} (0.1 MiB, Apache-2.0)' in capsys.readouterr().err
    assert (small / 'small.npz.sha256').read_text().strip() == backbone.sha256
    zoo.load_backbone('small')
    assert asked == [url] and not capsys.readouterr().err


def test_conventions_of_a_name(small):
    put(small, 'small.npz')
    for name, activation, pixels in (('small', 'gelu', zoo.IMAGENET), ('small_tanh', 'gelu_tanh', zoo.HALF)):
        backbone = zoo.load_backbone(name)
        assert (backbone.name, backbone.model.activation, backbone.pixels) == (name, activation, pixels)
    assert zoo.load_backbone('small', activation='quick_gelu').model.activation == 'quick_gelu'
    assert zoo.load_backbone('small', pixels=zoo.HALF).pixels == zoo.HALF
    # An address of the same file is the row, and is remembered as what was asked for.
    backbone = zoo.load_backbone('gs://bucket/small.npz')
    assert (backbone.name, backbone.model.activation) == ('gs://bucket/small.npz', 'gelu')


def test_a_file_that_changed_in_the_cache(small):
    put(small, 'small.npz')
    backbone = zoo.load_backbone('small')
    big_vision.write(small / 'small.npz', backbone.params)
    with pytest.raises(UsageError, match=r'small.npz has changed since it was first used: its sha256 is .* delete'):
        zoo.load_backbone('small')


def test_a_file_of_another_size_is_refused(small):
    path = put(small, 'other.npz')
    with pytest.raises(UsageError, match=f'{path} is not other: its width is 32, expected 64'):
        zoo.load_backbone('other')


def test_images_that_are_no_whole_patches(small):
    put(small, 'small.npz')
    backbone = zoo.load_backbone('small_36')
    assert backbone.model.image_size == 36 and backbone.params['pos_embedding'].shape == (1, 17, 32)
    assert zoo.load_backbone('small_36', image_size=36).model == backbone.model
    with pytest.raises(UsageError, match='37 pixels does not fit patches of 8 pixels: use 32 or 40'):
        zoo.load_backbone('small_36', image_size=37)
    assert zoo.load_backbone('random:small_36@36', depth=1).model.image_size == 36


def test_noncommercial_licences_are_said_once(small, capsys):
    put(small, 'small.npz')
    zoo.load_backbone('small')
    assert not capsys.readouterr().err
    zoo.load_backbone('small_nc')
    assert capsys.readouterr().err == 'warning: the weights of small_nc are under CC-BY-NC-4.0: no commercial use\n'
    zoo.load_backbone('small_nc')
    assert not capsys.readouterr().err


def test_path(tmp_path, small):
    backbone = zoo.load_backbone(FILE)
    assert (backbone.name, backbone.pixels, backbone.model.activation) == (FILE.name, zoo.HALF, 'gelu_tanh')
    assert backbone.model.image_size == 32 and backbone.model.pre_logits == 0
    assert backbone.sha256 == hashlib.sha256(FILE.read_bytes()).hexdigest()
    with containers.opened(FILE) as file:
        read = scheme.load(*scheme.port(file))
    assert backbone.num_params == sum(a.size for a in jax.tree.leaves(read))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(backbone.params))
    assert zoo.load_backbone(str(FILE), pixels=zoo.IMAGENET).pixels == zoo.IMAGENET
    # A file that is called like a published one is run like it.
    like = zoo.load_backbone(put(tmp_path, 'small.npz'))
    assert (like.name, like.pixels, like.model.activation) == ('small.npz', zoo.IMAGENET, 'gelu')
    assert not (tmp_path / 'small.npz.sha256').exists()
    assert zoo.load_backbone(FILE, scheme='big_vision').num_params == backbone.num_params
    with pytest.raises(UsageError, match="holds no 'img'"):
        zoo.load_backbone(f'{FILE}:img')


def test_address_of_an_unknown_file(cache):
    path = put(cache / 'hf' / 'o' / 'n', 'x.npz')
    backbone = zoo.load_backbone('hf:o/n:x.npz')
    assert (backbone.name, backbone.pixels) == ('hf:o/n:x.npz', zoo.HALF)
    assert fetch.pin_of(path).read_text().strip() == backbone.sha256
    with pytest.raises(UsageError, match=r'model.safetensors is not on this machine and VPT_JAX_OFFLINE is set'):
        zoo.load_backbone('hf:o/other')


def test_describe_is_json():
    described = json.loads(json.dumps(zoo.load_backbone(FILE, dtype='bfloat16').describe()))
    assert described['settings']['dtype'] == 'bfloat16' and described['settings']['width'] == 32
    assert described['family'] == 'vit' and vit.ViT(**described['settings']).depth == 3
    backbone = zoo.load_backbone('random:resnet18_tv@32', depths=[1, 1, 1, 1])
    described = backbone.describe()
    assert described == json.loads(json.dumps(described)) and described['family'] == 'resnet'
    changed = {k: v for k, v in described['settings'].items() if k in ('depths', 'image_size')}
    assert zoo.load_backbone('random:resnet18_tv', **changed).model == backbone.model


def test_image_size_and_types():
    backbone = zoo.load_backbone(FILE, image_size=40, dtype='bfloat16')
    assert backbone.params['pos_embedding'].shape == (1, 26, 32) and backbone.params['cls'].dtype == jnp.float32
    out = jax.eval_shape(lambda images: features(backbone, images), jnp.zeros((2, 40, 40, 3), jnp.bfloat16))
    assert out.shape == (2, 32) and out.dtype == jnp.bfloat16
    half = zoo.load_backbone(FILE, param_dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype('bfloat16')}
    assert half.sha256 == backbone.sha256 and half.model.dtype is None
    with pytest.raises(UsageError, match='45 pixels does not fit patches of 8 pixels: use 40 or 48'):
        zoo.load_backbone(FILE, image_size=45)
    with pytest.raises(UsageError, match='image_size must be'):
        zoo.load_backbone(FILE, image_size=0)
    for name in ('dtype', 'param_dtype'):
        for value in ('float23', 'int8'):
            with pytest.raises(UsageError, match=f'{name} must be a floating-point type'):
                zoo.load_backbone(FILE, **{name: value})


def test_another_patch_size():
    """FlexiViT's: a larger kernel answers the enlarged patch as the kernel of the file answers the patch."""
    small, large = (zoo.load_backbone(FILE, patch_size=side, image_size=4 * side) for side in (8, 16))
    assert large.params['embedding']['kernel'].shape == (16, 16, 3, 32) and large.model.image_size == 64
    patch = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    enlarged = jax.image.resize(patch, (2, 16, 16, 3), 'linear', antialias=False)
    ours, theirs = (
        backbone.model.apply({'params': backbone.params}, images, method='patches')
        for backbone, images in ((large, enlarged), (small, patch))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(UsageError, match=r"'embedding/kernel' has shape \[8, 8, 3, 32\]"):
        loading.check_names({'embedding/kernel': np.ones((8, 8, 3, 32))}, {'embedding/kernel': np.ones((4, 4, 3, 32))},
                            'x.npz')  # fmt: skip


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


@pytest.mark.parametrize(('name', 'settings', 'shape'), [
    ('resnet18_tv@32', {'depths': (1, 1, 1, 1)}, (2, 512)),
    ('swin_b_in22k@32', {'depths': (1, 1), 'heads': (4, 8), 'windows': (2, 2), 'embed_dim': 32}, (2, 64)),
    ('convnext_b_22k@32', {'depths': (1, 1), 'dims': (16, 32)}, (2, 32)),
    ('bit_m_r50x1@32', {'depths': (1, 1)}, (2, 512)),
    ('beitv2_b16_in22k@32', {'depth': 1, 'width': 32, 'heads': 2, 'mlp_dim': 64}, (2, 32)),
    ('clip_vit_b32@32', {'depth': 1, 'width': 32, 'heads': 2, 'mlp_dim': 64}, (2, 512)),
    ('r_vit_ti16_augreg_in21k@64', {'depth': 1, 'mlp_dim': 64}, (2, 192)),
])  # fmt: skip
def test_random_rows_of_every_family(name, settings, shape, monkeypatch):
    # What is drawn is seen elsewhere, and compiles for long.
    monkeypatch.setattr(zoo, '_draw', lambda model: jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(lambda: zoo.initial(model))))  # fmt: skip
    backbone = zoo.load_backbone(f'random:{name}', **settings)
    row = catalog.rows()[name.split('@')[0]]
    assert backbone.family == row.family and backbone.pixels == row.pixels
    assert backbone.sha256.startswith(f'random:{name}:seed0:')
    images = jnp.ones((2, backbone.model.image_size, backbone.model.image_size, 3))
    assert jax.eval_shape(lambda: features(backbone, images)).shape == shape
    if row.family not in ('vit', 'beit'):
        assert backbone.with_scan(False) is backbone
        with pytest.raises(UsageError, match=f"a {row.family} has no setting 'scan'"):
            backbone.with_scan()


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    ('vit_b16_in21', {}, "unknown backbone 'vit_b16_in21': did you mean 'vit_b16_in21k'"),
    ('random:B', {}, "written 'random:B/16'"),
    ('random:XL/16', {}, "unknown ViT variant 'XL'"),
    ('random:B/0', {}, 'patches of 0 pixels'),
    ('random:resnet50_tw', {}, "unknown backbone 'resnet50_tw': did you mean 'resnet50_tv"),
    ('random:resnet50_tv', {'pool': 'gap'}, "a resnet has no setting 'pool': it has depths"),
    ('random:Ti/16@32', {'image_size': 64}, 'disagree'),
    ('random:Ti/16@32', {'activaton': 'gelu'}, "unknown backbone setting 'activaton': did you mean 'activation'"),
    ('random:Ti/16@32', {'activation': 'relu'}, "unknown activation 'relu'"),
    ('random:swin_b_in22k', {'image_size': 100}, 'multiples of 224 pixels fit'),
    ('mae.pth', {}, 'there is no file mae.pth'),
    ('nowhere/vit.npz', {}, 'no file nowhere/vit.npz'),
    ('gs://bucket', {}, 'names no file of a bucket'),
    ('hf:owner', {}, 'written hf:OWNER/NAME'),
    (FILE, {'depth': 2}, "holds 'Transformer/encoderblock_2/"),
    (FILE, {'pre_logits': 5}, r"'pre_logits/(bias|kernel)' has shape"),
    (FILE, {'posemb': 'none'}, "holds 'pos_embedding' that the model has no place for"),
    (FILE, {'depths': (1,)}, "a vit has no setting 'depths'"),
    (FILE, {'scheme': 'swin'}, "does not hold a network of the scheme 'swin'"),
    (FILE, {'scheme': 'swim'}, "unknown checkpoint scheme 'swim': did you mean 'swin'"),
])  # fmt: skip
def test_mistakes(name, kwargs, message):
    with pytest.raises(UsageError, match=message):
        zoo.load_backbone(name, **kwargs)


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / 'mae_pretrain_vit_base.pth'
    path.write_bytes(b'\x80\x02}q\x00.')
    with pytest.raises(UsageError, match=f'python -m vpt_jax.convert {path}'):
        zoo.load_backbone(path)


def test_names_and_paths():
    for name in ('vit_b16_in21k', 'random:B/16', 'hf:o/n', 'hf:o/n:img', 'gs://b/x.npz', 'gs://b/x.npz:img'):
        assert zoo.is_named(name)
    for name in (str(FILE), f'{FILE}:img', 'vit.npz', 'folder', 'vit_b16'):
        assert not zoo.is_named(name)


def test_a_folder_of_the_hub_with_swin_names(tmp_path):
    """A clone of a repository: its folder is given, and no row's shapes are asked for."""
    model = swin.Swin(embed_dim=8, depths=(1, 1), heads=(1, 2), windows=(2, 2), image_size=16)
    shapes = {
        'patch_embed.proj.weight': (8, 3, 4, 4), 'patch_embed.proj.bias': (8,), 'patch_embed.norm.weight': (8,),
        'patch_embed.norm.bias': (8,), 'norm.weight': (16,), 'norm.bias': (16,),
        'layers.1.downsample.norm.weight': (32,), 'layers.1.downsample.norm.bias': (32,),
        'layers.1.downsample.reduction.weight': (16, 32),
    }  # fmt: skip
    for stage, (width, heads) in enumerate(((8, 1), (16, 2))):
        for leaf, shape in (('norm1', (width,)), ('norm2', (width,)), ('attn.qkv', (3 * width, width)),
                            ('attn.proj', (width, width)), ('mlp.fc1', (4 * width, width)),
                            ('mlp.fc2', (width, 4 * width))):  # fmt: skip
            shapes |= {
                f'layers.{stage}.blocks.0.{leaf}.weight': shape,
                f'layers.{stage}.blocks.0.{leaf}.bias': shape[:1],
            }
        shapes[f'layers.{stage}.blocks.0.attn.relative_position_bias_table'] = (9, heads)
    folder = tmp_path / 'swin_base_patch4_window7_224.ms_in22k'
    folder.mkdir()
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, folder / 'model.safetensors')
    backbone = zoo.load_backbone(folder)
    assert backbone.model == model.clone(pad_windows=True) and backbone.pixels == zoo.IMAGENET
    assert backbone.name == folder.name and backbone.num_params == sum(a.size for a in arrays.values())


def test_embedded_weights(monkeypatch, tmp_path):
    backbone = zoo.load_backbone()
    assert (backbone.model.image_size, backbone.model.depth, backbone.model.activation) == (64, 6, 'gelu_tanh')
    assert backbone.name == 'tiny_vit64' and backbone.pixels == zoo.HALF
    monkeypatch.setattr(zoo, '_ASSETS', tmp_path)
    with pytest.raises(UsageError, match='should be in the package'):
        zoo.load_backbone()
