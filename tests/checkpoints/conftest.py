"""A server that does what servers and networks do, and a cache that is filled from it."""

import contextlib
import hashlib
import http.server
import threading
import time

import numpy as np
import pytest

from vpt_jax.checkpoints import fetch, transfer


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
    """The server, with one file, its `content`."""
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as found:
        found.content = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
        found.other, found.sha256 = found.content[::-1], hashlib.sha256(found.content).hexdigest()
        found.files, found.redirects, found.headers = {'/b/x.npz': found.content}, {}, {}
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
    """An empty cache whose buckets and hub are the server."""
    monkeypatch.setenv('VPT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('VPT_JAX_OFFLINE', raising=False)
    monkeypatch.setattr(transfer, 'PAUSES', (0.0, 0.0))
    monkeypatch.setattr(fetch, '_BUCKETS', server.url)
    monkeypatch.setattr(fetch, '_HUB_PAGE', server.url)
    monkeypatch.setattr(fetch, '_hub_library', lambda: None)
    return tmp_path / 'cache'
