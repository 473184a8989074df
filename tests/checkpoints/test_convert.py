import json
import os
import pathlib
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.commands import Commands
from vpt_jax import convert
from vpt_jax.checkpoints import containers, npz, scheme
from vpt_jax.checkpoints.schemes import big_vision
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models import converting, loading, zoo
from vpt_jax.models.families import FAMILIES
from vpt_jax.models.vit import ViT

CASES = pathlib.Path(__file__).parents[1] / 'parity' / 'cases'
TIMM = CASES / 'torchforms' / 'plain.safetensors'
BIG_VISION = CASES / 'bv_vit_ts_g.bv'
TINY = {'width': 8, 'depth': 2, 'mlp_dim': 12, 'heads': 2, 'patch_size': 2, 'image_size': 6}


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision('highest'):
        yield


def run(*paths, check=False, set=(), form='canonical', **flags):
    flags = {'scheme': None, 'tower': None, 'dtype': None, **flags}
    convert.main(*map(str, paths), check=check, set=list(set), form=form, **flags)


def opened(path, **hints):
    """A file as (plan, its weights by canonical name)."""
    with containers.opened(path) as file:
        part, ported = scheme.port(file, hints=hints)
        return ported, dict(scheme.arrays(part, ported))


def features(path, **settings):
    with containers.opened(path) as file:
        model, params = loading.build(*scheme.port(file, hints=settings), **settings)
    return converting.features(model, params)


def vit(**changes):
    """A tiny ViT with numbers in all of its weights, and these as a weight file."""
    model = ViT(**{**TINY, 'activation': 'gelu_tanh', **changes})
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in loading.shapes(model).items()}
    about = {'format': 1, 'family': 'vit', 'settings': {**TINY, 'activation': 'gelu_tanh', **changes}, 'pixels': 'half'}
    return model, ArraySource(flat, 'tiny', about=about)


@pytest.mark.parametrize('out', ['new/x.npz', 'new/x.safetensors'])
def test_a_file_that_says_what_it_holds(tmp_path, capsys, out):
    run(TIMM, tmp_path / out, set=['heads=4', 'pool=gap'])
    assert re.fullmatch(rf'wrote {tmp_path / out} \(0\.0 MB\)\n', capsys.readouterr().out)
    theirs, ours = opened(TIMM, heads=4), opened(tmp_path / out)
    assert ours[0].family == 'vit' and ours[0].pixels == theirs[0].pixels == 'imagenet' and not ours[0].ignored
    assert {**theirs[0].settings, 'pool': 'gap'}.items() <= ours[0].settings.items()
    assert ours[1].keys() == theirs[1].keys()
    for name, array in theirs[1].items():
        np.testing.assert_array_equal(ours[1][name], array, strict=True)
    np.testing.assert_array_equal(features(tmp_path / out), features(TIMM, heads=4, pool='gap'))
    first = (tmp_path / out).read_bytes()
    run(TIMM, tmp_path / out, set=['pool=gap', 'heads=4'])
    assert (tmp_path / out).read_bytes() == first and len(list((tmp_path / 'new').iterdir())) == 1


def test_load_backbone_needs_no_settings(tmp_path):
    run(TIMM, tmp_path / 'x.safetensors', set=['heads=4'])
    backbone = zoo.load_backbone(tmp_path / 'x.safetensors')
    assert backbone.model.heads == 4 and backbone.pixels == zoo.IMAGENET and backbone.model.activation == 'gelu'
    assert backbone.sha256 == containers.fingerprint([tmp_path / 'x.safetensors'])


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
def test_storage(tmp_path, dtype, suffix):
    run(BIG_VISION, tmp_path / f'x{suffix}', dtype=dtype)
    ours, theirs = opened(tmp_path / f'x{suffix}')[1], opened(BIG_VISION)[1]
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array.astype(big_vision.STORAGE[dtype]), strict=True)


