import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorstore

from vpt_jax.checkpoints import containers, scheme
from vpt_jax.checkpoints.tensorstore_dir import TensorstoreSource
from vpt_jax.errors import UsageError

CASES = pathlib.Path(__file__).parents[1] / 'parity' / 'cases'
NAME = 'bv_vit_ts_g.bv-000000003'
KERNEL = 'params~embedding~kernel'


@pytest.fixture
def folder(tmp_path):
    """A copy of the checkpoint."""
    shutil.copy(CASES / 'bv_vit_ts_g.bv-LAST', tmp_path)
    return pathlib.Path(shutil.copytree(CASES / NAME, tmp_path / NAME))


def change_header(folder, **changes):
    path = folder / KERNEL / '.zarray'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize('name', [NAME, f'{NAME}/', f'../cases/{NAME}', 'bv_vit_ts_g.bv', 'bv_vit_ts_g.bv-LAST'])
def test_a_checkpoint_of_big_vision(name):
    with np.load(CASES / 'bv_vit_ts_g.npz') as case, containers.opened(f'{CASES}/{name}') as source:
        part, ported = scheme.port(source)
        weights = dict(scheme.arrays(part, ported))
        assert {f'backbone/{name}' for name in weights} == {n for n in case.files if n.startswith('backbone/')}
        for name, array in weights.items():
            np.testing.assert_array_equal(array, case[f'backbone/{name}'], strict=True)
        np.testing.assert_array_equal(source.read('params/head/kernel'), case['head/kernel'])
        assert source.read('opt/count') == 3 and source.members['opt/count'].shape == ()
        assert set(ported.ignored.values()) == {'task head', 'optimizer state', 'training clock'}
        assert len(source.files) == 2 * len(source.members)


def test_bfloat16_in_several_pieces(tmp_path):
    array = np.arange(20).reshape(4, 5).astype(ml_dtypes.bfloat16)
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{tmp_path}/a~b/'}, 'dtype': 'bfloat16',
            'metadata': {'shape': [4, 5], 'chunks': [3, 2]}}  # fmt: skip
    tensorstore.open(spec, create=True, open=True).result().write(array).result()
    with containers.opened(tmp_path) as source:
        np.testing.assert_array_equal(source.read('a/b'), array, strict=True)
        (tmp_path / 'a~b' / '1.1').write_bytes(b'')
        with pytest.raises(UsageError, match='a~b is damaged: its numbers cannot be read'):
            source.read('a/b')
    (tmp_path / 'a~b' / '1.1').rename(tmp_path / 'a~b' / '1.7')
    with pytest.raises(UsageError, match=r'a~b is damaged: its piece 1.1 is missing'):
        containers.opened(tmp_path)


def test_missing_pieces_are_not_zeros(folder):
    (folder / KERNEL / '0.0.0.0').unlink()
    with pytest.raises(UsageError, match=f'{KERNEL} is damaged: 1 pieces should be in it, and 0 are'):
        TensorstoreSource(folder)
    (folder / KERNEL / '.zarray').unlink()
    with pytest.raises(UsageError, match=rf'{KERNEL} is damaged: it has no .zarray'):
        TensorstoreSource(folder)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'shape': [8, 8, 3]}, 'no sensible shape'),
    ({'shape': [8, 8, 3, -24]}, 'no sensible shape'),
    ({'shape': [1 << 40, 8, 3, 24], 'chunks': [1 << 40, 8, 3, 24]}, 'no sensible shape'),
    ({'chunks': [8, 8, 3, 0]}, 'no sensible shape'),
    ({'shape': [8, 8, 3, 48]}, '2 pieces should be in it, and 1 are'),
    ({'dtype': '|O'}, "holds '|O', a type that vpt_jax does not read"),
    ({'dtype': [['a', '<f4']]}, 'a type that vpt_jax does not read'),
    ({'dtype': '<f9'}, 'a type that vpt_jax does not read'),
])  # fmt: skip
def test_headers_that_cannot_be(folder, changes, message):
    change_header(folder, **changes)
    with pytest.raises(UsageError) as caught:
        TensorstoreSource(folder)
    assert KERNEL in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize('changes', [
    {'compressor': {'id': 'zlib', 'level': 1}}, {'compressor': None}, {'compressor': {'id': 'x'}}, {'zarr_format': 3},
    {'shape': [8, 8, 3, 23]}, {'dtype': '<f8'}, {'filters': [{'id': 'x'}]},
])  # fmt: skip
def test_headers_that_do_not_fit_the_numbers(folder, changes):
    change_header(folder, **changes)
    with TensorstoreSource(folder) as source:
        name = KERNEL.replace('~', '/')
        if changes == {'shape': [8, 8, 3, 23]}:  # a piece may reach over the edge: that is found by the network
            assert source.read(name).shape == (8, 8, 3, 23)
            return
        with pytest.raises(UsageError, match='its numbers cannot be read'):
            source.read(name)


def test_damaged_json(folder):
    (folder / KERNEL / '.zarray').write_text('{')
    with pytest.raises(UsageError, match=r'.zarray is damaged: it is not JSON'):
        containers.opened(folder)


@pytest.mark.parametrize(('text', 'message'), [
    ('000000004', 'says that the last checkpoint is bv_vit_ts_g.bv-000000004, which is not there'),
    ('../x', "should hold the suffix of a checkpoint, such as 000000003, not '../x'"),
    ('', 'should hold the suffix'),
])  # fmt: skip
def test_pointers_to_nowhere(folder, text, message):
    (folder.parent / 'bv_vit_ts_g.bv-LAST').write_text(text)
    for name in ('bv_vit_ts_g.bv', 'bv_vit_ts_g.bv-LAST'):
        with pytest.raises(UsageError, match=message):
            containers.opened(folder.parent / name)
