"""Opening a weight file of any container; what it is, its bytes say and not its name."""

import hashlib
import os
import re
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path

from vpt_jax.checkpoints import msgpack_file, tensorstore_dir, torch_file
from vpt_jax.checkpoints.npz import NpzSource
from vpt_jax.checkpoints.safetensors_file import SafetensorsSource, ShardedSource
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

_TOWER = re.compile(r'(?P<path>..+):(?P<tower>[A-Za-z_]\w*)')
#: What a folder of the Hugging Face hub holds, the first that is there counts.
_HUB_FILES = ('model.safetensors', 'model.safetensors.index.json', 'flax_model.msgpack', 'pytorch_model.bin')
_SUFFIXES = ('.npz', '.safetensors', '.msgpack')
_START = 512
#: First bytes of what people download instead of weights.
_OTHERS = (
    (re.compile(rb'\x93NUMPY'), 'is a single array; vpt_jax reads .npz files of many'),
    (re.compile(rb'\x89HDF'), 'is an HDF5 file (Keras, TensorFlow), which vpt_jax does not read'),
    (re.compile(rb'\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar', re.DOTALL), 'is packed; unpack it first'),
    (re.compile(rb'version https://git-lfs'), 'is a pointer of Git LFS, not the file: run git lfs pull'),
    (re.compile(rb'\s*<'), 'is a web page, a download that went wrong; download it again'),
)


def opened(path: str | os.PathLike, pickles: bool = False) -> Source:
    """Opens a weight file; use it in a `with` block.

    Args:
      path: a file (`.npz`, `.safetensors`, msgpack), an index of safetensors shards, a checkpoint directory of
        big_vision's (or `NAME.bv` for its last), or a folder with one of these, such as a clone from the hub.
      pickles: whether PyTorch's files are read, by torch in its safe mode; only for `vpt_jax.convert`.

    Raises:
      UsageError: no such file, or not one that vpt_jax reads.
    """
    path = Path(path).expanduser()
    path = tensorstore_dir.last(path) or path
    if path.is_dir():
        if tensorstore_dir.is_checkpoint(path):
            return tensorstore_dir.TensorstoreSource(path)
        path = _inside(path)
    if not path.exists():
        where = '' if path.is_absolute() else f' (looked for {path.absolute()})'
        raise UsageError(f'there is no file {path}{where}')
    start = _start(path)
    pickled = [name for name in _zipped(path, start) if name.endswith('.pkl')]
    if any(name.endswith('constants.pkl') for name in pickled):
        raise UsageError(
            f'{path} is a TorchScript program, not a file of weights (as the .pt files of OpenAI CLIP are): take the '
            'safetensors file of the same model from the Hugging Face hub'
        )
    if pickled or (len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5):  # any pickle since 2003 starts so
        if pickles:
            return torch_file.opened(path)
        raise UsageError(
            f'{path} is a PyTorch pickle, which could run code: convert it once with python -m vpt_jax.convert '
            f"{shlex.quote(str(path))} {shlex.quote(_converted(path))} (needs pip install 'vpt_jax[torch]')"
        )
    if start.startswith(b'PK'):
        return NpzSource(path)
    # Before JSON and msgpack: its first eight bytes are a number.
    if start[8:9] == b'{' and start[4:8] == bytes(4):
        return SafetensorsSource(path)
    if start.lstrip().startswith(b'{'):
        return ShardedSource(path)
    if not start:
        raise UsageError(f'{path} is empty; copy or download it again')
    for pattern, sentence in _OTHERS:
        if pattern.match(start):
            raise UsageError(f'{path} {sentence}')
    if 0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):  # a msgpack map that is not empty
        return msgpack_file.opened(path)
    raise UsageError(f'{path} is no weight file that vpt_jax reads (npz, safetensors, msgpack), whatever its name says')


def split_tower(path: str | os.PathLike) -> tuple[str, str | None]:
    """Splits `file.npz:img`, big_vision's way to name one of the networks in a file, into (path, tower or None).

    A path that exists as it stands is never split.
    """
    path = os.fspath(path)
    found = _TOWER.fullmatch(path)
    if not found or os.path.exists(os.path.expanduser(path)):
        return path, None
    # 'hf:repo' and 'random:B/16' are no files.
    looks_like_a_file = '.' in found['path'] or '/' in found['path'] or os.path.exists(found['path'])
    return (found['path'], found['tower']) if looks_like_a_file else (path, None)


def fingerprint(files: Sequence[Path]) -> str:
    """The sha256 of a source's `files`, in hexadecimal; of several, that of their names and sha256 in order of names.

    It is the same wherever the files lie. Python's lock is free most of the time, so it can run in a thread.

    Raises:
      UsageError: a file cannot be read.
    """
    digests = []
    for path in files:
        try:
            with open(path, 'rb') as file:
                digests.append(hashlib.file_digest(file, 'sha256').hexdigest())
        except OSError as error:
            raise UsageError(f'cannot read {path}: {error.strerror or error}') from error
    if len(digests) == 1:
        return digests[0]
    top = os.path.commonpath([path.parent for path in files])
    lines = sorted(f'{Path(os.path.relpath(f, top)).as_posix()}\0{d}\n' for f, d in zip(files, digests, strict=True))
    return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _start(path: Path) -> bytes:
    try:
        with open(path, 'rb') as file:
            return file.read(_START)
    except OSError as error:
        raise UsageError(f'cannot read {path}: {error.strerror or error}') from error


def _inside(folder: Path) -> Path:
    """The weight file of a folder."""
    for name in _HUB_FILES:
        if (folder / name).exists():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ', '.join(path.name for path in found[:4])
        raise UsageError(f'{folder} is a folder with several weight files ({names}): give one of them')
    raise UsageError(f'{folder} is a folder without a weight file that vpt_jax reads: give the file itself')


def _zipped(path: Path, start: bytes) -> list[str]:
    """The names in a zip archive, [] if it is none or cannot be read."""
    if not start.startswith(b'PK'):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


def _converted(path: Path) -> str:
    return str(path.with_name(f'{path.name.split(".")[0]}.safetensors'))
