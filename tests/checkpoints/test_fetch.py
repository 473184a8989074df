"""Downloads, against a server that does what servers and networks do."""

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from vpt_jax.checkpoints import fetch, transfer
from vpt_jax.errors import UsageError

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
OTHER = CONTENT[::-1]
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; the server's other attributes say what goes wrong."""

    def do_GET(self):
        server, name = self.server, self.path
        asked, unless = self.headers.get('Range'), self.headers.get('If-Range')
        server.asked.append((name, asked, unless))
        if name in server.redirects:
            self.send_response(302)
            self.send_header('Location', server.redirects[name])
            for header in server.headers.items():
                self.send_header(*header)
            self.end_headers()
            return
        status = server.statuses.pop(0) if server.statuses else None
        if status or name not in server.files:
            self.send_error(status or 404)
            return
        data, tag = server.files[name], f'"{hashlib.md5(server.files[name]).hexdigest()}"'
        start = 0
        if asked and server.ranges and (not server.heeds_if_range or unless in (None, tag)):
            start = int(asked.removeprefix('bytes=').rstrip('-'))
        if start >= len(data) and start:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', len(data) - start)
        self.send_header('ETag', tag)
        for header in server.headers.items():
            self.send_header(*header)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.send(data[start:])

    def send(self, data):
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        for i in range(0, len(data if cut is None else data[:cut]), 10_000):
            self.wfile.write(data[i : min(i + 10_000, len(data) if cut is None else cut)])
            time.sleep(self.server.pause)
            self.server.sent += 10_000
        if cut is not None:
            self.close_connection = True
            self.connection.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as found:
        found.files, found.redirects, found.headers = {'/b/x.npz': CONTENT}, {}, {}
        found.cuts, found.statuses, found.asked = [], [], []
        found.ranges = found.heeds_if_range = True
        found.pause, found.sent = 0.0, 0
        found.url = f'http://127.0.0.1:{found.server_port}'
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        found.shutdown()
        found.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch, server):
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('VPT_JAX_OFFLINE', raising=False)
    monkeypatch.setattr(transfer, 'PAUSES', (0.0, 0.0))
    monkeypatch.setattr(fetch, '_BUCKETS', server.url)
    monkeypatch.setattr(fetch, '_HUB_PAGE', server.url)
    monkeypatch.setattr(fetch, '_hub_library', lambda: None)
    return tmp_path / 'cache'


def get(**kwargs):
    return fetch.present('gs://b/x.npz', **kwargs)


def leftovers(folder):
    return sorted(p.name for p in folder.rglob('*') if '.part' in p.name or p.name.startswith('.'))


def test_a_file_is_downloaded_once(server, cache, capsys):
    path = get(about='the licence')
    assert path.read_bytes() == CONTENT and not leftovers(cache)
    assert 'the licence' in capsys.readouterr().err
    assert get() == path and len(server.asked) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(server, cache):
    server.cuts = [120_000, 50_000]
    assert get().read_bytes() == CONTENT
    assert [asked for _, asked, _ in server.asked] == [None, 'bytes=120000-', 'bytes=170000-']
    assert server.asked[1][2] == f'"{hashlib.md5(CONTENT).hexdigest()}"'


def test_ctrl_c_says_how_to_go_on(server, cache, capsys, monkeypatch):
    monkeypatch.setattr(transfer, '_CHUNK', 100_000)
    update = transfer.tqdm.update

    def interrupted(bar, n):
        update(bar, n)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transfer.tqdm, 'update', interrupted)
        get()
    path = fetch.cached('gs://b/x.npz')
    assert f'goes on from where it was, or download {server.url}/b/x.npz to {path}' in capsys.readouterr().err
    assert not path.exists()
    assert get().read_bytes() == CONTENT and server.asked[-1][1] == 'bytes=100000-'
    assert 'going on with x.npz from 0.1 MiB of 0.3 MiB' in capsys.readouterr().err


