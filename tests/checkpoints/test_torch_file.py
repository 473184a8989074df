"""PyTorch's pickles; those tests that read them need torch, which nothing else does."""

import os
import pathlib
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest

from vpt_jax.checkpoints import containers, torch_file
from vpt_jax.errors import UsageError

CASE = pathlib.Path(__file__).parents[1] / 'parity' / 'cases' / 'torchforms'
#: File to what is in front of a name in it.
PREFIXES = {
    'plain.pth': '', 'legacy_nonzip.pth': '', 'parameters_not_tensors.pth': '', 'float16.pth': '', 'bfloat16.pth': '',
    'mae_style_model_key.pth': 'model.', 'mocov3_linear_style.pth.tar': 'state_dict.module.',
    'mocov3_pretrain_style.pth.tar': 'state_dict.module.base_encoder.',
}  # fmt: skip
DTYPES = {'float16.pth': np.float16, 'bfloat16.pth': ml_dtypes.bfloat16}


@pytest.fixture
def torch(monkeypatch):
    monkeypatch.delenv('VPTJAX_EVIL_RAN', raising=False)
    yield pytest.importorskip('torch', reason='needs torch, which is an extra')
    assert 'VPTJAX_EVIL_RAN' not in os.environ


def refused(path, message):
    with pytest.raises(UsageError, match=message) as caught:
        containers.opened(path, pickles=True)
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)  # so that importing it fails
    refused(CASE / 'plain.pth', r"is a PyTorch pickle, which needs torch: pip install 'vpt_jax\[torch\]'")


@pytest.mark.parametrize('version', ['2.9.1', '2.5.1+cpu', '1.13.0', '0.4', 'unknown'])
def test_versions_that_are_not_safe(version):
    with pytest.raises(UsageError, match=rf'torch {version.replace("+", ".")} can be made to run code.*torch >= 2.10'):
        torch_file.check_version(version)


def test_versions_that_are_safe():
    for version in ('2.10.0', '2.13.0+cpu', '2.10', '3.0.1', '2.11.0a0+git1'):
        torch_file.check_version(version)


@pytest.mark.parametrize('name', PREFIXES)
def test_every_form(torch, name):
    dtype = DTYPES.get(name, np.float32)
    with np.load(f'{CASE}.npz') as case, containers.opened(CASE / name, pickles=True) as source:
        weights = {n.removeprefix('backbone/'): case[n] for n in case.files if n.startswith('backbone/')}
        shift = PREFIXES[name]
        if name == 'mocov3_pretrain_style.pth.tar':
            weights = {n: a for n, a in weights.items() if shift + n in source.members}
            assert len(weights) >= 30
        for key, array in weights.items():
            np.testing.assert_array_equal(source.read(shift + key), array.astype(dtype), strict=True)
        assert all(isinstance(reason, str) for reason in source.skipped.values())


def test_what_is_no_tensor_is_told(torch):
    source = containers.opened(CASE / 'mocov3_linear_style.pth.tar', pickles=True)
    assert source.skipped['epoch'] == 'no array but int' and source.skipped['arch'] == 'no array but str'


def test_views_have_their_own_numbers(torch):
    with containers.opened(CASE / 'strided_views.pth', pickles=True) as source:
        for name in source.members:
            assert source.read(name).shape == source.members[name].shape
            assert source.read(name).flags.c_contiguous
        assert source.members['int64'].dtype == np.int64 and source.members['scalar'].shape == ()


@pytest.mark.parametrize(('name', 'message'), [
    ('evil_reduce.pth', 'wants Python to load eval, and only files of tensors are read'),
    ('evil_plain_pickle.pth', 'holds more than tensors, and vpt_jax never loads that'),
    ('swin_style_with_namespace.pth', r'wants Python to load argparse\.Namespace'),
    ('dino_full_style.pth', r'wants Python to load argparse\.Namespace'),
    ('torchscript_like_openai_clip.pt', 'is a TorchScript program'),
])  # fmt: skip
def test_what_is_refused_even_with_torch(torch, name, message):
    refused(CASE / name, message)


def test_damaged_pickles(torch, tmp_path):
    path = tmp_path / 'x.pth'
    for name in ('plain.pth', 'legacy_nonzip.pth'):
        whole = (CASE / name).read_bytes()
        for length in (20, 500, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            refused(path, 'damaged|more than tensors')


def test_tensors_that_numpy_has_no_form_for(torch, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'a': {1: torch.ones(2)}, 'sparse': torch.eye(2).to_sparse(), 'complex': torch.zeros(2) * 1j}, path)
    source = containers.opened(path, pickles=True)
    assert source.members.keys() == {'a.1'}
    assert source.skipped == dict.fromkeys(('sparse', 'complex'), 'no array but a special tensor')
    torch.save(torch.zeros(3), path)
    refused(path, 'holds a Tensor instead of tensors by name')
    torch.save([torch.zeros(3)], path)
    refused(path, 'holds a list instead of tensors by name')
    torch.save({'a': {'b': torch.zeros(3)}, 'a.b': torch.zeros(3)}, path)
    refused(path, "holds 'a.b' twice")


def test_settings_that_lie_beside(torch, tmp_path):
    shutil.copy(CASE / 'plain.pth', tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text('{"a": 1}')
    assert containers.opened(tmp_path, pickles=True).config == {'a': 1}
