import json
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vpt_jax.checkpoints import prompt_file
from vpt_jax.errors import UsageError

META = {
    'method': {'name': 'vpt_deep', 'settings': {'num_tokens': 3, 'rate': 0.1}},
    'head': {'name': 'linear', 'bias': True},
    'backbone': {'name': 'tiny', 'sha256': 'ab12cd34' * 8, 'settings': {'width': 8}},
    'preprocess': {'size': 64, 'mean': (0.5, 0.5, 0.5)},
    'class_names': ['cat', 'dog'],
}
PROMPTS = {
    'tokens': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    'head': {'kernel': np.ones((4, 2), np.float32), 'empty': np.zeros((0, 3), np.float32)},
    'unused': {'inner': {}},
}
STATE = {'norm': {'mean': np.arange(4.0), 'count': np.int32(7), 'on': np.array([True, False])}}


def test_round_trip(tmp_path):
    prompts = {
        **PROMPTS,
        'scale': jnp.asarray(0.25),
        'half': np.asarray([1.5, -2.0], ml_dtypes.bfloat16),
        'view': np.arange(6.0).reshape(2, 3).T,
    }
    folder = prompt_file.save(tmp_path / 'new' / 'folder', prompts, STATE, META)
    assert sorted(p.name for p in folder.iterdir()) == ['prompt.json', 'prompt.safetensors']
    for path in (folder, folder / 'prompt.json', folder / 'prompt.safetensors'):
        found = prompt_file.load(path)
        assert found.prompts.keys() == prompts.keys() and found.prompts['unused'] == {'inner': {}}
        pairs = [(found.prompts[k], prompts[k]) for k in ('tokens', 'scale', 'half', 'view')]
        pairs += [(found.prompts['head'][k], PROMPTS['head'][k]) for k in PROMPTS['head']]
        pairs += [(found.state['norm'][k], STATE['norm'][k]) for k in STATE['norm']]
        for got, want in pairs:
            assert got.dtype == want.dtype and got.shape == want.shape
            np.testing.assert_array_equal(got, np.asarray(want))
        assert found.meta['format'] == 1 and found.meta['vpt_jax']
        assert {k: found.meta[k] for k in META} == json.loads(json.dumps(META))
    tensors = json.loads((folder / 'prompt.json').read_text())['tensors']
    assert tensors['prompts/tokens'] == {'shape': [2, 3, 4], 'dtype': 'float32'}
    assert 'state/norm/mean' in tensors


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    prompt_file.save(tmp_path, PROMPTS, None, META)
    first = [(tmp_path / name).read_bytes() for name in ('prompt.json', 'prompt.safetensors')]
    found = prompt_file.load(tmp_path)
    assert found.state == {}
    prompt_file.save(tmp_path, found.prompts, found.state, found.meta)
    assert [(tmp_path / name).read_bytes() for name in ('prompt.json', 'prompt.safetensors')] == first


def test_renamed_pair_is_found(tmp_path):
    prompt_file.save(tmp_path, PROMPTS, STATE, META)
    (tmp_path / 'prompt.json').rename(tmp_path / 'v1.cats.json')
    (tmp_path / 'prompt.safetensors').rename(tmp_path / 'v1.cats.safetensors')
    assert prompt_file.load(tmp_path / 'v1.cats.safetensors').prompts.keys() == PROMPTS.keys()


def test_no_prompts_at_all(tmp_path):
    prompt_file.save(tmp_path, {}, {}, META)
    assert prompt_file.load(tmp_path).prompts == {}


@pytest.mark.parametrize(('prompts', 'message'), [
    ({'a': [np.zeros(1)]}, 'prompts/a is a list'),
    ({'a': {'b': None}}, 'prompts/a/b is a NoneType'),
    ({0: np.zeros(1)}, 'got 0'),
    ({'a/b': np.zeros(1)}, "got 'a/b'"),
    ({'a': np.array(['x'])}, 'prompts/a has type <U1'),
])  # fmt: skip
def test_pytrees_that_cannot_be_saved(tmp_path, prompts, message):
    with pytest.raises(UsageError, match=message):
        prompt_file.save(tmp_path, prompts, None, META)
    assert not list(tmp_path.iterdir())