@pytest.mark.parametrize('heeds_if_range', [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, cache, monkeypatch, heeds_if_range):
    server.cuts, server.heeds_if_range = [120_000] * 4, heeds_if_range
    monkeypatch.setattr(transfer, 'PAUSES', (0.0,))
    server.statuses = [None, 503, 503]
    with pytest.raises(UsageError, match=r'breaks again and again'):
        get()
    server.cuts, server.files['/b/x.npz'] = [], OTHER
    assert get().read_bytes() == OTHER and not leftovers(cache)


def test_a_file_that_shrank_meanwhile_is_fetched_anew(server, cache, monkeypatch):
    server.cuts, server.statuses, server.heeds_if_range = [200_000], [None, 503, 503], False
    monkeypatch.setattr(transfer, 'PAUSES', (0.0,))
    with pytest.raises(UsageError):
        get()
    server.files['/b/x.npz'] = CONTENT[:1000]
    assert get().read_bytes() == CONTENT[:1000]


def test_a_server_without_ranges(server, cache):
    server.ranges, server.cuts = False, [120_000]
    assert get().read_bytes() == CONTENT


def test_bytes_of_another_download_are_not_taken_up(server, cache):
    part = cache / 'x.npz.part'
    cache.mkdir()
    part.write_bytes(OTHER[:1000])
    assert fetch.present('gs://b/x.npz', cache / 'x.npz').read_bytes() == CONTENT
    part.write_bytes(OTHER[:1000])
    part.with_name('x.npz.part.json').write_text(json.dumps({'url': 'http://elsewhere', 'etag': '"a"', 'length': 2000}))
    (cache / 'x.npz').unlink()
    assert fetch.present('gs://b/x.npz', cache / 'x.npz').read_bytes() == CONTENT and not leftovers(cache)


@pytest.mark.parametrize('known', ['md5:' + '0' * 6, 'sha256:' + SHA256[::-1]])
def test_another_file_than_the_published_one(server, cache, known):
    with pytest.raises(UsageError, match=r'not the file that was published, whose .* starts with .*; nothing was kept'):
        get(known=known)
    assert not list(cache.rglob('x.npz*'))
    assert get(known=f'sha256:{SHA256[:8]}').exists()


def test_what_arrives_is_compared_with_what_the_server_says(server, cache):
    wrong = base64.b64encode(hashlib.md5(OTHER).digest()).decode()
    server.headers = {'x-goog-hash': f'crc32c=AAAAAA==,md5={wrong}'}
    with pytest.raises(UsageError, match=r'what arrived is not what the server sent'):
        get()
    server.headers = {'x-goog-hash': f'md5={base64.b64encode(hashlib.md5(CONTENT).digest()).decode()}'}
    assert get().read_bytes() == CONTENT


def test_the_hub_says_the_hash_before_it_redirects(server, cache):
    address = '/o/n/resolve/main/model.safetensors'
    server.redirects, server.files = {address: '/cdn/1'}, {'/cdn/1': CONTENT}
    server.headers = {'X-Linked-ETag': f'"{hashlib.sha256(OTHER).hexdigest()}"'}
    with pytest.raises(UsageError, match=r'what arrived is not what the server sent'):
        fetch.present('hf:o/n:model.safetensors')
    server.headers = {'X-Linked-ETag': f'"{SHA256}"'}
    assert fetch.present('hf:o/n:model.safetensors').read_bytes() == CONTENT


def test_a_download_that_is_not_what_it_was(server, cache):
    path = get()
    fetch.check(path, SHA256)
    path.unlink()
    server.files['/b/x.npz'] = OTHER
    pin = path.with_name('x.npz.sha256')
    with pytest.raises(UsageError, match=rf'is not the file that it was: .* and {pin} says {SHA256}.*delete the note'):
        get()
    pin.unlink()
    assert get().read_bytes() == OTHER


def test_a_local_file_is_pinned(tmp_path):
    path = tmp_path / 'x.npz'
    path.write_bytes(CONTENT)
    with pytest.raises(UsageError, match=f'{path} is not the published file, whose md5 starts with 0123'):
        fetch.check(path, SHA256, 'md5:0123')
    fetch.check(path, SHA256, f'md5:{hashlib.md5(CONTENT).hexdigest()[:6]}')
    assert fetch.pin_of(path).read_text().strip() == SHA256
    fetch.check(path, SHA256)
    with pytest.raises(UsageError, match=r'has changed since it was first used'):
        fetch.check(path, hashlib.sha256(OTHER).hexdigest())


@pytest.mark.parametrize(('status', 'message'), [
    (404, 'there is no file .*/b/x.npz .answer 404.; if it has moved, download'),
    (403, '127.0.0.1 answers 403 .*: download .* to .*x.npz'),
    (500, r'breaks again and again \(answer 500 .*\): the same command goes on .*, or download'),
])  # fmt: skip
def test_refusals(server, cache, status, message):
    server.statuses = [status] * 5
    with pytest.raises(UsageError, match=message):
        get()
    assert len(server.asked) == (3 if status == 500 else 1)


def test_a_server_that_was_busy(server, cache):
    server.statuses = [503, 429]
    assert get().read_bytes() == CONTENT


def test_no_network(server, cache, monkeypatch):
    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as gone:
        port = gone.server_port
    monkeypatch.setattr(fetch, '_BUCKETS', f'http://127.0.0.1:{port}')
    path = fetch.cached('gs://b/x.npz')
    with pytest.raises(UsageError, match=rf'cannot reach 127.0.0.1 \(Connection refused\): download .* to {path}'):
        get()


@pytest.mark.parametrize(('value', 'refused'), [('1', True), ('true', True), ('0', False), ('', False)])
def test_offline(server, cache, monkeypatch, value, refused):
    monkeypatch.setenv('VPT_JAX_OFFLINE', value)
    if not refused:
        assert get().read_bytes() == CONTENT
        return
    where = f'download {server.url}/b/x.npz to {fetch.cached("gs://b/x.npz")}'
    with pytest.raises(UsageError, match=f'x.npz is not on this machine and VPT_JAX_OFFLINE is set: {where}'):
        get()
    assert not server.asked and not cache.exists()


def test_no_room(server, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda folder: usage._replace(free=1000))
        with pytest.raises(UsageError, match=r'no room for x.npz: 0.3 MiB more .* 0.0 MiB are free .* VPT_JAX_CACHE'):
            get()

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(UsageError, match=r'no room for x.npz: the disk is full .* or download .* to .*x.npz'):
            get()
    assert get().read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_to(server, cache):
    cache.parent.joinpath('file').write_text('')
    with pytest.raises(UsageError, match=r'cannot write .* download .* to .*file/x.npz'):
        fetch.present('gs://b/x.npz', cache.parent / 'file' / 'x.npz')


def test_many_want_the_same_file(server, cache):
    server.pause = 0.01
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: get(), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT} and not leftovers(cache)
    assert server.asked == [('/b/x.npz', None, None)]


