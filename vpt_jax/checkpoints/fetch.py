"""Published weight files from the internet into the cache: resumed, verified, and safe when two programs want one.

An address is `https://...`, `gs://bucket/file` (public buckets answer https without credentials), or
`hf:owner/name[:file]` (the Hugging Face hub). What was downloaded is pinned: its sha256 lies beside it in
`FILE.sha256`, and a file that is another one later is refused.
"""

import contextlib
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vpt_jax.checkpoints import atomic, transfer
from vpt_jax.errors import UsageError

_BUCKETS, _HUB_PAGE = 'https://storage.googleapis.com', 'https://huggingface.co'
_HUB = re.compile(r'hf:([\w.-]+/[\w.-]+)(?::(.+))?')
#: What a repository of the hub may hold, in the order in which it is looked for. No format that can run code.
HUB_FILES = ('model.safetensors', 'model.safetensors.index.json', 'flax_model.msgpack')
_HUB_CONFIG = 'config.json'


def cache_folder() -> Path:
    """Where downloaded weights lie: $VPT_JAX_CACHE, else ~/.cache/vpt_jax."""
    return Path(os.environ.get('VPT_JAX_CACHE') or Path.home() / '.cache' / 'vpt_jax').expanduser()


def offline() -> bool:
    """Whether $VPT_JAX_OFFLINE forbids the network."""
    return os.environ.get('VPT_JAX_OFFLINE', '').lower() not in ('', '0', 'false', 'no')


def is_address(text: str) -> bool:
    """Whether this names a file on the internet rather than here."""
    return text.startswith(('hf:', 'gs://', 'https://', 'http://'))


def url(address: str) -> str:
    """The https address of a file; of a whole repository of the hub, its page.

    Raises:
      UsageError: not an address, or one that names no file.
    """
    if address.startswith('hf:'):
        repo, file = hub_parts(address)
        return f'{_HUB_PAGE}/{repo}' + (f'/resolve/main/{quote(file)}' if file else '')
    if address.startswith('gs://'):
        bucket, _, name = address.removeprefix('gs://').partition('/')
        if not bucket or not name or name.endswith('/'):
            raise UsageError(f'{address} names no file of a bucket: write gs://BUCKET/FILE')
        return f'{_BUCKETS}/{bucket}/{quote(name)}'
    return address


def cached(address: str) -> Path:
    """Where in the cache a file lies, or a repository of the hub.

    Raises:
      UsageError: not an address, or one that names no file.
    """
    if address.startswith('hf:'):
        repo, file = hub_parts(address)
        return cache_folder() / 'hf' / repo / file
    host, *parts = re.sub(r'^https?://', '', url(address).split('?')[0]).split('/')
    parts = [part for part in parts if part not in ('', '.', '..')]
    if not parts:
        raise UsageError(f'{address} names no file')
    return cache_folder() / re.sub(r'[^\w.-]', '_', host) / Path(*parts)


def hub_parts(address: str) -> tuple[str, str]:
    """(repository, file or '') of `hf:owner/name[:file]`.

    Raises:
      UsageError: another form.
    """
    found = _HUB.fullmatch(address)
    if not found or '..' in (found[2] or '').split('/'):
        raise UsageError(f'cannot read {address!r}: files of the hub are written hf:OWNER/NAME or hf:OWNER/NAME:FILE')
    return found[1], found[2] or ''


def present(address: str, path: Path | None = None, known: str = '', about: str = '') -> Path:
    """The local copy of a published file, downloaded if it is not there.

    Args:
      address: where it is published.
      path: where to keep it; None for `cached(address)`.
      known: what its digest is or starts with, 'sha256:...' or 'md5:...'; '' if nobody said.
      about: what to say before a download, such as the licence.

    Returns:
      The file; of a repository of the hub without a file's name, its weights: a file, or an index of shards.

    Raises:
      UsageError: it is not here and cannot be fetched, or is another file; the message says what to put where.
      KeyboardInterrupt: after saying where the download can go on.
    """
    path = cached(address) if path is None else path
    if not address.startswith('hf:'):
        return path if path.exists() else _download(address, path, known, about)
    repo, file = hub_parts(address)
    if file:
        return path if path.exists() else _from_hub(repo, file, path, known, about)
    for name in HUB_FILES:
        if (path / name).exists():
            return _complete(repo, path / name)
    for name in HUB_FILES:
        try:
            found = _from_hub(repo, name, path / name, '', about)
        except transfer.MissingError:
            continue
        with contextlib.suppress(transfer.MissingError):
            _from_hub(repo, _HUB_CONFIG, path / _HUB_CONFIG, '', '')
        return _complete(repo, found)
    raise UsageError(
        f'{repo} has no {" or ".join(HUB_FILES)}: name its weights with hf:{repo}:FILE, or download them from '
        f'{url(f"hf:{repo}")} and, if they are a PyTorch pickle, run python -m vpt_jax.convert FILE OUT.safetensors'
    )


def instructions(address: str, path: Path) -> str:
    """What to do by hand to have a file: the end of a sentence."""
    return f'download {url(address)} to {path}'


