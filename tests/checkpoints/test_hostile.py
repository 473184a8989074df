"""Files that were changed by chance or on purpose: what is loaded is what is in the file, or nothing is.

A bit that is flipped in the numbers of an `.npz` is noticed, because the archive has checksums. Safetensors, msgpack
and zarr have none, so there the promise is only that the very numbers of the file are loaded, as a reader that has
nothing to do with ours finds them under the same names. All else ends in the project's own error.
"""

import functools
import json
import math
import shutil

import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tensorstore
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from vpt_jax.checkpoints import containers, npz, safetensors_file, scheme
from vpt_jax.errors import UsageError
from vpt_jax.models import loading
from vpt_jax.models.transformer import stack_blocks
from vpt_jax.models.vit import ViT

TINY = {'width': 4, 'depth': 2, 'mlp_dim': 6, 'heads': 2, 'patch_size': 2, 'image_size': 4, 'activation': 'gelu_tanh'}
ABOUT = json.dumps({'format': 1, 'family': 'vit', 'settings': TINY, 'pixels': 'half'}).encode()
#: What writing raises for names that are no tree, and for stacks of unequal blocks.
UNWRITABLE = (ValueError, TypeError, AttributeError, LookupError, OSError)
#: 500 in all.
EXAMPLES = {'npz': 80, 'npz_compressed': 60, 'npz_scan': 50, 'canonical_npz': 50, 'safetensors': 70,
            'canonical_safetensors': 50, 'sharded': 50, 'msgpack': 50, 'tensorstore': 40}  # fmt: skip


@functools.cache
def weights():
    """A tiny ViT in big_vision's names, and something that is not read."""
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in loading.shapes(ViT(**TINY)).items()}
    return flat | {'head/kernel': np.ones((4, 3), np.float32)}


# Each container: writing arrays into a folder, the path to open, and a reader that is not ours.


def write_npz(folder, arrays, save=np.savez):
    save(folder / 'x.npz', **arrays)
    return folder / 'x.npz'


def write_scan(folder, arrays):
    tree = unflatten_dict(arrays, sep='/')
    blocks = {name: np.asarray(a) for name, a in flatten_dict(stack_blocks(tree), sep='/').items()}
    return write_npz(folder, blocks)


def write_canonical_npz(folder, arrays):
    npz.write(folder / 'x.npz', arrays, ABOUT)
    return folder / 'x.npz'


def write_safetensors(folder, arrays, about=b''):
    shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    safetensors_file.write(folder / 'x.safetensors', shapes, arrays.items(), about)
    return folder / 'x.safetensors'


def write_sharded(folder, arrays):
    names = sorted(arrays)
    places = {name: f'model-{1 + (i > len(names) // 2)}.safetensors' for i, name in enumerate(names)}
    for shard in set(places.values()):
        part = {name: np.ascontiguousarray(arrays[name]) for name in names if places[name] == shard}
        safetensors.numpy.save_file(part, folder / shard)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    return folder


def write_msgpack(folder, arrays):
    (folder / 'x.msgpack').write_bytes(serialization.msgpack_serialize(unflatten_dict(arrays, sep='/')))
    return folder / 'x.msgpack'


