import functools
import json
import pathlib
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from vpt_jax.checkpoints import google_npz
from vpt_jax.errors import UsageError
from vpt_jax.models import zoo
from vpt_jax.models.loading import match
from vpt_jax.models.places import Places
from vpt_jax.models.transformer import stack_blocks
from vpt_jax.models.vit import ViT

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
BLOCK = 'Transformer/encoderblock_'


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision('highest'):
        yield


def assert_close(value, reference):
    error = np.abs(np.asarray(value) - reference) / np.maximum(1, np.abs(reference))
    assert error.max() <= 2e-5


def features(backbone, images, *args):
    apply = jax.jit(lambda params, images: backbone.model.apply({'params': params}, images, *args))
    return apply(backbone.params, images)


@functools.cache
def shapes(**changes) -> dict:
    model = ViT(**{'width': 8, 'depth': 2, 'mlp_dim': 12, 'heads': 2, 'patch_size': 2, 'image_size': 6, **changes})
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 6, 6, 3), np.float32))['params']


def tiny(**changes) -> dict[str, np.ndarray]:
    """Flat parameters of a tiny ViT in canonical names, with one position entry for CLS."""
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(shapes(**changes), sep='/')
    return {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat.items()}


def assert_same(tree: dict, flat: dict[str, np.ndarray]):
    got = traverse_util.flatten_dict(tree, sep='/')
    assert got.keys() == flat.keys()
    for name, array in flat.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def google(flat):
    """Google's public names."""
    renames = [('MultiHeadDotProductAttention_0', 'MultiHeadDotProductAttention_1'), ('LayerNorm_1', 'LayerNorm_2'),
               ('MlpBlock_0', 'MlpBlock_3')]  # fmt: skip
    out = {}
    for name, array in flat.items():
        for old, new in renames:
            name = name.replace(old, new)
        out['Transformer/posembed_input/pos_embedding' if name == 'pos_embedding' else name] = array
    return out


def scanned(flat):
    stacked = stack_blocks(traverse_util.unflatten_dict(flat, sep='/'))
    return {name: np.asarray(a) for name, a in traverse_util.flatten_dict(stacked, sep='/').items()}


def test_augreg_file_gives_vit_jax_features():
    case = np.load(FIXTURES / 'augreg_vit_a.npz')
    path = FIXTURES / 'augreg_vit_a.ckpt.npz'
    backbone = zoo.load_backbone(path, activation='gelu_tanh', pre_logits=24)
    assert_close(features(backbone, case['in/images']), case['out/features'])
    # Without the pre-logits layer, on larger images.
    backbone = zoo.load_backbone(path, activation='gelu_tanh', image_size=48)
    assert_close(backbone.params['pos_embedding'], case['out/pos_embedding_hires'])
    large = features(backbone, case['in/images_hires'])
    assert_close(large @ case['head_hires/kernel'] + case['head_hires/bias'], case['out/logits_hires'])


@pytest.mark.parametrize('scan', [False, True])
def test_scanned_file_gives_big_vision_features(scan):
    case = np.load(FIXTURES / 'bv_vit_scan_d.npz')
    backbone = zoo.load_backbone(FIXTURES / 'bv_vit_scan_d.ckpt.npz', activation='gelu_tanh', scan=scan)
    assert_close(features(backbone, case['in/images']), case['out/features'])


def test_vpt_reads_the_same_network(tmp_path):
    class Shallow(Places):
        def tokens(self, prompts, x, ctx):
            return ctx.insert(x, np.broadcast_to(prompts, (len(x), *prompts.shape[1:])))

    case = np.load(FIXTURES / 'posemb_zoom_a.npz')
    config = json.loads((FIXTURES / 'posemb_zoom_a.json').read_text())['config']
    weights = {name.removeprefix('backbone/'): case[name] for name in case.files if name.startswith('backbone/')}
    np.savez(tmp_path / 'vit.npz', **weights)
    backbone = zoo.load_backbone(tmp_path / 'vit.npz', image_size=config['image_size'])
    assert backbone.model.posemb_prefix == 1 and backbone.params['pos_embedding'].shape[1] == 37
    prompts = case['method/enc.transformer.prompt_embeddings']
    assert_close(features(backbone, case['in/images'], Shallow(), prompts), case['out/features'])


@pytest.mark.parametrize('container', ['', 'params/', 'opt/target/'])
@pytest.mark.parametrize('scheme', [dict, google, scanned], ids=['canonical', 'google', 'scan'])
def test_every_scheme_in_every_container(tmp_path, scheme, container):
    flat = tiny()
    stored = {container + name: array for name, array in scheme(flat).items()}
    stored[f'{container}head/kernel'] = np.zeros((8, 3), np.float32)
    if container:
        stored['opt/state/step'] = stored['chrono/seconds'] = np.int32(3)
    np.savez(tmp_path / 'vit.npz', **stored)
    assert_same(google_npz.read(tmp_path / 'vit.npz'), flat)
    ignored = {f'{container}head/kernel'} | ({'opt/state/step', 'chrono/seconds'} if container else set())
    assert set(google_npz.contents(tmp_path / 'vit.npz').ignored) == ignored
    assert 'head' in google_npz.read(tmp_path / 'vit.npz', keep=['head'])


