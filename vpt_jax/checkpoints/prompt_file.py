"""The prompt file: what a user saves after training and sends to somebody with the same backbone.

A folder with two files. `prompt.safetensors` holds the arrays, named `prompts/...` and `state/...` with the dicts' keys
joined by '/'; `prompt.json` says what they are and carries the sha256 of the first, so that a mixed pair is refused.
Nothing in either is ever executed.

Pytrees are nested dicts with non-empty string keys without '/', arrays at the leaves; lists, tuples and None are not
accepted. Layers of different shapes are a dict too: `{'0': ..., '1': ...}`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from vpt_jax.checkpoints import atomic, safetensors_file
from vpt_jax.errors import UsageError

FORMAT = 1
NAME = 'prompt'


@dataclasses.dataclass(frozen=True, eq=False)
class PromptFile:
    """A prompt read from disk.

    Attributes:
      prompts: nested dict of numpy arrays, what training optimised.
      state: nested dict of numpy arrays that the method carries untrained (running statistics); {} for most.
      meta: the JSON dict that was saved, with 'format' and 'vpt_jax' (the version that wrote it).
    """

    prompts: dict
    state: dict
    meta: dict


def save(folder: str | os.PathLike, prompts: Mapping, state: Mapping | None, meta: Mapping[str, Any]) -> Path:
    """Writes a prompt file; both of its files appear whole or not at all.

    Args:
      folder: where to write; made if missing. An older prompt file in it is replaced.
      prompts: nested dict of arrays (see above).
      state: the method's untrained state, likewise; None for none.
      meta: a JSON-able dict. By convention `method` {'name', 'settings'}, `head`, `backbone` {'name', 'sha256',
        'settings'} (`Backbone.describe()`), `preprocess` (`Preprocess.to_dict()`), `class_names`. `backbone` with its
        'name' and 'sha256' is required; numpy numbers and arrays become plain ones.

    Returns:
      The folder.

    Raises:
      UsageError: a pytree that is not nested dicts of arrays, `meta` without a backbone or not JSON-able, or the
        files cannot be written.
    """
    folder = Path(folder)
    backbone = meta.get('backbone')
    if not isinstance(backbone, Mapping) or not {'name', 'sha256'} <= backbone.keys():
        raise UsageError("a prompt's meta must name its backbone: {'backbone': {'name': ..., 'sha256': ...}, ...}")
    arrays, empty = {}, []
    for name, leaf in _walk({'prompts': prompts, 'state': state or {}}, ''):
        if leaf is None:
            empty.append(name)
        else:
            arrays[name] = leaf
    data = safetensors.numpy.save(arrays)
    record = {
        **meta,
        'format': FORMAT,
        'vpt_jax': _version(),
        'tensors': {name: {'shape': list(a.shape), 'dtype': a.dtype.name} for name, a in arrays.items()},
        'empty': empty,
        'safetensors_sha256': hashlib.sha256(data).hexdigest(),
    }
    try:
        text = json.dumps(record, indent=2, default=_plain, allow_nan=False) + '\n'
    except (TypeError, ValueError) as error:
        raise UsageError(f"the prompt's meta cannot be written as JSON: {error}") from error
    with atomic.replacing(folder / f'{NAME}.safetensors') as file:
        file.write(data)
    with atomic.replacing(folder / f'{NAME}.json') as file:
        file.write(text.encode())
    return folder


def load(path: str | os.PathLike) -> PromptFile:
    """Reads a prompt file.

    Args:
      path: the folder, or either of the two files (renamed ones are found as long as they share a stem).

    Returns:
      The prompts, the state and the meta.

    Raises:
      UsageError: nothing there, one of the two files missing, damaged or from another pair, another format version,
        or a tensor missing.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f'there is no prompt {path} (looked for {path.absolute()})')
    stem = path / NAME if path.is_dir() else path.with_suffix('')
    if not path.is_dir() and path.suffix not in ('.safetensors', '.json'):
        raise UsageError(f'{path} is not a prompt: give the folder, its {NAME}.safetensors or its {NAME}.json')
    tensors, notes = (stem.with_name(stem.name + suffix) for suffix in ('.safetensors', '.json'))
    data, text = _bytes(tensors, notes), _bytes(notes, tensors)
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise UsageError(f'{notes} is damaged: it is not JSON ({error}); copy the prompt again') from error
    if not isinstance(meta, dict) or 'format' not in meta:
        raise UsageError(f"{notes} does not describe a prompt: it has no 'format'")
    if meta['format'] != FORMAT:
        raise UsageError(
            f'{notes} has format {meta["format"]!r} (written by vpt_jax {meta.get("vpt_jax", "of unknown version")}) '
            f'and this vpt_jax reads format {FORMAT}: install a version that reads it'
        )
    if meta.get('safetensors_sha256') != hashlib.sha256(data).hexdigest():
        raise UsageError(
            f'{tensors} is damaged or does not belong to {notes.name}: copy both files of the prompt again'
        )
    arrays = _tensors(data, tensors, meta.get('tensors'))
    try:
        flat = arrays | dict.fromkeys(meta.get('empty', ()), traverse_util.empty_node)
        tree = traverse_util.unflatten_dict(flat, sep='/')
    except (TypeError, AttributeError) as error:
        raise UsageError(f'{notes} is damaged: {error}; copy the prompt again') from error
    for key in ('tensors', 'empty', 'safetensors_sha256'):
        meta.pop(key, None)
    return PromptFile(tree.get('prompts', {}), tree.get('state', {}), meta)