def zarr(folder, name):
    return {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{folder}/params~{name.replace("/", "~")}/'}}


def write_tensorstore(folder, arrays):
    writes = []
    for name, array in arrays.items():
        metadata = {'shape': list(array.shape), 'chunks': list(array.shape), 'compressor': {'id': 'zstd', 'level': 1}}
        spec = {**zarr(folder, name), 'dtype': str(array.dtype), 'metadata': metadata}
        writes.append(tensorstore.open(spec, create=True, open=True).result().write(array))
    for write in writes:
        write.result()
    return folder


def find_sharded(path, name):
    places = json.loads((path / 'model.safetensors.index.json').read_bytes())['weight_map']
    return safetensors.numpy.load_file(path / places[name])[name]


def find_msgpack(path, name):
    def array(code, data):
        shape, dtype, numbers = msgpack.unpackb(data, raw=True)
        return np.frombuffer(numbers, dtype.decode()).reshape(shape)

    tree = msgpack.unpackb(path.read_bytes(), ext_hook=array)
    return flatten_dict(tree, sep='/')[name]


def find_tensorstore(path, name):
    return np.asarray(tensorstore.open(zarr(path, name.removeprefix('params/')), open=True).result().read().result())


def find_npz(path, name):
    with np.load(path) as file:
        return file[name]


def find_safetensors(path, name):
    return safetensors.numpy.load_file(path)[name]


CONTAINERS = {
    'npz': (write_npz, find_npz),
    'npz_compressed': (functools.partial(write_npz, save=np.savez_compressed), find_npz),
    'npz_scan': (write_scan, find_npz),
    'canonical_npz': (write_canonical_npz, find_npz),
    'safetensors': (write_safetensors, find_safetensors),
    'canonical_safetensors': (functools.partial(write_safetensors, about=ABOUT), find_safetensors),
    'sharded': (write_sharded, find_sharded),
    'msgpack': (write_msgpack, find_msgpack),
    'tensorstore': (write_tensorstore, find_tensorstore),
}


def contents(kind):
    """What is written: our own files hold nothing but the network."""
    return {k: a for k, a in weights().items() if not (kind.startswith('canonical') and k == 'head/kernel')}


@functools.cache
def plan(kind, folder):
    """The plan for the unchanged file, and its weights."""
    with containers.opened(CONTAINERS[kind][0](folder, contents(kind))) as file:
        part, ported = scheme.port(file)
        model, params = loading.build(part, ported)
    return ported, model, flatten_dict(params, sep='/')


# Changes. Each takes hypothesis' draw, a folder and so on, and leaves a changed container behind.


def flip(draw, path):
    content = bytearray(path.read_bytes())
    edge = draw(st.booleans())
    at = draw(st.integers(0, min(700, len(content) - 1) if edge else len(content) - 1))
    at = len(content) - 1 - at if edge and draw(st.booleans()) else at
    content[at] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(content)


def cut(draw, path):
    content = path.read_bytes()
    path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])


def fill(draw, path):
    content = bytearray(path.read_bytes())
    start = draw(st.integers(0, len(content) - 1))
    new = draw(st.binary(min_size=1, max_size=12))
    content[start : start + len(new)] = new
    path.write_bytes(content)


def remove(draw, path):
    path.unlink()


def swap(draw, path):
    other = draw(st.sampled_from(sorted(p for p in path.parent.rglob('*') if p.is_file())))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def rename(draw, arrays):
    name = draw(st.sampled_from(sorted(arrays)))
    at, letter = draw(st.integers(0, len(name) - 1)), draw(st.sampled_from('0123/_xk'))
    new = draw(st.sampled_from([name[:at] + letter + name[at + 1 :], name + letter, name[:at], f'img/{name}']))
    return {new or 'x' if key == name else key: array for key, array in arrays.items()}


def drop(draw, arrays):
    name = draw(st.sampled_from(sorted(arrays)))
    return {key: array for key, array in arrays.items() if key != name}


def add(draw, arrays):
    name = draw(st.sampled_from(sorted(arrays)))
    new = name.replace('_1/', f'_{draw(st.integers(2, 9))}/', 1) + draw(st.sampled_from(['', 'x']))
    return {**arrays, new: arrays[name]}


def exchange(draw, arrays):
    first, second = (draw(st.sampled_from(sorted(arrays))) for _ in range(2))
    return {**arrays, first: arrays[second], second: arrays[first]}


def reshape(draw, arrays):
    name = draw(st.sampled_from(sorted(arrays)))
    array = arrays[name]
    forms = [array.reshape(-1), array.T.copy(), array[None], array[:-1], array[..., :-1], np.repeat(array, 2, axis=0),
             array[..., None], array.reshape(*array.shape[::-1])]  # fmt: skip
    return {**arrays, name: draw(st.sampled_from(forms))}