def test_older_big_vision_spellings(tmp_path):
    flat = tiny(depth=1, pool='map', cls_token=False, posemb_prefix=0)
    old = {name.removeprefix('MAPHead_0/'): array for name, array in flat.items()}
    old['Transformer/pos_embedding'] = old.pop('pos_embedding')
    np.savez(tmp_path / 'vit.npz', **old)
    assert_same(google_npz.read(tmp_path / 'vit.npz'), flat)


def test_blocks_come_in_order(tmp_path):
    np.savez(tmp_path / 'vit.npz', **dict(sorted(tiny(depth=11).items())))
    tree = google_npz.read(tmp_path / 'vit.npz')
    blocks = [name for name in tree['Transformer'] if name.startswith('encoderblock_')]
    assert blocks == [f'encoderblock_{i}' for i in range(11)]


@pytest.mark.parametrize('changes', [
    {},
    {'posemb_prefix': 0},
    {'cls_token': False, 'posemb_prefix': 0, 'pool': 'gap'},
    {'dist_token': True, 'posemb_prefix': 2},
    {'registers': 2, 'layer_scale': True, 'patch_bias': False},
    {'pool': 'map', 'pre_norm': True, 'fc_norm': True, 'final_norm': False},
    {'pre_logits': 5},
])  # fmt: skip
def test_settings_rebuild_the_model(changes):
    flat = tiny(**changes)
    model = ViT(**google_npz.settings(traverse_util.unflatten_dict(flat, sep='/')))
    want = {'width': 8, 'mlp_dim': 12, 'heads': 2, 'patch_size': 2, 'image_size': 6, **changes}
    assert {name: getattr(model, name) for name in want} == want


def test_settings_without_position_embedding():
    found = google_npz.settings(traverse_util.unflatten_dict(tiny(posemb='none'), sep='/'))
    assert found['posemb'] == 'none' and 'image_size' not in found


@pytest.mark.parametrize('dtype', [None, 'float32', 'float16', 'bfloat16'])
def test_write_then_read(tmp_path, dtype):
    flat = tiny()
    path = tmp_path / 'new' / 'vit.npz'
    google_npz.write(path, stack_blocks(traverse_util.unflatten_dict(flat, sep='/')), dtype)
    stored = google_npz.STORAGE[dtype or 'float32']
    assert_same(google_npz.read(path), {name: array.astype(stored) for name, array in flat.items()})
    first = path.read_bytes()
    google_npz.write(path, traverse_util.unflatten_dict(dict(reversed(flat.items())), sep='/'), dtype)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ['vit.npz']


def test_bfloat16_is_viewed_not_cast(tmp_path):
    flat = {name: array.astype(ml_dtypes.bfloat16) for name, array in tiny(depth=1).items()}
    np.savez(tmp_path / 'vit.npz', **{name: array.view('V2') for name, array in flat.items()})
    assert_same(google_npz.read(tmp_path / 'vit.npz'), flat)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'vit.npz'
    path.write_bytes(b'old')
    with pytest.raises(UsageError, match='unknown storage dtype'):
        google_npz.write(path, {}, 'int8')
    with pytest.raises(RuntimeError), google_npz.atomic.replacing(path) as file:
        file.write(b'half')
        raise RuntimeError
    assert path.read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match='cannot write'):
        google_npz.write(path / 'below' / 'vit.npz', {})


def test_match_casts_and_resamples():
    tree = traverse_util.unflatten_dict({k: v.astype(ml_dtypes.bfloat16) for k, v in tiny().items()}, sep='/')
    fitted = match(tree, shapes(image_size=10), 'x.npz')
    assert fitted['pos_embedding'].shape == (1, 26, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(fitted)} == {np.dtype('float32')}
    np.testing.assert_array_equal(fitted['pos_embedding'][:, 0], tree['pos_embedding'][:, 0].astype(np.float32))


