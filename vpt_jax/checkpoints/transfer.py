"""One file by https: resumed where it broke, written beside its place and renamed, alone among several programs.

The bytes so far are in `FILE.part`, and `FILE.part.json` says which version of the server's file they belong to (its
ETag and length). A program that downloads holds a lock on `FILE.part`; others that want the same file wait for it.
"""

import base64
import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

from tqdm import tqdm

from vpt_jax.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: Seconds between attempts after a connection broke without a byte of progress.
PAUSES = (1.0, 2.0, 4.0, 8.0)
_TIMEOUT = 30.0
_CHUNK = 1 << 20


class MissingError(UsageError):
    """The server has no such file."""


class _BrokenError(Exception):
    """The connection broke; what has arrived is kept, and trying again makes sense."""


def download(url: str, path: Path, verify: Callable[[Path], None], where: str) -> None:
    """Makes `path` the file at `url`, whole or not at all.

    A bar on stderr shows size, rate and time left. Whatever stops it, the next call goes on from there if the server's
    file is still the same one.

    Args:
      url: https address.
      path: the file to make; missing folders are made.
      verify: looks at the complete file before it takes its place; what it refuses (`UsageError`) is deleted.
      where: what to do by hand instead, 'download X to Y', for messages.

    Raises:
      MissingError: the server has no such file.
      UsageError: no network, no permission, no room, the server refuses, the file is refused.
      KeyboardInterrupt: Ctrl-C, after saying on stderr how to go on.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path) as file:
            if file is None:
                return
            _fill(file, url, path, where)
            os.fsync(file.fileno())
            part = Path(file.name)
            try:
                verify(part)
            except UsageError:
                _forget(part)
                raise
            os.replace(part, path)
            _forget(part)
    except KeyboardInterrupt:
        print(f'stopped; the same command goes on from where it was, or {where}', file=sys.stderr, flush=True)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _no_room(path, 0, where)
        raise UsageError(f'cannot write {path} ({error.strerror or error}): {where}') from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[BinaryIO | None]:
    """The file of the bytes so far, locked; None if another program finished the download while this one waited.

    Where files cannot be locked, it is one of this program's own, and starts empty.
    """
    part, told = path.with_name(f'{path.name}.part'), False
    while True:
        with open(part, 'ab+') as file:
            try:
                _lock(file, wait=told)
            except BlockingIOError:
                print(f'another program is downloading {path}; waiting for it', file=sys.stderr, flush=True)
                told = True
                continue
            except OSError:
                part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
                with open(part, 'ab+') as own:
                    yield own
                return
            if path.exists():
                with contextlib.suppress(OSError):
                    if not os.path.getsize(part):
                        part.unlink()  # the one that opening has just made
                yield None
                return
            if _is_at(file, part):
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has its name: a lock is on the file, whatever it is called by now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO, wait: bool) -> None:
    """Locks an open file until it is closed; raises `BlockingIOError` if another program has it, or `OSError`."""
    if fcntl is None:
        raise OSError(errno.ENOLCK, 'files cannot be locked')
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _fill(file: BinaryIO, url: str, path: Path, where: str) -> None:
    """Appends to `file` until it is the whole of `url`."""
    reached, failures = False, 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            _attempt(file, url, path, where)
            return
        except _BrokenError as error:
            progress = file.seek(0, os.SEEK_END) > before
            reached = reached or progress
            failures = 0 if progress else failures + 1
            host = urlsplit(url).hostname
            if isinstance(error.__cause__, urllib.error.URLError) and not reached:
                raise UsageError(f'cannot reach {host} ({error}): {where}') from error
            if failures > len(PAUSES):
                raise UsageError(
                    f'the connection to {host} breaks again and again ({error}): the same command goes on from where '
                    f'it was, or {where}'
                ) from error
            time.sleep(PAUSES[max(failures - 1, 0)])


def _attempt(file: BinaryIO, url: str, path: Path, where: str) -> None:
    """One request, for what is missing."""
    notes = Path(f'{file.name}.json')
    have, known = file.seek(0, os.SEEK_END), _read_notes(notes, url)
    if have and not known:
        have = file.truncate(0)
    if have and have == known['length']:
        return
    headers = {'User-Agent': 'vpt_jax', 'Accept-Encoding': 'identity'}
    if have:
        headers['Range'] = f'bytes={have}-'
        if known['etag'] and not known['etag'].startswith('W/'):
            headers['If-Range'] = known['etag']
    redirects = _Redirects()
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.build_opener(redirects).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is here is no beginning of what the server has
            file.truncate(0)
            raise _BrokenError('the file on the server has changed') from None
        _refused(error, url, where)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from error
    with response:
        have, total = _start(file, response, have, known, path)
        etag = response.headers.get('ETag', '')
        notes.write_text(json.dumps({'url': url, 'etag': etag, 'length': total}))
        if total is not None and total - have > shutil.disk_usage(path.parent).free:
            _no_room(path, total - have, where)
        _copy(file, response, have, total, path.name)
        promised = _promised(response.headers, redirects.headers)
    if promised and _digest(file, promised[0]) != promised[1]:
        file.truncate(0)
        raise _BrokenError('what arrived is not what the server sent')


def _start(file: BinaryIO, response: Any, have: int, known: dict, path: Path) -> tuple[int, int | None]:
    """(Bytes that are here and stay, length of the whole file or None) as the answer says."""
    length = response.headers.get('Content-Length')
    if response.status == 206:
        found = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', response.headers.get('Content-Range', ''))
        same = response.headers.get('ETag', '') == known['etag']
        if found and int(found[1]) == have and same and found[2] == str(known['length']):
            print(f'going on with {path.name} from {_size(have)} of {_size(known["length"])}', file=sys.stderr)
            return have, known['length']
        file.truncate(0)
        raise _BrokenError('the file on the server has changed')
    if have:
        print(f'{path.name} has changed on the server: starting again', file=sys.stderr, flush=True)
        file.truncate(0)
    return 0, int(length) if length and length.isdigit() else None


def _copy(file: BinaryIO, response: Any, have: int, total: int | None, name: str) -> None:
    """Appends the answer's body to `file`."""
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, initial=have, unit='B', unit_scale=True, unit_divisor=1024, desc=name, dynamic_ncols=True,
              mininterval=10 if quiet else 0.1, delay=2 if quiet else 0) as bar:  # fmt: skip
        while True:
            try:
                data = response.read(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenError(_reason(error)) from error
            if not data:
                break
            file.write(data)
            bar.update(len(data))
        file.flush()
    arrived = file.seek(0, os.SEEK_END)
    if total is not None and arrived != total:
        if arrived > total:
            file.truncate(0)
        raise _BrokenError(f'{_size(arrived)} of {_size(total)} arrived')


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps their headers: the hub's first answer has the hash, its storage the bytes."""

    def __init__(self):
        self.headers: list[Message] = []

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.headers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _promised(headers: Message, redirects: list[Message]) -> tuple[str, str] | None:
    """(kind, hexadecimal digest) of the file as the server states it: Google's md5, or the hub's sha256."""
    for value in headers.get_all('x-goog-hash') or []:
        for item in value.split(','):
            kind, _, digest = item.strip().partition('=')
            with contextlib.suppress(ValueError):
                if kind == 'md5':
                    return 'md5', base64.b64decode(digest, validate=True).hex()
    for message in redirects:
        tag = (message.get('X-Linked-ETag') or '').strip('"')
        if re.fullmatch('[0-9a-f]{64}', tag):
            return 'sha256', tag
    return None


def _digest(file: BinaryIO, kind: str) -> str:
    file.seek(0)
    return hashlib.file_digest(file, kind).hexdigest()


def _refused(error: urllib.error.HTTPError, url: str, where: str) -> NoReturn:
    if error.code in (404, 410):
        raise MissingError(f'there is no file {url} (answer {error.code}); if it has moved, {where}') from error
    if error.code in (401, 403) and urlsplit(url).hostname == 'huggingface.co':
        raise UsageError(
            f'{url} is open to those who accepted its terms: accept them there, pip install huggingface_hub, run '
            f'`hf auth login` and try again, or {where}'
        ) from error
    if error.code == 429 or error.code >= 500:
        raise _BrokenError(f'answer {error.code} {error.reason}') from None
    raise UsageError(f'{urlsplit(url).hostname} answers {error.code} {error.reason}: {where}') from error


def _no_room(path: Path, needed: int, where: str) -> NoReturn:
    free = shutil.disk_usage(path.parent).free
    need = f'{_size(needed)} more are needed' if needed else 'the disk is full'
    raise UsageError(
        f'there is no room for {path.name}: {need} and {_size(free)} are free in {path.parent}; make room or set '
        f'VPT_JAX_CACHE to a folder elsewhere, or {where}'
    )


def _reason(error: Exception) -> str:
    reason = getattr(error, 'reason', None) or error
    if isinstance(reason, (TimeoutError, socket.timeout)):
        return f'no answer for {_TIMEOUT:.0f} s'
    return getattr(reason, 'strerror', None) or str(reason) or type(reason).__name__


def _read_notes(notes: Path, url: str) -> dict:
    """What the bytes so far belong to; {} if that is not known."""
    try:
        known = json.loads(notes.read_text())
        return known if known['url'] == url and known['length'] and isinstance(known['etag'], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _forget(part: Path) -> None:
    for file in (part, Path(f'{part}.json')):
        file.unlink(missing_ok=True)


def _size(count: int) -> str:
    return f'{count / 2**20:.0f} MiB' if count >= 10 * 2**20 else f'{count / 2**20:.1f} MiB'
