import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from vpt_jax.checkpoints import atomic, containers, scheme
from vpt_jax.checkpoints.schemes import big_vision
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models import zoo
from vpt_jax.models.loading import build, check_names
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


def contents(path, **hints):
    """The plan for a file."""
    with containers.opened(path) as file:
        return scheme.port(file, hints=hints)[1]


def read(path, **hints):
    """A file's weights in canonical names."""
    with containers.opened(path) as file:
        return scheme.load(*scheme.port(file, hints=hints))


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
    backbone = zoo.load_backbone(tmp_path / 'vit.npz', image_size=config['image_size'], activation='gelu')
    assert backbone.model.posemb_prefix == 1 and backbone.params['pos_embedding'].shape[1] == 37
    prompts = case['method/enc.transformer.prompt_embeddings']
    assert_close(features(backbone, case['in/images'], Shallow(), prompts), case['out/features'])


@pytest.mark.parametrize('container', ['', 'params/', 'opt/target/'])
@pytest.mark.parametrize('spelling', [dict, google, scanned], ids=['canonical', 'google', 'scan'])
def test_every_spelling_in_every_container(tmp_path, spelling, container):
    flat = tiny()
    stored = {container + name: array for name, array in spelling(flat).items()}
    stored[f'{container}head/kernel'] = np.zeros((8, 3), np.float32)
    if container:
        stored['opt/state/step'] = stored['chrono/seconds'] = np.int32(3)
    np.savez(tmp_path / 'vit.npz', **stored)
    assert_same(read(tmp_path / 'vit.npz'), flat)
    ignored = {f'{container}head/kernel': 'task head'}
    ignored |= {'opt/state/step': 'optimizer state', 'chrono/seconds': 'training clock'} if container else {}
    assert contents(tmp_path / 'vit.npz').ignored == ignored


def test_the_pre_logits_layer_is_read_when_asked_for(tmp_path):
    flat = tiny(depth=1, pre_logits=5)
    np.savez(tmp_path / 'vit.npz', **flat)
    assert 'pre_logits' not in read(tmp_path / 'vit.npz')
    assert contents(tmp_path / 'vit.npz').ignored.keys() == {'pre_logits/kernel', 'pre_logits/bias'}
    assert_same(read(tmp_path / 'vit.npz', pre_logits=5), flat)
    assert contents(tmp_path / 'vit.npz', pre_logits=5).settings['pre_logits'] == 5


def test_older_big_vision_spellings(tmp_path):
    flat = tiny(depth=1, pool='map', cls_token=False, posemb_prefix=0)
    old = {name.removeprefix('MAPHead_0/'): array for name, array in flat.items()}
    old['Transformer/pos_embedding'] = old.pop('pos_embedding')
    np.savez(tmp_path / 'vit.npz', **old)
    assert_same(read(tmp_path / 'vit.npz'), flat)


def test_blocks_come_in_order(tmp_path):
    np.savez(tmp_path / 'vit.npz', **dict(sorted(tiny(depth=11).items())))
    tree = read(tmp_path / 'vit.npz')
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
    found = scheme.port(ArraySource(flat), hints=changes)[1].settings
    model = ViT(**found)
    want = {'width': 8, 'mlp_dim': 12, 'heads': 2, 'patch_size': 2, 'image_size': 6, **changes}
    assert {name: getattr(model, name) for name in want} == want


def test_settings_without_position_embedding():
    source = ArraySource(tiny(posemb='none'), 'x.npz')
    found = scheme.port(source, hints={'posemb': 'sincos2d'})[1].settings
    assert found['posemb'] == 'none' and 'image_size' not in found
    with pytest.raises(UsageError, match=r"x.npz has no 'pos_embedding': give posemb='sincos2d' if"):
        scheme.port(source)
    with pytest.raises(UsageError, match="has no 'embedding/bias': give patch_bias=False if"):
        scheme.port(ArraySource(tiny(patch_bias=False)))


@pytest.mark.parametrize('dtype', [None, 'float32', 'float16', 'bfloat16'])
def test_write_then_read(tmp_path, dtype):
    flat = tiny()
    path = tmp_path / 'new' / 'vit.npz'
    big_vision.write(path, stack_blocks(traverse_util.unflatten_dict(flat, sep='/')), dtype)
    stored = big_vision.STORAGE[dtype or 'float32']
    assert_same(read(path), {name: array.astype(stored) for name, array in flat.items()})
    first = path.read_bytes()
    big_vision.write(path, traverse_util.unflatten_dict(dict(reversed(flat.items())), sep='/'), dtype)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ['vit.npz']


