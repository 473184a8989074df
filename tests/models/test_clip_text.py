"""CLIP's text tower and its tokens, without the files that cannot be in a repository."""

import gzip
import json

import numpy as np
import pytest
import safetensors.numpy

from vpt_jax.checkpoints import containers, scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.methods.label_mapping import read_arrays
from vpt_jax.models import clip_text
from vpt_jax.models.clip_text import CLIPText, build, text_features, texts
from vpt_jax.models.clip_tokens import Tokenizer, byte_letters, words
from vpt_jax.texts import main

W, VOCAB, CONTEXT, EMBED = 16, 521, 9, 6
_PARTS = {'self_attn.q_proj': 0, 'self_attn.k_proj': 1, 'self_attn.v_proj': 2}


def openai(image_tower=False):
    """Weights in OpenAI's names."""
    rng = np.random.default_rng(0)
    shapes = {'token_embedding.weight': (VOCAB, W), 'positional_embedding': (CONTEXT, W), 'text_projection': (W, EMBED),
              'ln_final.weight': (W,), 'ln_final.bias': (W,)}  # fmt: skip
    for i in range(2):
        block = f'transformer.resblocks.{i}.'
        shapes |= {f'{block}{name}': shape for name, shape in {
            'attn.in_proj_weight': (3 * W, W), 'attn.in_proj_bias': (3 * W,), 'attn.out_proj.weight': (W, W),
            'attn.out_proj.bias': (W,), 'ln_1.weight': (W,), 'ln_1.bias': (W,), 'ln_2.weight': (W,), 'ln_2.bias': (W,),
            'mlp.c_fc.weight': (4 * W, W), 'mlp.c_fc.bias': (4 * W,), 'mlp.c_proj.weight': (W, 4 * W),
            'mlp.c_proj.bias': (W,)}.items()}  # fmt: skip
    shapes |= {'visual.proj': (W, EMBED), 'context_length': ()} if image_tower else {}
    drawn = {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {'logit_scale': np.float32(2.0)}


def hub(weights):
    """The same weights in Hugging Face's names."""
    renamed = {'token_embedding.weight': 'text_model.embeddings.token_embedding.weight',
               'positional_embedding': 'text_model.embeddings.position_embedding.weight'}  # fmt: skip
    found = {}
    for name, array in weights.items():
        if name == 'text_projection':
            found['text_projection.weight'] = array.T
            continue
        new = name.replace('transformer.resblocks', 'text_model.encoder.layers')
        new = new.replace('ln_final', 'text_model.final_layer_norm').replace('ln_', 'layer_norm')
        new = new.replace('c_fc', 'fc1').replace('c_proj', 'fc2').replace('attn.out_proj', 'self_attn.out_proj')
        if 'in_proj_' in new:
            block, leaf = new.split('attn.in_proj_')
            for part, i in _PARTS.items():
                found[f'{block}{part}.{leaf}'] = array[i * W : (i + 1) * W]
        else:
            found[renamed.get(name, new)] = array
    return found


TOKENS = np.array([[519, 3, 4, 520, 0, 0, 0, 0, 0], [519, 7, 520, 0, 0, 0, 0, 0, 0]], np.int32)


@pytest.fixture(scope='module')
def tower():
    return build(ArraySource(openai()), heads=2)


def test_both_spellings_are_one_tower(tower):
    model, params = tower
    assert model == CLIPText(VOCAB, CONTEXT, W, 2, 2, 4 * W, EMBED)
    weights = hub(openai())
    del weights['logit_scale']  # files of the text tower alone do not have it
    config = {'text_config': {'num_attention_heads': 2, 'hidden_act': 'gelu'}, 'vision_config': {'hidden_act': 'gelu'}}
    other, same = build(ArraySource(weights, config=config))
    assert other == model.clone(activation='gelu')
    np.testing.assert_allclose(same.pop('logit_scale'), np.log(100))
    ours = text_features(model, params, TOKENS)
    np.testing.assert_array_equal(text_features(model, {**same, 'logit_scale': 0.0}, TOKENS), ours)
    assert np.abs(text_features(other, {**same, 'logit_scale': 0.0}, TOKENS) - ours).max() > 1e-4


def test_nothing_after_the_end_of_a_text_matters(tower):
    later = TOKENS.copy()
    later[0, 5:], later[1, 4:] = 11, 12
    np.testing.assert_allclose(text_features(*tower, later), text_features(*tower, TOKENS), atol=1e-5)
    np.testing.assert_allclose(text_features(*tower, TOKENS[:, :5]), text_features(*tower, TOKENS), atol=1e-5)
    earlier = TOKENS.copy()
    earlier[:, 1] = 9
    assert np.abs(text_features(*tower, earlier) - text_features(*tower, TOKENS)).max() > 1e-2


def test_many_texts_go_in_chunks(tower, monkeypatch):
    monkeypatch.setattr(clip_text, '_CHUNK', 2)
    many = np.concatenate([TOKENS, TOKENS[::-1], TOKENS[:1]])
    one = text_features(*tower, TOKENS)
    np.testing.assert_allclose(text_features(*tower, many), one[[0, 1, 1, 0, 0]], atol=1e-6)


def test_the_tower_of_a_whole_clip_is_taken_by_name_only(tmp_path):
    _, plan = scheme.port(ArraySource(openai(image_tower=True)), 'clip_text', {'heads': 2})
    assert plan.ignored == {'visual.proj': 'image tower', 'context_length': 'a setting'}
    np.savez(tmp_path / 'clip.npz', **openai())
    with containers.opened(tmp_path / 'clip.npz') as file:
        assert build(file, heads=2)[0].depth == 2
    with pytest.raises(UsageError, match="does not hold a network of the scheme 'clip_text'"):
        build(ArraySource({'visual.proj': np.zeros((2, 2))}))


def test_texts_are_templates_of_plain_names():
    found = texts(['Great_White-Shark', 'tench'], ('A {}.', 'no {}'))
    assert found == ['A great white shark.', 'A tench.', 'no great white shark', 'no tench']
    assert texts(['tench']) == ['This is a photo of a tench.']
    with pytest.raises(UsageError, match=r"one \{\} for the name of the class, got 'a photo'"):
        texts(['tench'], ('a photo',))


MERGES = ('i n', 'a t</w>', 'c at</w>', 't h', 'th in', 'g </w>', 'thin g</w>')


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
    """A vocabulary with seven merges, in both forms."""
    folder = tmp_path_factory.mktemp('vocabulary')
    merges = [m for m in MERGES if m != 'g </w>']
    with gzip.open(folder / 'bpe.txt.gz', 'wt', encoding='utf-8') as file:
        file.write('\n'.join(['#version', *merges, '']))
    letters = list(byte_letters().values())
    names = [*letters, *(c + '</w>' for c in letters), *(m.replace(' ', '') for m in merges), '<|startoftext|>',
             '<|endoftext|>']  # fmt: skip
    model = {'vocab': {name: i for i, name in enumerate(names)}, 'merges': merges}
    (folder / 'tokenizer.json').write_text(json.dumps({'model': model}))
    return folder


@pytest.mark.parametrize('name', ['bpe.txt.gz', 'tokenizer.json'])
def test_pairs_are_merged_in_the_order_of_the_file(vocabulary, name):
    tokenizer = Tokenizer(vocabulary / name)
    letter, end = {c: i for i, c in enumerate(byte_letters().values())}, 256
    assert tokenizer.encode('CAT  thing') == [514, 517]  # cat</w>, thing</w>
    assert tokenizer.encode('hat') == [letter['h'], 513]
    assert tokenizer.encode('thin') == [515, letter['i'], letter['n'] + end]  # 'in' inside a word is not its end
    assert tokenizer.encode('&amp;') == [letter['&'] + end]
    assert tokenizer(['cat'], 6).tolist() == [[518, 514, 519, 0, 0, 0]]
    with pytest.raises(UsageError, match="'cat cat cat' has 5 tokens, and CLIP takes 4"):
        tokenizer(['cat cat cat'], 4)


def test_words():
    assert words("it's 42 dogs', we'll see!? café") == ['it', "'s", '4', '2', 'dogs', "',", 'we', "'ll", 'see', '!?',
                                                         'café']  # fmt: skip
    assert byte_letters()[ord('a')] == 'a' and byte_letters()[0] == 'Ā' and len(set(byte_letters().values())) == 256
    assert next(iter(byte_letters().values())) == '!'


def test_what_is_no_vocabulary(tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{"model": {}}')
    (tmp_path / 'bpe.txt.gz').write_bytes(b'not gzip')
    for name in ('tokenizer.json', 'bpe.txt.gz', 'absent.gz'):
        with pytest.raises(UsageError, match=r"is no vocabulary of CLIP's"):
            Tokenizer(tmp_path / name)


def test_the_program_writes_what_the_head_reads(vocabulary, tmp_path, capsys):
    weights = tmp_path / 'clip.safetensors'
    safetensors.numpy.save_file({**openai(), 'logit_scale': np.full((), 2, np.float32)}, weights)
    (tmp_path / 'names.txt').write_text('cat\nthing\n')
    (tmp_path / 'templates.txt').write_text('{}\nhat {}\n')
    with pytest.raises(UsageError, match='does not tell how many heads its width of 16 is for'):
        main(str(weights), str(vocabulary / 'bpe.txt.gz'), str(tmp_path / 'names.txt'), None, str(tmp_path / 'x.npz'))
    with pytest.raises(UsageError, match='cannot read'):
        main(str(weights), 'x', str(tmp_path / 'nowhere.txt'), None, 'x.npz')
    (tmp_path / 'config.json').write_text(json.dumps({'text_config': {'num_attention_heads': 2}}))
    arguments = (str(weights), str(vocabulary / 'bpe.txt.gz'), str(tmp_path / 'names.txt'))
    main(*arguments, str(tmp_path / 'templates.txt'), str(tmp_path / 'texts.npz'))
    assert "4 texts of 2 classes, such as 'cat'" in capsys.readouterr().out
    features, scale = read_arrays('clip_head', str(tmp_path / 'texts.npz'), ('text_features', 'logit_scale'))
    assert features.shape == (4, EMBED) and scale == 2.0
    model, params = clip_text.load_text_tower(weights)
    tokens = Tokenizer(vocabulary / 'bpe.txt.gz')(['cat', 'thing', 'hat cat', 'hat thing'], CONTEXT)
    np.testing.assert_allclose(features, text_features(model, params, tokens), atol=1e-6)