def test_types_are_kept_by_default(tmp_path):
    for name, dtype in (('float16', np.float16), ('bfloat16', ml_dtypes.bfloat16)):
        run(TIMM.with_name(f'{name}.safetensors'), tmp_path / 'x.npz', set=['heads=4'])
        assert {a.dtype for a in opened(tmp_path / 'x.npz')[1].values()} == {np.dtype(dtype)}


def test_another_image_size(tmp_path):
    run(TIMM, tmp_path / 'x.npz', set=['heads=4', 'image_size=24'])
    ported, weights = opened(tmp_path / 'x.npz')
    assert ported.settings['image_size'] == 24 and weights['pos_embedding'].shape == (1, 10, 16)
    np.testing.assert_array_equal(features(tmp_path / 'x.npz'), features(TIMM, heads=4, image_size=24))


def test_one_of_several_networks(tmp_path):
    flat = {f'img/{name}': array for name, array in opened(BIG_VISION)[1].items()}
    npz.write(tmp_path / 'two.npz', {**flat, 'txt/embedding': np.zeros(3), 't': np.zeros(1)})
    run(f'{tmp_path}/two.npz:img', tmp_path / 'a.npz')
    run(tmp_path / 'two.npz', tmp_path / 'b.npz', tower='img')
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    with pytest.raises(UsageError, match="holds no 'llm'"):
        run(tmp_path / 'two.npz', tmp_path / 'a.npz', tower='llm')


def test_there_and_back(tmp_path):
    run(BIG_VISION, tmp_path / 'a.npz')
    run(tmp_path / 'a.npz', tmp_path / 'b.safetensors')
    run(tmp_path / 'b.safetensors', tmp_path / 'c.npz', form='big_vision')
    with np.load(tmp_path / 'c.npz') as file, np.load(CASES / 'bv_vit_ts_g.npz') as case:
        assert {f'backbone/{name}' for name in file.files} == {n for n in case.files if n.startswith('backbone/')}
        for name in file.files:
            np.testing.assert_array_equal(file[name], case[f'backbone/{name}'], strict=True)


@pytest.mark.parametrize('changes', [
    {}, {'posemb_prefix': 0}, {'layer_scale': True}, {'patch_bias': False}, {'pre_logits': 5},
    {'pool': 'map', 'cls_token': False, 'posemb_prefix': 0}, {'pool': 'gap', 'cls_token': False, 'posemb_prefix': 0},
    {'posemb': 'sincos2d', 'pool': '0', 'layer_scale': True},
], ids=str)  # fmt: skip
def test_big_vision_gets_the_same_features(tmp_path, changes):
    model, source = vit(**changes)
    ported = scheme.port(source)[1]
    converting.write(tmp_path / 'x.npz', source, ported, loading.network(source, ported), form='big_vision')
    with np.load(tmp_path / 'x.npz') as file:
        assert 'embedding/bias' in file.files and not any('layer_scale' in name for name in file.files)
        if model.posemb == 'learn':
            assert file['pos_embedding'].shape == (1, 9, 8)
    kept = {key: value for key, value in changes.items() if key in ('pool', 'pre_logits', 'posemb')}
    kept |= {'image_size': 6} if 'posemb' in kept else {}
    ours = converting.features(model, loading.parameters(model, {n: source.read(n) for n in source.members}))
    assert np.abs(features(tmp_path / 'x.npz', **kept) - ours).max() <= 2e-5 * max(1, np.abs(ours).max())


