"""Downloads that break, meet other programs, or find another file than before."""

import base64
import concurrent.futures
import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vpt_jax.checkpoints import fetch, transfer
from vpt_jax.errors import UsageError


def get(**kwargs):
    return fetch.present('gs://b/x.npz', **kwargs)


def leftovers(folder):
    return sorted(p.name for p in folder.rglob('*') if '.part' in p.name or p.name.startswith('.'))


def test_a_file_is_downloaded_once(server, cache, capsys):
    path = get(about='the licence')
    assert path.read_bytes() == server.content and not leftovers(cache)
    assert 'the licence' in capsys.readouterr().err
    assert get() == path and len(server.asked) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(server, cache):
    server.cuts = [120_000, 50_000]
    assert get().read_bytes() == server.content
    assert [asked for _, asked, _ in server.asked] == [None, 'bytes=120000-', 'bytes=170000-']
    assert server.asked[1][2] == f'"{hashlib.md5(server.content).hexdigest()}"'


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
    assert get().read_bytes() == server.content and server.asked[-1][1] == 'bytes=100000-'
    assert 'going on with x.npz from 0.1 MiB of 0.3 MiB' in capsys.readouterr().err


@pytest.mark.parametrize('heeds_if_range', [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, cache, monkeypatch, heeds_if_range):
    server.cuts, server.heeds_if_range = [120_000] * 4, heeds_if_range
    monkeypatch.setattr(transfer, 'PAUSES', (0.0,))
    server.statuses = [None, 503, 503]
    with pytest.raises(UsageError, match=r'breaks again and again'):
        get()
    server.cuts, server.files['/b/x.npz'] = [], server.other
    assert get().read_bytes() == server.other and not leftovers(cache)


def test_a_file_that_shrank_meanwhile_is_fetched_anew(server, cache, monkeypatch):
    server.cuts, server.statuses, server.heeds_if_range = [200_000], [None, 503, 503], False
    monkeypatch.setattr(transfer, 'PAUSES', (0.0,))
    with pytest.raises(UsageError):
        get()
    server.files['/b/x.npz'] = server.content[:1000]
    assert get().read_bytes() == server.content[:1000]


def test_a_server_without_ranges(server, cache):
    server.ranges, server.cuts = False, [120_000]
    assert get().read_bytes() == server.content


def test_bytes_of_another_download_are_not_taken_up(server, cache):
    part = cache / 'x.npz.part'
    cache.mkdir()
    part.write_bytes(server.other[:1000])
    assert fetch.present('gs://b/x.npz', cache / 'x.npz').read_bytes() == server.content
    part.write_bytes(server.other[:1000])
    part.with_name('x.npz.part.json').write_text(json.dumps({'url': 'http://elsewhere', 'etag': '"a"', 'length': 2000}))
    (cache / 'x.npz').unlink()
    assert fetch.present('gs://b/x.npz', cache / 'x.npz').read_bytes() == server.content and not leftovers(cache)


def test_what_arrives_is_compared_with_what_the_server_says(server, cache):
    wrong = base64.b64encode(hashlib.md5(server.other).digest()).decode()
    server.headers = {'x-goog-hash': f'crc32c=AAAAAA==,md5={wrong}'}
    with pytest.raises(UsageError, match=r'what arrived is not what the server sent'):
        get()
    server.headers = {'x-goog-hash': f'md5={base64.b64encode(hashlib.md5(server.content).digest()).decode()}'}
    assert get().read_bytes() == server.content


def test_the_hub_says_the_hash_before_it_redirects(server, cache):
    address = '/o/n/resolve/main/model.safetensors'
    server.redirects, server.files = {address: '/cdn/1'}, {'/cdn/1': server.content}
    server.headers = {'X-Linked-ETag': f'"{hashlib.sha256(server.other).hexdigest()}"'}
    with pytest.raises(UsageError, match=r'what arrived is not what the server sent'):
        fetch.present('hf:o/n:model.safetensors')
    server.headers = {'X-Linked-ETag': f'"{server.sha256}"'}
    assert fetch.present('hf:o/n:model.safetensors').read_bytes() == server.content


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
    assert get().read_bytes() == server.content


def test_no_network(server, cache, monkeypatch):
    with http.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler) as gone:
        port = gone.server_port
    monkeypatch.setattr(fetch, '_BUCKETS', f'http://127.0.0.1:{port}')
    path = fetch.cached('gs://b/x.npz')
    with pytest.raises(UsageError, match=rf'cannot reach 127.0.0.1 \(Connection refused\): download .* to {path}'):
        get()


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
    assert get().read_bytes() == server.content


def test_a_folder_that_cannot_be_written_to(server, cache):
    cache.parent.joinpath('file').write_text('')
    with pytest.raises(UsageError, match=r'cannot write .* download .* to .*file/x.npz'):
        fetch.present('gs://b/x.npz', cache.parent / 'file' / 'x.npz')


def test_many_want_the_same_file(server, cache):
    server.pause = 0.01
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: get(), range(4)))
    assert {path.read_bytes() for path in paths} == {server.content} and not leftovers(cache)
    assert server.asked == [('/b/x.npz', None, None)]


def test_where_files_cannot_be_locked(server, cache, monkeypatch):
    server.pause = 0.01
    monkeypatch.setattr(transfer, 'fcntl', None)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: get(), range(2)))
    assert {path.read_bytes() for path in paths} == {server.content} and leftovers(cache) in ([], ['x.npz.part'])


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
            assert path.result().read_bytes() == server.content and not leftovers(cache)
    assert 'another program is downloading' in capsys.readouterr().err
    (_, first, _), (_, second, _) = server.asked
    assert first is None and int(second.removeprefix('bytes=').rstrip('-')) >= 50_000