@pytest.mark.parametrize(('file', 'model', 'prefix', 'message'), [
    ({'depth': 1}, {}, 1, rf"x.npz .* it lacks '{BLOCK}1/LayerNorm_0/bias' and 15 more$"),
    ({'depth': 3}, {}, 1, rf"holds '{BLOCK}2/LayerNorm_0/bias' and 15 more that the model has no place for$"),
    ({'pool': 'map'}, {'fc_norm': True}, 1, r"lacks 'fc_norm/bias' and 1 more; it holds 'MAPHead_0/"),
    ({'mlp_dim': 16}, {}, 1, r"MlpBlock_0/Dense_0/.* has shape \[.*16\] where the model has \[.*12\] \(and 5 more"),
    ({'width': 16}, {}, 1, r'where the model has'),
    ({'posemb_prefix': 0}, {}, 1, r'9 position embeddings where the model has 10.*posemb_prefix=1'),
])  # fmt: skip
def test_match_says_what_does_not_fit(file, model, prefix, message):
    tree = traverse_util.unflatten_dict(tiny(**file), sep='/')
    with pytest.raises(UsageError, match=message):
        match(tree, shapes(**model), 'x.npz', prefix=prefix)


def refused(path, message):
    for reader in (google_npz.read, google_npz.contents):
        with pytest.raises(UsageError, match=message) as caught:
            reader(path)
        assert str(path) in str(caught.value)


def test_files_that_are_no_npz(tmp_path, monkeypatch):
    path = tmp_path / 'vit.npz'
    monkeypatch.chdir(tmp_path)
    refused(pathlib.Path('vit.npz'), rf'no file vit.npz \(looked for {path}\)')
    refused(tmp_path, 'is a folder')
    path.write_bytes(b'')
    refused(path, 'is empty')
    path.write_bytes(b'<html>not found</html>')
    refused(path, 'not an .npz file')
    with open(path, 'wb') as file:
        np.save(file, np.zeros(3))
    refused(path, 'not an .npz file')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('photo.jpg', b'x')
    refused(path, "zip archive but not an .npz file: it holds 'photo.jpg'")
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', b'x')
    refused(path, 'PyTorch pickle, which vpt_jax never unpickles')
    with zipfile.ZipFile(path, 'w'):
        pass
    refused(path, 'it holds nothing')


def test_damaged_files(tmp_path):
    path = tmp_path / 'vit.npz'
    np.savez(path, **tiny(depth=1))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, 'cut short or damaged')
    at = whole.index(b'NUMPY', len(whole) // 2) + 200
    path.write_bytes(whole[:at] + b'\xff\xff' + whole[at + 2 :])
    with pytest.raises(UsageError, match=r'is damaged: .* cannot be read'):
        google_npz.read(path)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'cls': np.array([{}], dtype=object)}, "'cls' holds Python objects, which vpt_jax never unpickles"),
    ({'cls': np.zeros((1, 1, 8), np.int32)}, "'cls' holds int32"),
    ({'embedding/kernel': np.zeros((12, 8), np.float32)}, 'NaFlex'),
    ({'pos_embedding': np.zeros((3, 3, 8), np.float32)}, r"'pos_embedding' has shape \[3, 3, 8\]"),
    ({'block1/conv': np.zeros(3)}, "plain ViT .* it holds 'block1/conv' and 1 such"),
    ({f'{BLOCK}0/LayerNorm_2/scale': np.ones(8, np.float32)}, 'which mean the same weights'),
    ({'Transformer/encoderblock/LayerNorm_0/scale': np.ones((2, 8), np.float32)}, 'both stacked'),
])  # fmt: skip
def test_other_contents_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / 'vit.npz', **{**tiny(depth=1), **changes})
    refused(tmp_path / 'vit.npz', message)


def test_other_architectures_are_refused(tmp_path):
    path = tmp_path / 'other.npz'
    np.savez(path, **{'resnet/root_block/standardized_conv2d/kernel': np.zeros((7, 7, 3, 4))})
    refused(path, "has no 'embedding/kernel', and it holds 'resnet/root_block")
    np.savez(path, **{f'params/img/{name}': array for name, array in tiny(depth=1).items()}, **{'params/t': np.ones(1)})
    refused(path, r'several towers \(img\)')


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    flat = {name: array.astype(dtype) for name, array in tiny(depth=1).items()}
    flat['Transformer/encoder_norm/scale'][3] = value
    google_npz.write(tmp_path / 'vit.npz', traverse_util.unflatten_dict(flat, sep='/'))
    with pytest.raises(UsageError, match="'Transformer/encoder_norm/scale' holds values that are not finite"):
        google_npz.read(tmp_path / 'vit.npz')


def test_settings_refuse_what_is_no_vit():
    flat = tiny(depth=1)
    flat['pos_embedding'] = flat['pos_embedding'][:, :8]
    with pytest.raises(UsageError, match=r'x.npz has 8 position embeddings, which is no square grid'):
        google_npz.settings(traverse_util.unflatten_dict(flat, sep='/'), 'x.npz')
    flat['embedding/kernel'] = flat['embedding/kernel'][:1]
    with pytest.raises(UsageError, match='patches of 1x2 pixels'):
        google_npz.settings(traverse_util.unflatten_dict(flat, sep='/'))
    with pytest.raises(UsageError, match="has no 'embedding/kernel'"):
        google_npz.settings({})
