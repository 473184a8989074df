"""BEiT files in their three spellings, and what is said of those that cannot be read."""

import jax
import numpy as np
import pytest

from tests.models import beit_reference as reference
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.errors import UsageError
from vpt_jax.models import loading, vqkd

SIZES = {'window': (2, 2), 'width': 16, 'heads': 2}
_TABLE = 'relative_position_bias_table'

# Hugging Face's names, as its conversion script and its 5.x modules spell them.
_HUB = {
    'cls_token': 'beit.embeddings.cls_token', 'mask_token': 'beit.embeddings.mask_token',
    'pos_embed': 'beit.embeddings.position_embeddings',
    'patch_embed.proj': 'beit.embeddings.patch_embeddings.projection', 'fc_norm': 'beit.pooler.layernorm',
    'norm': 'layernorm', 'lm_head': 'lm_head', 'head': 'classifier',
}  # fmt: skip
_HUB_4 = _HUB | {
    'rel_pos_bias': 'beit.encoder.relative_position_bias',
    **{f'blocks.{i}.{a}': f'beit.encoder.layer.{i}.{b}' for i in range(2) for a, b in {
        'norm1': 'layernorm_before', 'norm2': 'layernorm_after', 'gamma_1': 'lambda_1', 'gamma_2': 'lambda_2',
        'attn.q': 'attention.attention.query', 'attn.k': 'attention.attention.key',
        'attn.v': 'attention.attention.value', 'attn.proj': 'attention.output.dense', 'mlp.fc1': 'intermediate.dense',
        'mlp.fc2': 'output.dense', f'attn.{_TABLE}': f'attention.attention.relative_position_bias.{_TABLE}',
    }.items()},
}  # fmt: skip
_HUB_5 = _HUB | {
    'rel_pos_bias': 'beit.shared_position_bias',
    **{f'blocks.{i}.{a}': f'beit.layers.{i}.{b}' for i in range(2) for a, b in {
        'norm1': 'layernorm_before', 'norm2': 'layernorm_after', 'gamma_1': 'lambda_1', 'gamma_2': 'lambda_2',
        'attn.q': 'attention.q_proj', 'attn.k': 'attention.k_proj', 'attn.v': 'attention.v_proj',
        'attn.proj': 'attention.o_proj', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2',
        f'attn.{_TABLE}': f'relative_position_bias.{_TABLE}',
    }.items()},
}  # fmt: skip


def hub(state, names):
    """A unilm state dict under Hugging Face's names."""
    apart = {}
    for name, array in state.items():
        if name.endswith('attn.qkv.weight'):
            parts = zip('qkv', np.split(array, 3), strict=True)
            apart |= {name.replace('qkv', letter): part for letter, part in parts}
        elif name.endswith(('attn.q_bias', 'attn.v_bias')):
            apart[name.replace('_bias', '.bias')] = array
        else:
            apart[name] = array
    out = {}
    for name, array in apart.items():
        part = max((p for p in names if name == p or name.startswith(f'{p}.')), key=len)
        out[names[part] + name.removeprefix(part)] = array
    return out


@pytest.fixture
def state():
    return reference.weights(np.random.default_rng(0), window=(2, 2), shared=True, positions=True, vocab=7)


@pytest.fixture
def fine_tuned():
    rng = np.random.default_rng(1)
    made = reference.weights(rng, window=(2, 2), block=True, pooled=True, norm=False)
    return made | {'head.weight': rng.normal(size=(3, 16)), 'head.bias': rng.normal(size=3)}


def tree_of(arrays, config=None, **hints):
    part, ported = scheme.port(ArraySource(arrays, 'x.pth', config=config), hints=hints)
    return ported, scheme.load(part, ported)


@pytest.mark.parametrize('names', [_HUB_4, _HUB_5])
@pytest.mark.parametrize('kind', ['state', 'fine_tuned'])
def test_hub_names_mean_the_same_weights(request, names, kind):
    unilm = request.getfixturevalue(kind)
    ours, a = tree_of(unilm)
    theirs, b = tree_of(hub(unilm, names))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    differ = {k for k in ours.settings if ours.settings[k] != theirs.settings[k]}
    assert differ == {'ln_eps', 'posemb_rule', 'relative_rule'} and theirs.settings['ln_eps'] == 1e-12
    assert tree_of(hub(unilm, names), {'layer_norm_eps': 1e-6})[0].settings['ln_eps'] == 1e-6