def test_bfloat16_is_viewed_not_cast(tmp_path):
    flat = {name: array.astype(ml_dtypes.bfloat16) for name, array in tiny(depth=1).items()}
    np.savez(tmp_path / 'vit.npz', **{name: array.view('V2') for name, array in flat.items()})
    assert_same(read(tmp_path / 'vit.npz'), flat)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'vit.npz'
    path.write_bytes(b'old')
    with pytest.raises(UsageError, match='unknown storage dtype'):
        big_vision.write(path, {}, 'int8')
    with pytest.raises(RuntimeError), atomic.replacing(path) as file:
        file.write(b'half')
        raise RuntimeError
    assert path.read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match='cannot write'):
        big_vision.write(path / 'below' / 'vit.npz', {})


def test_loading_casts_and_resamples():
    flat = {name: array.astype(ml_dtypes.bfloat16) for name, array in tiny().items()}
    _, params = build(*scheme.port(ArraySource(flat)), image_size=10)
    assert params['pos_embedding'].shape == (1, 26, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
    np.testing.assert_array_equal(params['pos_embedding'][:, 0], flat['pos_embedding'][:, 0].astype(np.float32))
    _, params = build(*scheme.port(ArraySource(tiny())), param_dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(('file', 'model', 'message'), [
    ({'depth': 1}, {}, rf"x.npz .* it lacks '{BLOCK}1/LayerNorm_0/bias' and 15 more$"),
    ({'depth': 3}, {}, rf"holds '{BLOCK}2/LayerNorm_0/bias' and 15 more that the model has no place for$"),
    ({'pool': 'map'}, {'fc_norm': True}, r"lacks 'fc_norm/bias' and 1 more; it holds 'MAPHead_0/"),
    ({'mlp_dim': 16}, {}, r"MlpBlock_0/Dense_0/.* has shape \[.*16\] where the model has \[.*12\] \(and 5 more"),
    ({'width': 16}, {}, r'where the model has'),
])  # fmt: skip
def test_loading_says_what_does_not_fit(file, model, message):
    with pytest.raises(UsageError, match=message):
        check_names(tiny(**file), traverse_util.flatten_dict(shapes(**model), sep='/'), 'x.npz')


def test_positions_that_are_no_grid_are_not_resampled():
    source = ArraySource(tiny(posemb_prefix=0), 'x.npz')
    with pytest.raises(UsageError, match=r'9 position embeddings where the model has 10.*posemb_prefix=1'):
        build(*scheme.port(source), posemb_prefix=1)


def test_a_scan_of_the_wrong_depth(tmp_path):
    flat = scanned(tiny(depth=3))
    with pytest.raises(UsageError, match=rf"it lacks '{BLOCK}3/LayerNorm_0/bias' and 15 more"):
        build(*scheme.port(ArraySource(flat)), depth=4)
    name = 'Transformer/encoderblock/LayerNorm_0/scale'
    flat[name] = flat[name][:2]
    np.savez(tmp_path / 'vit.npz', **flat)
    refused(tmp_path / 'vit.npz', rf"stacks different numbers of blocks in '.*' and '{name}'")


def refused(path, message):
    with pytest.raises(UsageError, match=message) as caught:
        contents(path)
    assert str(path) in str(caught.value)


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


def test_other_contents_are_no_vit(tmp_path):
    path = tmp_path / 'other.npz'
    np.savez(path, **{'layers/0/kernel': np.zeros((7, 4))})
    refused(path, "does not hold a network of any scheme that vpt_jax knows: it has 1 arrays, .* 'layers/0/kernel'")
    np.savez(path, **{f'img/{name}': array for name, array in tiny(depth=1).items()}, **{'t': np.ones(1)})
    assert contents(path).ignored == {'t': 'not part of the network'}
    with pytest.raises(UsageError, match="holds no 'txt': its top-level names are img, t"):
        contents(path, tower='txt')


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    flat = {name: array.astype(dtype) for name, array in tiny(depth=1).items()}
    flat['Transformer/encoder_norm/scale'][3] = value
    big_vision.write(tmp_path / 'vit.npz', traverse_util.unflatten_dict(flat, sep='/'))
    with pytest.raises(UsageError, match="'Transformer/encoder_norm/scale' holds values that are not finite"):
        read(tmp_path / 'vit.npz')


def test_shapes_that_are_no_vit():
    flat = tiny(depth=1)
    flat['pos_embedding'] = flat['pos_embedding'][:, :8]
    with pytest.raises(UsageError, match=r'x.npz has 8 position embeddings, which is no square grid'):
        scheme.port(ArraySource(flat, 'x.npz'))
    flat['embedding/kernel'] = flat['embedding/kernel'][:1]
    with pytest.raises(UsageError, match='patches of 1x2 pixels'):
        scheme.port(ArraySource(flat))