def retype(draw, arrays):
    name = draw(st.sampled_from(sorted(arrays)))
    dtype = draw(st.sampled_from([np.float64, np.float16, np.int32, np.uint8, np.bool_]))
    return {**arrays, name: arrays[name].astype(dtype)}


def spoil(draw, arrays):
    name = draw(st.sampled_from(sorted(arrays)))
    array = arrays[name].copy()
    array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return {**arrays, name: array}


IN_BYTES = [flip, flip, flip, cut, fill, remove, swap]
IN_NAMES = [rename, drop, add, exchange, reshape, retype, spoil]


def written(kind, draw, folder):
    """A changed container; (path to open, what was done)."""
    write, _ = CONTAINERS[kind]
    change = draw(st.sampled_from(IN_BYTES + IN_NAMES))
    if change in IN_NAMES:
        arrays = change(draw, contents(kind))
        return write(folder, arrays), change
    path = write(folder, contents(kind))
    change(draw, draw(st.sampled_from(sorted(p for p in folder.rglob('*') if p.is_file()))))
    return path, change


@pytest.mark.parametrize('kind', CONTAINERS)
def test_a_changed_file_loads_what_is_in_it_or_nothing(kind, tmp_path_factory):
    ported, model, unchanged = plan(kind, tmp_path_factory.mktemp('unchanged'))
    top = tmp_path_factory.mktemp('changed')
    seen = {'loaded': 0, 'refused': 0}

    @settings(max_examples=EXAMPLES[kind], deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def check(data):
        folder = top / 'folder'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            path, change = written(kind, data.draw, folder)
        except UNWRITABLE:
            reject()
        try:
            with containers.opened(path) as file:
                part, found = scheme.port(file)
                network, params = loading.build(part, found)
        except UsageError as error:
            assert '\n' not in str(error) and len(str(error)) < 600, str(error)
            seen['refused'] += 1
            return
        seen['loaded'] += 1
        loaded = flatten_dict(params, sep='/')
        assert loaded.keys() == unchanged.keys()
        checked = 'npz' in kind and change in IN_BYTES
        for name, weight in ported.weights.items():
            if checked:
                expected = np.asarray(unchanged[name])
            else:
                prefix = path_prefix(found, weight.names[0], file)
                expected = weight.layout(*(CONTAINERS[kind][1](path, prefix + n) for n in weight.names))
            np.testing.assert_array_equal(loaded[name], expected.astype(np.float32))
        if checked or not file.about:
            assert network == model

    check()
    assert seen['refused'] > EXAMPLES[kind] // 3, seen


def path_prefix(found, name, file):
    """Where in the file the network is: a changed file may hold it elsewhere."""
    return next(member.removesuffix(name) for member in file.members if member.endswith(name))


def test_there_are_500_cases():
    assert sum(EXAMPLES.values()) == 500 and EXAMPLES.keys() == CONTAINERS.keys()


def test_bfloat16_survives_every_container(tmp_path):
    arrays = {name: a.astype(ml_dtypes.bfloat16) for name, a in weights().items()}
    for kind in ('safetensors', 'msgpack', 'tensorstore', 'canonical_npz'):
        folder = tmp_path / kind
        folder.mkdir()
        held = {k: arrays[k] for k in contents(kind)}
        with containers.opened(CONTAINERS[kind][0](folder, held)) as file:
            part, ported = scheme.port(file)
            found = dict(scheme.arrays(part, ported))
        for name in ported.weights:
            np.testing.assert_array_equal(found[name], arrays[name], strict=True)


def test_a_flipped_bit_that_no_container_notices(tmp_path):
    path = write_safetensors(tmp_path, weights())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with containers.opened(path) as file:
        found = dict(scheme.arrays(*scheme.port(file)))
    changed = [name for name in found if not np.array_equal(found[name], weights()[name])]
    assert len(changed) == 1
    np.testing.assert_array_equal(found[changed[0]], find_safetensors(path, changed[0]), strict=True)
