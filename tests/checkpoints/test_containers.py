import hashlib
import os
import pathlib
import shutil

import numpy as np
import pytest

from vpt_jax.checkpoints import containers
from vpt_jax.errors import UsageError

CASE = pathlib.Path(__file__).parents[1] / 'parity' / 'cases' / 'torchforms'
PICKLES = sorted(path.name for path in CASE.iterdir() if path.suffix in ('.pth', '.tar'))


def refused(path, message):
    with pytest.raises(UsageError, match=message) as caught:
        containers.opened(path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', PICKLES)
def test_pickles_are_refused_with_the_command_that_converts_them(name, monkeypatch):
    monkeypatch.delenv('VPTJAX_EVIL_RAN', raising=False)
    with pytest.raises(UsageError) as caught:
        containers.opened(CASE / name)
    out = CASE / f'{name.split(".")[0]}.safetensors'
    assert f'python -m vpt_jax.convert {CASE / name} {out}' in str(caught.value)
    assert "pip install 'vpt_jax[torch]'" in str(caught.value)
    assert 'VPTJAX_EVIL_RAN' not in os.environ


def test_a_pickle_by_another_name(tmp_path):
    assert len(PICKLES) == 13
    for name in ('plain.pth', 'legacy_nonzip.pth', 'evil_plain_pickle.pth'):
        shutil.copy(CASE / name, tmp_path / 'a model.npz')
        refused(tmp_path / 'a model.npz', r"could run code: .* '.*a model.npz' '.*a model.safetensors'")


def test_a_program_is_refused():
    for pickles in (False, True):
        with pytest.raises(UsageError, match='is a TorchScript program, not a file of weights'):
            containers.opened(CASE / 'torchscript_like_openai_clip.pt', pickles)


@pytest.mark.parametrize(('content', 'message'), [
    (b'', 'is empty; copy or download it again'),
    (b'<!DOCTYPE html><html>not found</html>', 'is a web page, a download that went wrong'),
    (b'\n<html>', 'is a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n', 'is a pointer of Git LFS'),
    (b'\x1f\x8b\x08\x00', 'is packed; unpack it first'),
    (bytes(257) + b'ustar\x0000', 'is packed; unpack it first'),
    (b'\x89HDF\r\n\x1a\n', 'is an HDF5 file'),
    (b'\x93NUMPY\x01\x00', 'is a single array'),
    (b'PK\x03\x04 and no more', 'is cut short or damaged'),
    (b'{"weights": 1}', "lists no weights: it has no 'weight_map'"),
    (b'{"weights": 1', 'is damaged: it is not JSON'),
    (b'weights', 'is no weight file that vpt_jax reads'),
    (b'\x80', 'is no weight file that vpt_jax reads'),
    (bytes(16), 'is no weight file that vpt_jax reads'),
])  # fmt: skip
def test_what_people_download_instead_of_weights(tmp_path, content, message):
    for name in ('x.npz', 'x.safetensors'):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, message)


def test_a_file_is_known_by_its_bytes(tmp_path):
    shutil.copy(CASE / 'plain.safetensors', tmp_path / 'x.pth')
    assert 'cls_token' in containers.opened(tmp_path / 'x.pth').members
    np.savez(tmp_path / 'x.npz', a=np.zeros(3))
    os.rename(tmp_path / 'x.npz', tmp_path / 'x.safetensors')
    with containers.opened(tmp_path / 'x.safetensors') as source:
        assert source.members.keys() == {'a'}


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused('vit.npz', rf'no file vit.npz \(looked for {tmp_path}/vit.npz\)')


def test_folders(tmp_path):
    refused(tmp_path, 'is a folder without a weight file that vpt_jax reads')
    np.savez(tmp_path / 'a.npz', a=np.zeros(3))
    assert containers.opened(tmp_path).members.keys() == {'a'}
    np.savez(tmp_path / 'b.npz', a=np.zeros(3))
    refused(tmp_path, r'is a folder with several weight files \(a.npz, b.npz\): give one of them')
    shutil.copy(CASE / 'plain.pth', tmp_path / 'pytorch_model.bin')
    refused(tmp_path, r'pytorch_model.bin is a PyTorch pickle')
    shutil.copy(CASE / 'plain.safetensors', tmp_path / 'model.safetensors')
    assert 'cls_token' in containers.opened(tmp_path).members


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    np.savez(tmp_path / 'a.npz', a=np.zeros(3))
    assert containers.opened('~/a.npz').members.keys() == {'a'}


@pytest.mark.parametrize(('text', 'path', 'tower'), [
    ('file.npz:img', 'file.npz', 'img'),
    ('a/b:txt', 'a/b', 'txt'),
    ('hf:owner/name:img', 'hf:owner/name', 'img'),
    ('gs://bucket/x.npz:img', 'gs://bucket/x.npz', 'img'),
    ('file.npz', 'file.npz', None),
    ('hf:owner/name', 'hf:owner/name', None),
    ('hf:name', 'hf:name', None),
    ('gs://bucket/x', 'gs://bucket/x', None),
    ('random:B/16', 'random:B/16', None),
    ('file.npz:', 'file.npz:', None),
    ('vit_b16_in21k', 'vit_b16_in21k', None),
])  # fmt: skip
def test_towers(text, path, tower):
    assert containers.split_tower(text) == containers.split_tower(pathlib.PurePosixPath(text)) or '//' in text
    assert containers.split_tower(text) == (path, tower)


def test_a_colon_in_a_name_that_exists(tmp_path):
    (tmp_path / 'x.npz:img').write_bytes(b'')
    assert containers.split_tower(tmp_path / 'x.npz:img') == (str(tmp_path / 'x.npz:img'), None)


def test_fingerprints(tmp_path):
    plain = CASE / 'plain.safetensors'
    assert containers.fingerprint([plain]) == hashlib.sha256(plain.read_bytes()).hexdigest()
    with containers.opened(CASE / 'model.safetensors.index.json') as source:
        whole = containers.fingerprint(source.files)
        assert whole == containers.fingerprint(source.files[::-1]) != containers.fingerprint(source.files[:2])
    moved = [pathlib.Path(shutil.copy(path, tmp_path)) for path in source.files]
    assert containers.fingerprint(moved) == whole
    moved[-1].write_bytes(b'')
    assert containers.fingerprint(moved) != whole
    moved[-1].unlink()
    with pytest.raises(UsageError, match='cannot read'):
        containers.fingerprint(moved)
