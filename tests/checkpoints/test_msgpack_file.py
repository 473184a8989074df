import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from vpt_jax.checkpoints import containers, msgpack_file
from vpt_jax.errors import UsageError

TREE = {
    'vit': {'encoder': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'half': jnp.ones(3, jnp.bfloat16)},
    'scale': np.float32(2.0),
    'step': 7,
    'note': 'x',
}


def write(path, tree):
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


def test_a_tree_of_arrays(tmp_path):
    (tmp_path / 'config.json').write_text('{"hidden_act": "gelu"}')
    with containers.opened(write(tmp_path / 'flax_model.msgpack', TREE)) as source:
        assert set(source.members) == {'vit/encoder/kernel', 'vit/half', 'scale'}
        np.testing.assert_array_equal(source.read('vit/encoder/kernel'), TREE['vit']['encoder']['kernel'], strict=True)
        assert source.members['vit/half'].dtype == ml_dtypes.bfloat16 and source.members['scale'].shape == ()
        assert source.skipped == {'step': 'no array but int', 'note': 'no array but str'}
        assert source.config == {'hidden_act': 'gelu'} and source.files == (tmp_path / 'flax_model.msgpack',)
    assert containers.opened(tmp_path).members.keys() == source.members.keys()


def test_arrays_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 16)
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    path = write(tmp_path / 'x.msgpack', {'a': {'b': array}})
    assert b'chunk' in path.read_bytes()
    np.testing.assert_array_equal(msgpack_file.opened(path).read('a/b'), array, strict=True)


def test_files_that_are_cut_short(tmp_path):
    path = write(tmp_path / 'x.msgpack', TREE)
    whole = path.read_bytes()
    for length in (1, 2, 10, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r'x.msgpack is cut short or damaged'):
            containers.opened(path)
    path.write_bytes(whole + b'\x00')
    with pytest.raises(UsageError, match='cut short or damaged'):
        containers.opened(path)


def forged(dtype, shape=(2,), data=b'12345678'):
    inner = msgpack.packb((shape, dtype, data), use_bin_type=True)
    return msgpack.packb({'x': msgpack.ExtType(1, inner)}, use_bin_type=True)


@pytest.mark.parametrize('content', [
    forged('O'), forged('object'), forged('novel'), forged('float32', (3,)), forged('float32', (-1, -1)),
    forged('float32', (1 << 62, 1 << 62)), forged('V8'), forged('float32', 'ab'), forged('float32', (2,), 'text'),
    msgpack.packb({'x': msgpack.ExtType(1, b'\xc1')}), msgpack.packb({'x': msgpack.ExtType(2, b'')}),
    msgpack.packb({'x': {'__msgpack_chunked_array__': True}}),
    msgpack.packb({'x': {'__msgpack_chunked_array__': True, 'shape': {'0': 2}, 'chunks': {'0': 3}}}),
    b'\x81\xa1x' * 5000 + b'\x01',
], ids=repr)  # fmt: skip
def test_forged_arrays(tmp_path, content):
    path = tmp_path / 'x.msgpack'
    path.write_bytes(content)
    try:
        source = containers.opened(path)
    except UsageError:
        return
    assert not any(member.dtype.hasobject for member in source.members.values())
    assert content == forged('V8') and source.members['x'].dtype.kind == 'V'


def test_other_trees(tmp_path):
    path = tmp_path / 'x.msgpack'
    path.write_bytes(msgpack.packb({1: 2}))
    with pytest.raises(UsageError, match='it has the key 1, and names are text'):
        containers.opened(path)
    path.write_bytes(msgpack.packb([1, 2]))
    with pytest.raises(UsageError, match='is no weight file that vpt_jax reads'):
        containers.opened(path)
    with pytest.raises(UsageError, match='holds a list instead of a tree of weights'):
        msgpack_file.opened(path)
    with pytest.raises(UsageError, match='cannot read'):
        msgpack_file.opened(tmp_path / 'absent.msgpack')