def test_one_that_waits_goes_on_when_the_other_is_killed(server, cache, capsys):
    server.pause = 0.05
    code = (
        'from vpt_jax.checkpoints import fetch, transfer; transfer._CHUNK = 10_000; '
        f'fetch._BUCKETS = {server.url!r}; fetch.present("gs://b/x.npz")'
    )
    with subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL) as program:
        while server.sent < 100_000:
            time.sleep(0.02)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            path = pool.submit(get)
            time.sleep(0.2)
            program.send_signal(signal.SIGKILL)
            server.pause = 0.0
            assert path.result().read_bytes() == CONTENT and not leftovers(cache)
    assert 'another program is downloading' in capsys.readouterr().err
    (_, first, _), (_, second, _) = server.asked
    assert first is None and int(second.removeprefix('bytes=').rstrip('-')) >= 50_000


def test_a_repository_of_the_hub(server, cache):
    root = '/o/n/resolve/main'
    server.files = {f'{root}/model.safetensors': CONTENT, f'{root}/config.json': b'{}'}
    path = fetch.present('hf:o/n')
    assert path == cache / 'hf' / 'o' / 'n' / 'model.safetensors' and path.read_bytes() == CONTENT
    assert path.with_name('config.json').read_bytes() == b'{}'
    asked = len(server.asked)
    assert fetch.present('hf:o/n') == path and len(server.asked) == asked


def test_shards_of_the_hub(server, cache):
    root = '/o/n/resolve/main'
    index = json.dumps({'weight_map': {'a': 'model-1.safetensors', 'b': 'model-2.safetensors'}}).encode()
    server.files = {f'{root}/model.safetensors.index.json': index, f'{root}/model-1.safetensors': CONTENT}
    with pytest.raises(UsageError, match=r'no file .*model-2.safetensors'):
        fetch.present('hf:o/n')
    server.files[f'{root}/model-2.safetensors'] = OTHER
    path = fetch.present('hf:o/n')
    assert path.name == 'model.safetensors.index.json'
    assert path.with_name('model-2.safetensors').read_bytes() == OTHER


@pytest.mark.parametrize('index', ['{"weight_map": {"a": "../x.safetensors"}}', '[]', '{'])
def test_an_index_that_is_no_list_of_shards(server, cache, index):
    server.files = {'/o/n/resolve/main/model.safetensors.index.json': index.encode()}
    with pytest.raises(UsageError, match=r'outside of its folder|lists no shards'):
        fetch.present('hf:o/n')


def test_a_repository_with_pickles_only(server, cache):
    with pytest.raises(UsageError, match=r'o/n has no model.safetensors .* name its weights with hf:o/n:FILE'):
        fetch.present('hf:o/n')


def test_through_the_hub_library(server, cache, monkeypatch, tmp_path):
    (tmp_path / 'blob').write_bytes(CONTENT)
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
