"""What is published, what is in the cache, and what is pinned there."""

import hashlib
import json
import types

import pytest

from vpt_jax.checkpoints import fetch, transfer
from vpt_jax.errors import UsageError


def get(**kwargs):
    return fetch.present('gs://b/x.npz', **kwargs)


@pytest.mark.parametrize('known', ['md5:000000', 'sha256:00000000'])
def test_another_file_than_the_published_one(server, cache, known):
    with pytest.raises(UsageError, match=r'not the file that was published, whose .* starts with .*; nothing was kept'):
        get(known=known)
    assert not list(cache.rglob('x.npz*'))
    assert get(known=f'sha256:{server.sha256[:8]}').exists()


def test_a_download_that_is_not_what_it_was(server, cache):
    path = get()
    fetch.check(path, server.sha256)
    path.unlink()
    server.files['/b/x.npz'] = server.other
    pin = path.with_name('x.npz.sha256')
    with pytest.raises(
        UsageError, match=rf'is not the file that it was: .* and {pin} says {server.sha256}.*delete the note'
    ):
        get()
    pin.unlink()
    assert get().read_bytes() == server.other


def test_a_local_file_is_pinned(server, tmp_path):
    path = tmp_path / 'x.npz'
    path.write_bytes(server.content)
    with pytest.raises(UsageError, match=f'{path} is not the published file, whose md5 starts with 0123'):
        fetch.check(path, server.sha256, 'md5:0123')
    fetch.check(path, server.sha256, f'md5:{hashlib.md5(server.content).hexdigest()[:6]}')
    assert fetch.pin_of(path).read_text().strip() == server.sha256
    fetch.check(path, server.sha256)
    with pytest.raises(UsageError, match=r'has changed since it was first used'):
        fetch.check(path, hashlib.sha256(server.other).hexdigest())


@pytest.mark.parametrize(('value', 'refused'), [('1', True), ('true', True), ('0', False), ('', False)])
def test_offline(server, cache, monkeypatch, value, refused):
    monkeypatch.setenv('VPT_JAX_OFFLINE', value)
    if not refused:
        assert get().read_bytes() == server.content
        return
    where = f'download {server.url}/b/x.npz to {fetch.cached("gs://b/x.npz")}'
    with pytest.raises(UsageError, match=f'x.npz is not on this machine and VPT_JAX_OFFLINE is set: {where}'):
        get()
    assert not server.asked and not cache.exists()


def test_a_repository_of_the_hub(server, cache):
    root = '/o/n/resolve/main'
    server.files = {f'{root}/model.safetensors': server.content, f'{root}/config.json': b'{}'}
    path = fetch.present('hf:o/n')
    assert path == cache / 'hf' / 'o' / 'n' / 'model.safetensors' and path.read_bytes() == server.content
    assert path.with_name('config.json').read_bytes() == b'{}'
    asked = len(server.asked)
    assert fetch.present('hf:o/n') == path and len(server.asked) == asked


def test_shards_of_the_hub(server, cache):
    root = '/o/n/resolve/main'
    index = json.dumps({'weight_map': {'a': 'model-1.safetensors', 'b': 'model-2.safetensors'}}).encode()
    server.files = {f'{root}/model.safetensors.index.json': index, f'{root}/model-1.safetensors': server.content}
    with pytest.raises(UsageError, match=r'no file .*model-2.safetensors'):
        fetch.present('hf:o/n')
    server.files[f'{root}/model-2.safetensors'] = server.other
    path = fetch.present('hf:o/n')
    assert path.name == 'model.safetensors.index.json'
    assert path.with_name('model-2.safetensors').read_bytes() == server.other


@pytest.mark.parametrize('index', ['{"weight_map": {"a": "../x.safetensors"}}', '[]', '{'])
def test_an_index_that_is_no_list_of_shards(server, cache, index):
    server.files = {'/o/n/resolve/main/model.safetensors.index.json': index.encode()}
    with pytest.raises(UsageError, match=r'outside of its folder|lists no shards'):
        fetch.present('hf:o/n')


def test_a_repository_with_pickles_only(server, cache):
    with pytest.raises(UsageError, match=r'o/n has no model.safetensors .* name its weights with hf:o/n:FILE'):
        fetch.present('hf:o/n')


def test_through_the_hub_library(server, cache, monkeypatch, tmp_path):
    (tmp_path / 'blob').write_bytes(server.content)
    calls = []

    class EntryNotFoundError(Exception):
        pass

    class GatedRepoError(Exception):
        pass

    def hf_hub_download(repo, file, local_files_only):
        calls.append((repo, file, local_files_only))
        if repo == 'o/gated':
            raise GatedRepoError('403')
        if repo == 'o/down':
            raise ConnectionError('no route\nto host')
        if file != 'model.safetensors':
            raise EntryNotFoundError(file)
        return str(tmp_path / 'blob')

    library = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setattr(fetch, '_hub_library', lambda: library)
    assert fetch.present('hf:o/n') == tmp_path / 'blob'
    assert calls == [('o/n', 'model.safetensors', False), ('o/n', 'config.json', False)]
    with pytest.raises(transfer.MissingError, match=r'o/n has no file y.npz'):
        fetch.present('hf:o/n:y.npz')
    with pytest.raises(UsageError, match=r'o/gated is open to those who accepted its terms .* run `hf auth login`'):
        fetch.present('hf:o/gated:model.safetensors')
    with pytest.raises(
        UsageError, match=r'cannot fetch model.safetensors of o/down \(ConnectionError: no route to host'
    ):
        fetch.present('hf:o/down')
    monkeypatch.setenv('VPT_JAX_OFFLINE', '1')
    with pytest.raises(UsageError, match=r'model.safetensors of o/down is not on this machine and VPT_JAX_OFFLINE'):
        fetch.present('hf:o/down')
    assert not server.asked


def test_addresses(monkeypatch, tmp_path):
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path))
    assert fetch.url('gs://b/a+b/c.npz') == 'https://storage.googleapis.com/b/a%2Bb/c.npz'
    assert fetch.url('hf:o/n') == 'https://huggingface.co/o/n'
    assert fetch.url('hf:o/n:sub/x.npz') == 'https://huggingface.co/o/n/resolve/main/sub/x.npz'
    assert fetch.cached('hf:o/n:sub/x.npz') == tmp_path / 'hf' / 'o' / 'n' / 'sub' / 'x.npz'
    assert fetch.cached('https://host:8/a/../../x.npz?y=1') == tmp_path / 'host_8' / 'a' / 'x.npz'
    assert fetch.cached('gs://b/x.npz') == tmp_path / 'storage.googleapis.com' / 'b' / 'x.npz'
    for address in ('hf:o', 'hf:o/n:../x', 'hf:a/b/c'):
        with pytest.raises(UsageError, match=r'written hf:OWNER/NAME'):
            fetch.url(address)
    with pytest.raises(UsageError, match=r'names no file of a bucket'):
        fetch.url('gs://b/')
    with pytest.raises(UsageError, match=r'names no file'):
        fetch.cached('https://')
