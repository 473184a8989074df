import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest

from vpt_jax.checkpoints import atomic, npz
from vpt_jax.checkpoints.npz import NpzSource, natural
from vpt_jax.errors import UsageError

EVIL = pathlib.Path(__file__).parents[1] / 'parity' / 'cases' / 'torchforms' / 'evil_object_array.npz'
ARRAYS = {
    'a/kernel': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    'a/columns': np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    'b/half': np.arange(5).astype(ml_dtypes.bfloat16),
    'b/swapped': np.arange(4, dtype='>f4'),
    'scalar': np.float16(3.5),
    'none': np.zeros((0, 3), np.int32),
}


def read(path):
    with NpzSource(path) as source:
        return {name: source.read(name) for name in source.members}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (np.asarray(array).dtype, np.shape(array)), name
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize('save', [npz.write, lambda p, a: np.savez(p, **a), lambda p, a: np.savez_compressed(p, **a)])
def test_round_trip(tmp_path, save):
    arrays = {
        k: a.view('V2') if save is not npz.write and a.dtype == ml_dtypes.bfloat16 else a for k, a in ARRAYS.items()
    }
    save(tmp_path / 'x.npz', arrays)
    assert_same(read(tmp_path / 'x.npz'), ARRAYS)
    with NpzSource(tmp_path / 'x.npz') as source:
        assert source.members['b/half'].dtype == ml_dtypes.bfloat16 and source.members['a/kernel'].shape == (2, 3, 4)
        assert source.files == (tmp_path / 'x.npz',) and source.about == {}


def test_what_is_written_depends_on_the_arrays_alone(tmp_path):
    npz.write(tmp_path / 'new' / 'x.npz', ARRAYS)
    first = (tmp_path / 'new' / 'x.npz').read_bytes()
    npz.write(tmp_path / 'y.npz', {k: np.asarray(a, order='F') for k, a in reversed(ARRAYS.items())})
    assert (tmp_path / 'y.npz').read_bytes() == first
    assert_same({k: a for k, a in np.load(tmp_path / 'y.npz').items() if a.dtype.kind != 'V'},
                {k: a for k, a in ARRAYS.items() if a.dtype != ml_dtypes.bfloat16})  # fmt: skip


def test_pairs_are_written_as_they_come(tmp_path):
    alive = []

    def pairs():
        for i in range(3):
            alive.append(i)
            yield f'x{i}', np.full(4, i)
            assert alive == list(range(i + 1))

    npz.write(tmp_path / 'x.npz', pairs(), about=b'{"format": 1}')
    with NpzSource(tmp_path / 'x.npz') as source:
        assert source.about == {'format': 1} and list(source.members) == ['x0', 'x1', 'x2']


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'x.npz'
    path.write_bytes(b'old')

    def pairs():
        yield 'x', np.zeros(3)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        npz.write(path, pairs())
    with pytest.raises(RuntimeError), atomic.replacing(path) as file:
        file.write(b'half')
        raise RuntimeError
    assert path.read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match='cannot write'):
        npz.write(path / 'below' / 'x.npz', {})


def test_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / 'x.npz'
    npz.write(path, {'first': np.full(9000, 7, np.uint8), 'second': np.full(100, 9, np.uint8)})
    content = bytearray(path.read_bytes())
    content[content.index(bytes([7]) * 9000) + 8500] ^= 1
    path.write_bytes(content)
    with NpzSource(path) as source:
        np.testing.assert_array_equal(source.read('second'), 9)
        with pytest.raises(UsageError, match=r"x.npz is damaged: 'first' cannot be read"):
            source.read('first')


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_every_flipped_byte_of_the_numbers_is_noticed(tmp_path, save):
    path = tmp_path / 'x.npz'
    save(path, x=np.random.default_rng(0).normal(size=16).astype(np.float32))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo('x.npy')
    start = whole.index(b'x.npy') + len('x.npy') + int.from_bytes(whole[28:30], 'little')
    for at in range(start, start + info.compress_size - 1, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        if at == start + info.compress_size - 2 and save is np.savez_compressed:
            continue  # bits behind the end of the stream, which mean nothing
        with pytest.raises(UsageError, match=r'damaged'):
            read(path)


def test_a_header_for_fewer_numbers_is_damage(tmp_path):
    path = tmp_path / 'x.npz'
    npz.write(path, {'x': np.zeros(24, np.float32)})
    path.write_bytes(path.read_bytes().replace(b'(24,)', b'(14,)'))
    with pytest.raises(UsageError, match="'x' cannot be read"):
        NpzSource(path)
    path.write_bytes(path.read_bytes().replace(b'(14,)', b'(1e9,)'[:5]))
    with pytest.raises(UsageError, match="'x' cannot be read"):
        NpzSource(path)


@pytest.mark.parametrize('length', [30, 100, 200, -30, -1])
def test_files_that_are_cut_short(tmp_path, length):
    path = tmp_path / 'x.npz'
    npz.write(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UsageError, match=r'x.npz is (cut short or damaged|damaged: .*); copy or download it again'):
        read(path)


def test_foreign_archives(tmp_path):
    path = tmp_path / 'x.npz'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('photo.jpg', b'x')
    with pytest.raises(UsageError, match=r"zip archive but not an .npz file: it holds 'photo.jpg'"):
        NpzSource(path)
    with zipfile.ZipFile(path, 'w'):
        pass
    with pytest.raises(UsageError, match='it holds nothing'):
        NpzSource(path)
    with zipfile.ZipFile(path, 'w') as archive, pytest.warns(UserWarning, match='Duplicate'):
        for _ in range(2):
            with archive.open('x.npy', 'w') as file:
                np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match="it holds 'x' twice"):
        NpzSource(path)
    with pytest.raises(UsageError, match='cannot read'):
        NpzSource(tmp_path / 'absent.npz')


def test_python_objects_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.delenv('VPTJAX_EVIL_RAN', raising=False)
    with pytest.raises(UsageError, match='holds Python objects, which vpt_jax never unpickles'):
        NpzSource(EVIL)
    import os

    assert 'VPTJAX_EVIL_RAN' not in os.environ


def test_what_a_file_says_of_itself_must_be_json(tmp_path):
    for about, message in ((b'{', 'is not JSON'), (b'[]', 'not an object'), (b'\xff', 'is not JSON')):
        npz.write(tmp_path / 'x.npz', {}, about)
        with pytest.raises(UsageError, match=f"x.npz is damaged: '__vpt_jax__' is .*{message.removeprefix('is ')}"):
            NpzSource(tmp_path / 'x.npz')
    npz.write(tmp_path / 'x.npz', {'__vpt_jax__': np.zeros(3)})
    with pytest.raises(UsageError, match="'__vpt_jax__' cannot be read"):
        NpzSource(tmp_path / 'x.npz')


def test_values_that_are_not_finite_are_named(tmp_path):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        array = np.ones(300).astype(dtype)
        array[250] = np.nan
        npz.write(tmp_path / 'x.npz', {'x': array, 'whole': np.ones(3, dtype)})
        with NpzSource(tmp_path / 'x.npz') as source, pytest.raises(UsageError, match="'x' holds values that are not"):
            source.read('whole')
            source.read('x')


def test_natural_order():
    names = ['b_10', 'b_9', 'b_09/x', 'a', 'b', 'b_9/x', '7', '²', 'b_' + '9' * 5000]
    assert sorted(names, key=natural)[-3:] == ['b_10', 'b_' + '9' * 5000, '²']
    assert sorted(['x10/y2', 'x2/y10', 'x2/y9'], key=natural) == ['x2/y9', 'x2/y10', 'x10/y2']