@pytest.mark.parametrize(('changes', 'message'), [
    ({'activation': 'gelu'}, "has activation='gelu_tanh' and this network 'gelu'.*; --set activation=gelu_tanh writes"),
    ({'ln_eps': 1e-12}, 'has ln_eps=1e-06 and this network 1e-12'),
    ({'registers': 2}, 'has registers=0 and this network 2, so that its features would be others$'),
    ({'fc_norm': True}, 'has fc_norm=False and this network True'),
    ({'pre_norm': True}, 'pre_norm'),
    ({'dist_token': True}, 'dist_token'),
    ({'projection': 4}, 'projection'),
    ({'final_norm': False}, 'final_norm'),
    ({'posemb': 'none'}, 'no counterpart of posemb=none.*such as --set posemb=sincos2d'),
    ({'pool': 'tok_gap'}, 'no counterpart of .*pool=tok_gap'),
])  # fmt: skip
def test_networks_that_big_vision_does_not_have(changes, message):
    with pytest.raises(UsageError, match=message):
        converting.check_big_vision(ViT(**{**TINY, 'activation': 'gelu_tanh', **changes}))


def test_other_families_are_no_vits():
    with pytest.raises(UsageError, match="big_vision's ViT cannot hold a ConvNeXt"):
        converting.check_big_vision(FAMILIES['convnext'](depths=(1, 1), dims=(4, 8)))


def test_check_tells_what_a_file_holds(capsys):
    run(BIG_VISION, check=True)
    out = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines['parameters'] == '14,664 in 38 arrays of float32'
    assert lines['network'] == 'vit' and lines['pixels'].startswith('half: ')
    assert ' heads=3 ' in lines['settings'] and re.search(r'\sactivation=gelu_tanh\s', out)
    assert re.search(r'\n  Transformer/encoderblock_\{0\.\.1\}/LayerNorm_0/bias +\[24\] +float32\n', out)
    assert re.search(r'\n  embedding/kernel +\[8, 8, 3, 24\] +float32\n', out)
    assert 'ignored     params/head/bias, params/head/kernel: task head\n' in out
    assert 'ignored     opt/count: optimizer state\n' in out
    model = loading.network(*(scheme.port(containers.opened(BIG_VISION))))
    params = loading.parameters(model, opened(BIG_VISION)[1])
    ours = model.apply({'params': params}, converting.fixed_image(24))[0]
    mean, first = re.search(r'24 of a fixed image: mean (\S+), .*, first (\S+) ', lines['features']).groups()
    assert abs(float(mean) - ours.mean()) < 1e-4 and abs(float(first) - ours[0]) < 1e-4


def test_check_and_convert_at_once(tmp_path, capsys):
    run(TIMM, tmp_path / 'x.npz', check=True, set=['heads=4'])
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith('wrote ')
    run(tmp_path / 'x.npz', check=True)
    assert capsys.readouterr().out.splitlines()[-1] == told[-2]


def test_blocks_of_other_shapes_are_told_apart():
    model = ViT(**{**TINY, 'depth': 12})
    lines = converting.tree(model, dict.fromkeys(loading.shapes(model), 'float32'))
    assert len(lines) == 2 + 16 + 4 and lines[2].startswith('Transformer/encoderblock_{0..11}/LayerNorm_0/bias')
    swin = FAMILIES['convnext'](depths=(2, 1), dims=(4, 8))
    names = [line.split()[0] for line in converting.tree(swin, dict.fromkeys(loading.shapes(swin), 'x'))]
    assert len(names) == len(set(names)) and any('{0..1}' in name for name in names)


def test_a_published_file_is_run_as_its_row_says(tmp_path, capsys):
    flat = opened(BIG_VISION)[1]
    npz.write(tmp_path / 'ViT-B_16.npz', flat)
    run(tmp_path / 'ViT-B_16.npz', tmp_path / 'x.npz')
    assert 'taken for vit_b16_in21k of the catalog' in capsys.readouterr().err
    ported, _ = opened(tmp_path / 'x.npz')
    assert (ported.settings['activation'], ported.pixels) == ('gelu', 'imagenet')
    run(tmp_path / 'ViT-B_16.npz', tmp_path / 'x.npz', set=['activation=gelu_tanh'])
    assert opened(tmp_path / 'x.npz')[0].settings['activation'] == 'gelu_tanh'


