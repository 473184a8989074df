"""A weight file, whatever its container: names, shapes and types at once, arrays one by one on demand."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import ml_dtypes
import numpy as np

from vpt_jax.errors import UsageError

#: Where the project's own files keep what they say of themselves: a member of an npz, a key of safetensors' metadata.
ABOUT = '__vpt_jax__'
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Member:
    """One array of a file.

    Attributes:
      name: its name in the file.
      shape, dtype: as stored, bfloat16 recognised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Source:
    """An opened weight file; a context manager that closes it.

    Attributes:
      path: what to call it in messages.
      members: name in the file to `Member`, from headers alone.
      config: settings that lie with the weights (Hugging Face's config.json), {} if there are none.
      about: what the project's own files say of their network (`schemes.canonical`), {} for everybody else's.
      skipped: what else is in the file, by name, and why it is no weight.
      files: the files on disk that make it up, what a checksum is taken of; empty in memory.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        members: Mapping[str, Member],
        config: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        skipped: Mapping[str, str] | None = None,
        files: Iterable[Path] = (),
    ):
        self.path = os.fspath(path)
        self.members = dict(members)
        self.config = dict(config or {})
        self.about = dict(about or {})
        self.skipped = dict(skipped or {})
        self.files = tuple(files)

    def read(self, name: str) -> np.ndarray:
        """The data of a member in its stored type.

        Raises:
          UsageError: the member is damaged or holds values that are not finite.
        """
        array = self._array(self.members[name])
        if array.dtype.kind == 'f' or array.dtype == ml_dtypes.bfloat16:
            with np.errstate(invalid='ignore'):  # signaling NaNs
                finite = np.isfinite(array).all()
            if not finite:
                raise UsageError(f'{self.path}: {name!r} holds values that are not finite; these weights are unusable')
        return array

    def _array(self, member: Member) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ArraySource(Source):
    """Weights that are in memory already; the other arguments are `Source`'s."""

    def __init__(self, arrays: Mapping[str, np.ndarray], path: str | os.PathLike = 'the weights', **others: Any):
        self._arrays = dict(arrays)
        super().__init__(path, {n: Member(n, a.shape, a.dtype) for n, a in self._arrays.items()}, **others)

    def _array(self, member: Member) -> np.ndarray:
        return self._arrays[member.name]


class Part(Source):
    """The members of a file under a prefix, without it: one network of several."""

    def __init__(self, whole: Source, prefix: str):
        self._whole, self._prefix = whole, prefix
        members = {n.removeprefix(prefix): m for n, m in whole.members.items() if n.startswith(prefix)}
        super().__init__(whole.path, members, whole.config, whole.about, whole.skipped, whole.files)

    def read(self, name: str) -> np.ndarray:
        """As the whole file's."""
        return self._whole.read(f'{self._prefix}{name}')

    def close(self) -> None:
        """Closes the whole file."""
        self._whole.close()


def room(member: Member, order: Literal['C', 'F'] = 'C') -> tuple[np.ndarray, memoryview]:
    """An array without values for a member, and its bytes to read them into.

    It lies where jax on a CPU takes an array over instead of copying it: at a multiple of 64.
    """
    size = math.prod(member.shape) * member.dtype.itemsize
    memory = np.empty(size + _ALIGNMENT - 1, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    memory = memory[start : start + size]
    return memory.view(member.dtype).reshape(member.shape, order=order), memoryview(memory)


def json_object(text: str | bytes, path: str | os.PathLike, what: str = 'it') -> dict[str, Any]:
    """A JSON object from a file of other people.

    Raises:
      UsageError: it is not JSON, or not an object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path} is damaged: {what} is not JSON ({error}); copy or download it again') from error
    if not isinstance(found, dict):
        raise UsageError(f'{path} is damaged: {what} is JSON, but not an object; copy or download it again')
    return found


def config_beside(path: Path) -> dict[str, Any]:
    """Hugging Face's settings that lie with a weight file: STEM.hf_config.json, else config.json; {} without.

    Raises:
      UsageError: it cannot be read or is no JSON object.
    """
    for name in (f'{path.name.split(".")[0]}.hf_config.json', 'config.json'):
        beside = path.with_name(name)
        if beside.is_file():
            try:
                return json_object(beside.read_bytes(), beside)
            except OSError as error:
                raise UsageError(f'cannot read {beside}: {error.strerror or error}') from error
    return {}