def check_backbone(meta: Mapping[str, Any], backbone: Any) -> None:
    """Refuses a prompt that was trained on other weights: its features would mean nothing there.

    Args:
      meta: `PromptFile.meta`.
      backbone: a `zoo.Backbone` (anything with `name` and `sha256`).

    Raises:
      UsageError: the sha256 differs, or the prompt does not name a backbone.
    """
    trained = meta.get('backbone')
    if not isinstance(trained, Mapping) or 'sha256' not in trained:
        raise UsageError('this prompt does not say which backbone it was trained on')
    if trained['sha256'] != backbone.sha256:
        raise UsageError(
            f'this prompt was trained on {trained.get("name", "a backbone")} (sha256 {_short(trained["sha256"])}), '
            f'not on {backbone.name} (sha256 {_short(backbone.sha256)}): load the backbone that it was trained on'
        )


def _walk(tree: Mapping, prefix: str) -> Iterator[tuple[str, np.ndarray | None]]:
    """Names and arrays of a pytree; None for a dict without entries, which safetensors cannot hold."""
    for key, value in tree.items():
        if not isinstance(key, str) or not key or '/' in key:
            raise UsageError(f"prompts are dicts with non-empty string keys without '/', got {key!r} in {prefix!r}")
        name = f'{prefix}{key}'
        if isinstance(value, Mapping):
            if value:
                yield from _walk(value, f'{name}/')
            elif prefix:
                yield name, None
            continue
        if value is None or isinstance(value, (list, tuple)):
            raise UsageError(f'{name} is a {type(value).__name__}; prompts are nested dicts of arrays')
        # safetensors writes the memory as it lies, so a transposed view would come back scrambled.
        array = np.asarray(value, order='C')
        if array.dtype not in safetensors_file.STORABLE:
            raise UsageError(f'{name} has type {array.dtype}, which a prompt file cannot hold')
        yield name, array


def _tensors(data: bytes, path: Path, expected: Any) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, which must be those that the JSON announces, in its order."""
    try:
        stored = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise UsageError(f'{path} is damaged: {error}; copy the prompt again') from error
    if not isinstance(expected, dict) or stored.keys() != expected.keys():
        odd = sorted(stored.keys() ^ (expected if isinstance(expected, dict) else {}).keys())
        raise UsageError(f'{path} and its .json disagree about the tensor {odd[0] if odd else "list"!r}')
    arrays = {}
    for name, note in expected.items():
        part = stored[name]
        if list(part['shape']) != note.get('shape') or part['dtype'] not in safetensors_file.DTYPES:
            raise UsageError(
                f'{path}: {name!r} is {part["dtype"]} {list(part["shape"])} where its .json says '
                f'{note.get("dtype")} {note.get("shape")}'
            )
        arrays[name] = np.frombuffer(part['data'], safetensors_file.DTYPES[part['dtype']]).reshape(part['shape'])
    return arrays


def _bytes(path: Path, twin: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f'{path} is missing; a prompt is the pair {path.name} and {twin.name} in one folder'
        ) from error
    except OSError as error:
        raise UsageError(f'cannot read {path}: {error.strerror or error}') from error


def _plain(value: Any) -> Any:
    """JSON's form of numpy's numbers and arrays."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f'{value!r} is a {type(value).__name__}')


def _short(sha256: str) -> str:
    return sha256 if ':' in sha256 else f'{sha256[:8]}...'


def _version() -> str:
    try:
        return importlib.metadata.version('vpt_jax')
    except importlib.metadata.PackageNotFoundError:
        return 'unknown'
