import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from vpt_jax.checkpoints import containers, safetensors_file
from vpt_jax.checkpoints.safetensors_file import SafetensorsSource, ShardedSource
from vpt_jax.errors import UsageError

CASE = pathlib.Path(__file__).parents[1] / 'parity' / 'cases' / 'torchforms'
INDEX = 'model.safetensors.index.json'


@pytest.fixture(scope='module')
def weights():
    """What every file of the folder holds, in float32."""
    with np.load(f'{CASE}.npz') as file:
        return {name.removeprefix('backbone/'): file[name] for name in file.files if name.startswith('backbone/')}


@pytest.fixture
def sharded(tmp_path):
    """A copy of a network in two files with an index."""
    for path in CASE.glob('model*'):
        shutil.copy(path, tmp_path)
    return tmp_path


def read(source):
    with source:
        return {name: source.read(name) for name in source.members}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize(('name', 'dtype'), [
    ('plain.safetensors', np.float32), ('float16.safetensors', np.float16),
    ('bfloat16.safetensors', ml_dtypes.bfloat16), (INDEX, np.float32),
])  # fmt: skip
def test_files_of_pytorch(weights, name, dtype):
    assert_same(read(containers.opened(CASE / name)), {k: a.astype(dtype) for k, a in weights.items()})


def test_a_folder_is_its_index(sharded, weights):
    source = containers.opened(sharded)
    assert_same(read(source), weights)
    assert {path.name for path in source.files} == {path.name for path in sharded.iterdir()}


def test_the_library_reads_what_is_written(tmp_path):
    arrays = {
        'b/kernel': np.arange(6, dtype=np.float32).reshape(2, 3).T,
        'a': np.arange(3).astype(ml_dtypes.bfloat16),
        'scalar': np.float64(2.5),
        'none': np.zeros((0, 3), np.float16),
        'flags': np.array([True, False]),
    }
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    path = tmp_path / 'new' / 'x.safetensors'
    safetensors_file.write(path, shapes, arrays.items(), b'{"format": 1}')
    assert_same(read(SafetensorsSource(path)), arrays)
    assert_same(safetensors.numpy.load_file(path), arrays)
    with SafetensorsSource(path) as source:
        assert source.about == {'format': 1} and source.config == {} and source.files == (path,)
    first = path.read_bytes()
    safetensors_file.write(path, dict(reversed(shapes.items())), reversed(arrays.items()), b'{"format": 1}')
    assert path.read_bytes() == first and first.index(b'}}') % 8 < 8 and len(list(path.parent.iterdir())) == 1


def test_a_failed_write_leaves_nothing(tmp_path):
    def pairs():
        yield 'x', np.zeros(3)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        safetensors_file.write(tmp_path / 'x.safetensors', {'x': ((3,), np.dtype(float))}, pairs())
    assert not list(tmp_path.iterdir())


def test_settings_that_lie_beside(tmp_path):
    path = tmp_path / 'some.safetensors'
    shutil.copy(CASE / 'plain.safetensors', path)
    (tmp_path / 'config.json').write_text('{"num_attention_heads": 4}')
    assert SafetensorsSource(path).config == {'num_attention_heads': 4}
    (tmp_path / 'some.hf_config.json').write_text('{"num_attention_heads": 8}')
    assert SafetensorsSource(path).config == {'num_attention_heads': 8}
    for text in ('{"a": ', '[1]', '', '[' * 100_000):
        (tmp_path / 'some.hf_config.json').write_text(text)
        with pytest.raises(UsageError, match=r'some.hf_config.json is damaged: it is '):
            SafetensorsSource(path)


def test_damaged_headers(tmp_path):
    path = tmp_path / 'x.safetensors'
    with pytest.raises(UsageError, match=r'bad_offsets.safetensors is damaged: .*not fully covered'):
        containers.opened(CASE / 'bad_offsets.safetensors')
    whole = (CASE / 'plain.safetensors').read_bytes()
    for content in (whole[:-1], whole + b'x', whole[:100], whole[:9], whole.replace(b'"F32"', b'"F31"', 1)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r'x.safetensors is damaged: .*; copy or download it again'):
            containers.opened(path)
    with pytest.raises(UsageError, match='cannot read'):
        SafetensorsSource(tmp_path / 'absent.safetensors')


def test_types_that_we_have_no_use_for(tmp_path):
    header = b'{"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / 'x.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
    with pytest.raises(UsageError, match="'x' holds F8_E4M3, a type that vpt_jax does not read"):
        containers.opened(tmp_path / 'x.safetensors')


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / 'x.safetensors'
    shutil.copy(CASE / 'plain.safetensors', path)
    with SafetensorsSource(path) as source:
        last = max(source.members, key=lambda name: source._offsets[name])
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(UsageError, match='is cut short'):
            source.read(last)


def test_shards_that_do_not_fit(sharded):
    first, second = sorted(sharded.glob('*.safetensors'))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match=r"00002.safetensors has no 'blocks.1.*belong to different models"):
        ShardedSource(sharded / INDEX)
    second.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=r'00002.safetensors is damaged'):
        ShardedSource(sharded / INDEX)
    second.unlink()
    with pytest.raises(UsageError, match=r"00002.safetensors is missing; model.*json says that 'blocks.1.* is in it"):
        ShardedSource(sharded / INDEX)


@pytest.mark.parametrize('shard', ['../plain.safetensors', '/etc/passwd', '..', '', 3, None])
def test_shards_outside_of_the_folder(sharded, shard):
    index = json.loads((sharded / INDEX).read_text())
    index['weight_map']['cls_token'] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"'cls_token' should be in .*, which is no file beside it"):
        containers.opened(sharded / INDEX)


@pytest.mark.parametrize('text', ['{}', '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_of_nothing(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(UsageError, match="lists no weights: it has no 'weight_map'"):
        containers.opened(sharded)