@pytest.mark.parametrize('prefix', ['', 'model.', 'module.'])
def test_containers_and_what_is_left_out(fine_tuned, prefix):
    index = {'blocks.0.attn.relative_position_index': np.zeros((5, 5), np.int64)}
    ported, tree = tree_of({f'{prefix}{name}': a for name, a in (fine_tuned | index).items()})
    assert ported.family == 'beit' and ported.settings['relative'] == 'block' and ported.settings['heads'] == 2
    assert ported.ignored == {
        f'{prefix}blocks.0.attn.relative_position_index': 'buffer, recomputed',
        f'{prefix}head.weight': 'task head', f'{prefix}head.bias': 'task head',
    }  # fmt: skip
    assert 'relative_bias' in tree['Transformer']['encoderblock_1']['MultiHeadDotProductAttention_0']


def test_an_unfused_network_has_no_key_bias(state):
    attention = tree_of(state)[1]['Transformer']['encoderblock_0']['MultiHeadDotProductAttention_0']
    assert set(attention['query']) == set(attention['value']) == {'kernel', 'bias'}
    assert set(attention['key']) == {'kernel'}
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    fused = state['blocks.0.attn.qkv.weight'] @ x
    np.testing.assert_allclose(np.einsum('d,dhk->hk', x, attention['key']['kernel']).ravel(), fused[16:32], atol=1e-5)


def test_the_second_branch_needs_a_known_depth_or_a_hint(state):
    rng = np.random.default_rng(2)
    branched = reference.weights(rng, window=(2, 2), shared=True, vocab=7, branch=2)
    with pytest.raises(UsageError, match='does not tell from which of its 2 blocks it starts: give branch_from='):
        tree_of(branched)
    settings = tree_of(branched, branch_from=1)[0].settings
    assert (settings['branch_from'], settings['branch_depth'], settings['branch_head']) == (1, 2, False)
    deep = reference.weights(rng, window=(2, 2), depth=12, shared=True, vocab=7, branch=2, branch_head=True)
    settings = tree_of(deep)[0].settings
    assert settings['branch_from'] == 9 and settings['branch_head']


def test_codes_beside_the_network_are_kept(state):
    codes = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    ported, tree = tree_of(state | {'quantize.embedding.weight': codes, 'quantize.cluster_size': codes[:, 0]})
    np.testing.assert_array_equal(tree['codebook'], codes)
    assert ported.settings['code_width'] == 4
    assert ported.ignored == {'quantize.cluster_size': "the tokenizer's running counts",
                              'rel_pos_bias.relative_position_index': 'buffer, recomputed'}  # fmt: skip
    part, plan = scheme.port(ArraySource(state | {'quantize.embedding.weight': codes}))
    model, params = loading.build(part, plan)
    assert model.code_width == 4 and params['codebook'].shape == (7, 4)


@pytest.mark.parametrize(
    ('change', 'hints', 'message'),
    [
        (
            {'blocks.1.norm2.weight': None},
            {},
            "x.pth is not a BEiT that vpt_jax knows: it has no 'blocks.1.norm2.weight'",
        ),
        ({'blocks.1.surprise': np.zeros(3)}, {}, "it holds 'blocks.1.surprise'"),
        ({'blocks.1.mlp.fc1.weight': np.zeros(3)}, {}, r"'blocks.1.mlp.fc1.weight' has shape \[3\], expected 2 axes"),
        ({f'rel_pos_bias.{_TABLE}': np.zeros((18, 2))}, {}, 'window that is not square: give window_rows='),
        ({f'rel_pos_bias.{_TABLE}': None}, {}, 'does not tell how many heads its width of 16 is for'),
        ({f'rel_pos_bias.{_TABLE}': None}, {'heads': 3}, '3 heads do not divide its width of 16'),
        ({f'rel_pos_bias.{_TABLE}': None, 'pos_embed': np.zeros((1, 7, 16))}, {'heads': 2}, 'not square'),
        ({f'rel_pos_bias.{_TABLE}': None, 'pos_embed': None}, {'heads': 2}, "it has no 'pos_embed'"),
    ],
)
def test_files_that_cannot_be_read(state, change, hints, message):
    changed = {name: array for name, array in (state | change).items() if array is not None}
    with pytest.raises(UsageError, match=message):
        tree_of(changed, **hints)


def test_tokenizers_are_no_backbones_and_backbones_no_tokenizers(state):
    with pytest.raises(UsageError, match=r"no VQ-KD tokenizer: it has no 'encoder\.cls_token'"):
        vqkd.load(ArraySource(state, 'x.pth'))
    with pytest.raises(UsageError, match='does not hold a network'):
        tree_of({f'encoder.{name}': a for name, a in state.items()})