@pytest.mark.parametrize(('text', 'value'), [
    ('heads=12', 12), ('ln_eps=1e-5', 1e-5), ('activation=gelu', 'gelu'), ('cls_token=False', False),
    ('stem_depths=none', None), ('stem_depths=[3, 4, 9]', (3, 4, 9)), ('pool=0', '0'), ('pool=tok', 'tok'),
])  # fmt: skip
def test_settings(text, value):
    assert convert.read_settings([text]) == {text.split('=')[0]: value}


@pytest.mark.parametrize(('paths', 'flags', 'message'), [
    ((), {}, 'write python -m vpt_jax.convert IN OUT.safetensors, or IN --check'),
    ((TIMM,), {}, 'or IN --check'),
    ((TIMM, 'a', 'b'), {}, 'or IN --check'),
    ((TIMM, 'x.pth'), {'set': ['heads=4']}, r'cannot write x.pth: the name must end in .npz or .safetensors'),
    ((BIG_VISION, 'x.safetensors'), {'form': 'big_vision'}, r"big_vision's files are .npz files"),
    ((BIG_VISION, 'x.npz'), {'form': 'flax'}, "unknown form 'flax'"),
    ((BIG_VISION, 'x.npz'), {'dtype': 'int8'}, "unknown storage dtype 'int8'"),
    ((BIG_VISION, 'x.npz'), {'scheme': 'timm'}, "unknown checkpoint scheme 'timm': did you mean"),
    ((BIG_VISION, 'x.npz'), {'scheme': 'timm_vit'}, "does not hold a network of the scheme 'timm_vit'"),
    ((BIG_VISION, 'x.npz'), {'set': ['head=4']}, "unknown setting 'head': did you mean 'heads'"),
    ((BIG_VISION, 'x.npz'), {'set': ['heads']}, "cannot read the setting 'heads': write --set NAME=VALUE"),
    ((BIG_VISION, 'x.npz'), {'set': ['depths=[1, 2]']}, "unknown setting of the network 'vit' 'depths'"),
    ((BIG_VISION, 'x.npz'), {'set': ['width=none']}, 'no network can be made with the settings of'),
    ((BIG_VISION, 'x.npz'), {'set': ['depth=3']}, "it lacks 'Transformer/encoderblock_2/LayerNorm_0/bias' and 15"),
    ((BIG_VISION, 'x.npz'), {'set': ['width=48']}, 'has shape .24. where the model has .48.'),
    ((TIMM, 'x.npz'), {}, 'how many heads'),
    (('absent.npz', 'x.npz'), {}, r'there is no file absent.npz'),
])  # fmt: skip
def test_what_cannot_be_done(tmp_path, monkeypatch, paths, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        run(*paths, **flags)
    assert not list(tmp_path.iterdir())


def about_of(path, **changes):
    """Rewrites what a canonical file says of itself."""
    with containers.opened(path) as file:
        about, arrays = {**file.about, **changes}, {name: file.read(name) for name in file.members}
    npz.write(path, arrays, json.dumps(about).encode())


@pytest.mark.parametrize(('changes', 'message'), [
    ({'format': 2, 'vpt_jax': '9.9'}, r'has format 2 \(written by vpt_jax 9.9\) and this vpt_jax reads format 1'),
    ({'family': 'novel'}, "unknown family of the network in .* 'novel'"),
    ({'family': 3}, 'does not say family, settings and pixels'),
    ({'settings': []}, 'does not say family, settings and pixels'),
    ({'pixels': 'raw'}, "unknown convention for pixels in .* 'raw'"),
    ({'settings': {**TINY, 'novel': 1}}, "unknown setting of the network 'vit' 'novel'"),
    ({'settings': {**TINY, 'depth': 10**9}}, 'describes a larger network than it holds'),
    ({'settings': {**TINY, 'image_size': 10**6}}, 'describes a larger network than it holds'),
    ({'settings': {**TINY, 'width': 'wide'}}, 'no network can be made with the settings'),
    ({'settings': {**TINY, 'patch_size': 0}}, 'no network can be made with the settings'),
    ({'settings': {**TINY, 'image_size': -6}}, '.'),
    ({'settings': {'depth': [[2], 'a']}}, 'no network can be made with the settings'),
    ({'settings': TINY}, 'does not fit the model'),
])  # fmt: skip
def test_files_that_say_what_cannot_be(tmp_path, changes, message):
    run(BIG_VISION, tmp_path / 'x.npz')
    about_of(tmp_path / 'x.npz', **changes)
    with pytest.raises(UsageError, match=message), containers.opened(tmp_path / 'x.npz') as file:
        loading.build(*scheme.port(file))


def test_the_scheme_of_our_own_files(tmp_path):
    run(BIG_VISION, tmp_path / 'x.npz')
    with containers.opened(tmp_path / 'x.npz') as file:
        assert scheme.port(file, 'canonical')[1] == scheme.port(file)[1]
        assert scheme.port(file, 'big_vision')[1].settings['heads'] == 3  # insisting on another one is possible
    with containers.opened(BIG_VISION) as file, pytest.raises(UsageError, match="of the scheme 'canonical'"):
        scheme.port(file, 'canonical')


@pytest.mark.parametrize('name', ['plain.pth', 'legacy_nonzip.pth', 'mae_style_model_key.pth', 'bfloat16.pth',
                                  'mocov3_linear_style.pth.tar', 'parameters_not_tensors.pth'])  # fmt: skip
def test_pickles(tmp_path, name):
    pytest.importorskip('torch', reason='needs torch, which is an extra')
    run(CASES / 'torchforms' / name, tmp_path / 'x.safetensors', set=['heads=4'], dtype='bfloat16')
    ours = opened(tmp_path / 'x.safetensors')[1]
    for key, array in opened(TIMM, heads=4)[1].items():
        np.testing.assert_array_equal(ours[key], array.astype(ml_dtypes.bfloat16), strict=True)


def test_programs(tmp_path, monkeypatch):
    """The command line: exit codes, one sentence on stderr, nothing run."""
    monkeypatch.delenv('VPTJAX_EVIL_RAN', raising=False)
    with Commands() as commands:
        done = commands('convert', TIMM, tmp_path / 'x.safetensors', '--set', 'heads=4', '--set=pool=gap')
        assert (done.returncode, done.stderr) == (0, '') and (tmp_path / 'x.safetensors').exists()
        for name in ('evil_reduce.pth', 'evil_plain_pickle.pth', 'evil_object_array.npz', 'bad_offsets.safetensors'):
            done = commands('convert', CASES / 'torchforms' / name, tmp_path / 'y.npz')
            assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
        done = commands('convert', TIMM)
        assert done.returncode == 2 and 'or IN --check' in done.stderr
    assert [path.name for path in tmp_path.glob('*.*')] == ['x.safetensors'] and 'VPTJAX_EVIL_RAN' not in os.environ


def test_each_member_is_read_once_and_let_go():
    class Watched(ArraySource):
        def read(self, name):
            reads.append(name)
            return super().read(name)

    reads = []
    stacked = {'Transformer/encoderblock/' + n.split('/', 2)[2]: a for n, a in opened(BIG_VISION)[1].items()
               if n.startswith('Transformer/encoderblock_0/')}  # fmt: skip
    rest = {n: a for n, a in opened(BIG_VISION)[1].items() if 'encoderblock' not in n}
    source = Watched({**{n: np.stack([a, a + 1, a + 2]) for n, a in stacked.items()}, **rest})
    order = []
    for name, _ in scheme.arrays(*scheme.port(source)):
        order.append(name)
        assert len(set(reads)) == len(reads) and len(reads) == len({re.sub(r'_\d(?=/)', '', n, count=1) for n in order})
    assert reads == list(source.members) and len(order) == 3 * len(stacked) + len(rest)
    assert flatten_dict(scheme.load(*scheme.port(source)), sep='/').keys() == set(order)