def test_meta_that_cannot_be_saved(tmp_path):
    for meta, message in (
        ({}, 'must name its backbone'),
        ({**META, 'lr': float('nan')}, 'cannot be written as JSON'),
        ({**META, 'x': object()}, 'is a object'),
    ):
        with pytest.raises(UsageError, match=message):
            prompt_file.save(tmp_path, PROMPTS, None, meta)
    assert not list(tmp_path.iterdir())
    prompt_file.save(tmp_path, PROMPTS, None, {**META, 'lr': np.float32(0.5), 'n': np.arange(2)})
    meta = prompt_file.load(tmp_path).meta
    assert meta['lr'] == 0.5 and meta['n'] == [0, 1]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_files_that_cannot_be_loaded(tmp_path):
    def refused(message, path=tmp_path):
        with pytest.raises(UsageError, match=message):
            prompt_file.load(path)

    refused('no prompt .*nowhere', tmp_path / 'nowhere')
    refused('prompt.safetensors is missing; a prompt is the pair prompt.safetensors and prompt.json')
    prompt_file.save(tmp_path, PROMPTS, STATE, META)
    notes, tensors = tmp_path / 'prompt.json', tmp_path / 'prompt.safetensors'
    text, data = notes.read_text(), tensors.read_bytes()
    notes.unlink()
    refused('prompt.json is missing')
    notes.write_text(text[: len(text) // 2])
    refused('it is not JSON')
    notes.write_text('[]')
    refused("has no 'format'")
    notes.write_text(text)
    edit(notes, format=2)
    refused('format 2 .* reads format 1', notes)
    notes.write_text(text)
    tensors.write_bytes(data[:-3])
    refused('damaged or does not belong to prompt.json')
    edit(notes, safetensors_sha256=prompt_file.hashlib.sha256(data[:-3]).hexdigest())
    refused('is damaged')
    tensors.write_bytes(data)
    notes.write_text(text)
    stored = json.loads(text)['tensors']
    edit(notes, tensors={**stored, 'prompts/more': {'shape': [1], 'dtype': 'float32'}})
    refused("disagree about the tensor 'prompts/more'")
    edit(notes, tensors={**stored, 'prompts/tokens': {'shape': [9], 'dtype': 'float32'}})
    refused(r"'prompts/tokens' is F32 \[2, 3, 4\] where its .json says float32 \[9\]")
    notes.write_text(text)
    (tmp_path / 'x.pt').write_bytes(b'')
    refused('x.pt is not a prompt', tmp_path / 'x.pt')


def test_pair_of_two_runs_is_refused(tmp_path):
    prompt_file.save(tmp_path / 'a', PROMPTS, None, META)
    prompt_file.save(tmp_path / 'b', {**PROMPTS, 'tokens': PROMPTS['tokens'] + 1}, None, META)
    (tmp_path / 'a' / 'prompt.json').replace(tmp_path / 'b' / 'prompt.json')
    with pytest.raises(UsageError, match='does not belong'):
        prompt_file.load(tmp_path / 'b')


def test_check_backbone():
    same = types.SimpleNamespace(name='other name', sha256='ab12cd34' * 8)
    prompt_file.check_backbone(META, same)
    other = types.SimpleNamespace(name='random:B/16', sha256='random:B/16@224:seed0')
    message = r'trained on tiny \(sha256 ab12cd34\.\.\.\), not on random:B/16 \(sha256 random:B/16@224:seed0\)'
    with pytest.raises(UsageError, match=message):
        prompt_file.check_backbone(META, other)
    with pytest.raises(UsageError, match='does not say which backbone'):
        prompt_file.check_backbone({}, same)