def check(path: Path, sha256: str, known: str = '', pin: Path | None = None) -> None:
    """Refuses a weight file that is not the one it should be; the first time, pins what it is.

    Args:
      path: the file.
      sha256: its own.
      known: what its digest is or starts with, 'sha256:...' or 'md5:...'; '' if nobody said.
      pin: where its sha256 was or will be noted; None for beside it.

    Raises:
      UsageError: it is another file.
    """
    pin = pin or pin_of(path)
    pinned = _pinned(pin)
    if pinned and sha256 != pinned:
        raise UsageError(f'{path} has changed since it was first used: its sha256 is {sha256}, and {pin} says '
                         f'{pinned}; delete it to have it downloaded again, or delete the note if the change was '
                         'meant')  # fmt: skip
    if pinned:
        return
    if not _matches(path, known):
        raise UsageError(f'{path} is not the published file, whose {_stated(known)}; delete it to have it downloaded '
                         'again')  # fmt: skip
    # A cache that cannot be written to can be read from.
    with contextlib.suppress(UsageError), atomic.replacing(pin) as file:
        file.write(f'{sha256}\n'.encode())


def digest(path: str | os.PathLike, kind: str = 'sha256') -> str:
    """Hexadecimal digest of a file.

    Raises:
      UsageError: it cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, kind).hexdigest()
    except OSError as error:
        raise UsageError(f'cannot read {path}: {error.strerror or error}') from error


def pin_of(path: Path) -> Path:
    """The file beside a downloaded one that holds its sha256."""
    return path.with_name(f'{path.name}.sha256')


def _pinned(pin: Path) -> str:
    try:
        return pin.read_text().strip()
    except OSError:
        return ''


def _matches(path: Path, known: str) -> bool:
    kind, _, start = known.partition(':')
    return not known or digest(path, kind).startswith(start)


def _stated(known: str) -> str:
    return '{} starts with {}'.format(*known.split(':'))


def _download(address: str, path: Path, known: str, about: str) -> Path:
    """One file by https."""
    where = instructions(address, path)
    if offline():
        raise UsageError(f'{path.name} is not on this machine and VPT_JAX_OFFLINE is set: {where}')

    def verify(part: Path) -> None:
        if not _matches(part, known):
            raise UsageError(f'{url(address)} is not the file that was published, whose {_stated(known)}; nothing was '
                             'kept')  # fmt: skip
        pin = pin_of(path)
        if _pinned(pin) not in ('', sha256 := digest(part)):
            raise UsageError(f'{url(address)} is not the file that it was: its sha256 is {sha256}, and {pin} says '
                             f'{_pinned(pin)}; nothing was kept; delete the note to accept the new one')  # fmt: skip

    if about:
        print(about, file=sys.stderr, flush=True)
    transfer.download(url(address), path, verify, where)
    return path


def _from_hub(repo: str, file: str, path: Path, known: str, about: str) -> Path:
    """One file of a repository: through huggingface_hub where it is installed (gated files, its cache), else https.

    Raises:
      transfer.MissingError: the repository has no such file.
    """
    address = f'hf:{repo}:{file}'
    hub = _hub_library()
    if hub is None:
        return _download(address, path, known, about)
    where = instructions(address, path)
    try:
        return Path(hub.hf_hub_download(repo, file, local_files_only=offline()))
    except KeyboardInterrupt:
        print(f'stopped; the same command goes on from there, or {where}', file=sys.stderr, flush=True)
        raise
    except Exception as error:  # the library's own classes, and those of its http client
        kind = type(error).__name__
        if kind in ('EntryNotFoundError', 'RemoteEntryNotFoundError'):
            raise transfer.MissingError(f'{repo} has no file {file}: see {url(f"hf:{repo}")}') from error
        if kind == 'GatedRepoError':
            raise UsageError(f'{repo} is open to those who accepted its terms at {url(f"hf:{repo}")}: do that, then '
                             f'run `hf auth login`, or {where}') from error  # fmt: skip
        if offline():
            raise UsageError(f'{file} of {repo} is not on this machine and VPT_JAX_OFFLINE is set: {where}') from error
        reason = ' '.join(str(error).split())[:200]
        raise UsageError(f'cannot fetch {file} of {repo} ({kind}: {reason}): try again, or {where}') from error


def _hub_library() -> Any:
    try:
        return importlib.import_module('huggingface_hub')
    except ImportError:
        return None


def _complete(repo: str, found: Path) -> Path:
    """`found`, with the shards that it lists beside it."""
    if found.name.endswith('.index.json'):
        for shard in _shards(found):
            if not (found.parent / shard).exists():
                _from_hub(repo, shard, cached(f'hf:{repo}:{shard}'), '', '')
    return found


def _shards(index: Path) -> Iterable[str]:
    try:
        names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f'{index} is damaged: it lists no shards; delete it and download it again') from error
    if any(not isinstance(name, str) or not re.fullmatch(r'[\w.-]+', name) or '..' in name for name in names):
        raise UsageError(f'{index} names a shard outside of its folder')
    return names
