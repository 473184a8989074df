"""BEiT v2 in plain float64 numpy over unilm's names, written from the description alone; and weights to try it with."""

import math

import numpy as np

_ERF = np.vectorize(math.erf)


def weights(
    rng, *, width=16, depth=2, heads=2, window=(2, 3), patch=4, channels=3, vocab=0, shared=False, block=False,
    positions=False, biases=True, scales=True, branch=0, branch_head=False, pooled=False, norm=True,
):  # fmt: skip
    """A state dict of unilm's names with random weights."""
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3

    def draw(*shape, scale=0.3):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    def norm_of(name):
        return {f'{name}.weight': 1 + draw(width), f'{name}.bias': draw(width)}

    def block_of(name, table):
        made = {**norm_of(f'{name}.norm1'), **norm_of(f'{name}.norm2'),
                f'{name}.attn.qkv.weight': draw(3 * width, width), f'{name}.attn.proj.weight': draw(width, width),
                f'{name}.attn.proj.bias': draw(width), f'{name}.mlp.fc1.weight': draw(2 * width, width),
                f'{name}.mlp.fc1.bias': draw(2 * width), f'{name}.mlp.fc2.weight': draw(width, 2 * width),
                f'{name}.mlp.fc2.bias': draw(width)}  # fmt: skip
        if biases:
            made |= {f'{name}.attn.q_bias': draw(width), f'{name}.attn.v_bias': draw(width)}
        if scales:
            made |= {f'{name}.gamma_{i}': 0.5 + draw(width) for i in (1, 2)}
        if table:
            made[f'{name}.attn.relative_position_bias_table'] = draw(rows, heads, scale=1.0)
        return made

    state = {'cls_token': draw(1, 1, width), 'patch_embed.proj.weight': draw(width, channels, patch, patch, scale=0.1),
             'patch_embed.proj.bias': draw(width)}  # fmt: skip
    if positions:
        state['pos_embed'] = draw(1, 1 + window[0] * window[1], width)
    if shared:
        state['rel_pos_bias.relative_position_bias_table'] = draw(rows, heads, scale=1.0)
        state['rel_pos_bias.relative_position_index'] = np.zeros((1, 1), np.int64)
    for i in range(depth):
        state |= block_of(f'blocks.{i}', block)
    state |= norm_of('norm') if norm else {}
    state |= norm_of('fc_norm') if pooled else {}
    if vocab:
        state |= {'mask_token': draw(1, 1, width), 'lm_head.weight': draw(vocab, width), 'lm_head.bias': draw(vocab)}
    for i in range(branch):
        state |= block_of(f'cls_pt_layers.{i}', block)
    if branch_head:
        state |= norm_of('cls_pt_norm')
        state |= {'cls_pt_lm_head.weight': draw(vocab, width), 'cls_pt_lm_head.bias': draw(vocab)}
    return state


def bias(table, window, extra=0, mode='zero'):
    """[H, T, T] for CLS, `extra` tokens and a window of patches, pair by pair."""
    cells = [None] * (1 + extra) + [(y, x) for y in range(window[0]) for x in range(window[1])]
    out = np.zeros((table.shape[1], len(cells), len(cells)))
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            if mode == 'zero' and (0 < i <= extra or 0 < j <= extra):
                continue
            if query is None and key is None:
                row = -1
            elif query is None:
                row = -3
            elif key is None:
                row = -2
            else:
                row = (query[0] - key[0] + window[0] - 1) * (2 * window[1] - 1) + query[1] - key[1] + window[1] - 1
            out[:, i, j] = table[row]
    return out


def norm(state, name, x, eps=1e-6):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * state[f'{name}.weight'] + state[f'{name}.bias']


def run_block(state, name, x, heads, added):
    width = x.shape[-1]
    y = norm(state, f'{name}.norm1', x) @ state[f'{name}.attn.qkv.weight'].T.astype(np.float64)
    q, k, v = np.split(y, 3, axis=-1)
    q, v = q + state.get(f'{name}.attn.q_bias', 0), v + state.get(f'{name}.attn.v_bias', 0)
    q, k, v = (a.reshape(*a.shape[:2], heads, -1).transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width // heads) + added
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    y = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    y = y @ state[f'{name}.attn.proj.weight'].T + state[f'{name}.attn.proj.bias']
    x = x + state.get(f'{name}.gamma_1', 1) * y
    y = norm(state, f'{name}.norm2', x) @ state[f'{name}.mlp.fc1.weight'].T + state[f'{name}.mlp.fc1.bias']
    y = y * 0.5 * (1 + _ERF(y / math.sqrt(2)))
    y = y @ state[f'{name}.mlp.fc2.weight'].T + state[f'{name}.mlp.fc2.bias']
    return x + state.get(f'{name}.gamma_2', 1) * y


def embed(state, images, mask=None):
    kernel = state['patch_embed.proj.weight'].astype(np.float64)
    p, (b, h, w, c) = kernel.shape[-1], images.shape
    x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, c * p * p)
    x = x @ kernel.reshape(len(kernel), -1).T + state['patch_embed.proj.bias']
    if mask is not None:
        x = np.where(mask[..., None], state['mask_token'], x)
    x = np.concatenate([np.broadcast_to(state['cls_token'], (b, 1, x.shape[-1])), x], axis=1)
    return x + state.get('pos_embed', 0)


def blocks(state, x, heads, window, extra=0, mode='zero', between=None):
    """What leaves every block, un-normalised; `between(x, i)` is called before block i."""
    depth = len({name.split('.')[1] for name in state if name.startswith('blocks.')})
    out = []
    for i in range(depth):
        x = between(x, i) if between else x
        x = run_block(state, f'blocks.{i}', x, heads, added(state, f'blocks.{i}', window, extra, mode))
        out.append(x)
    return out


def added(state, name, window, extra=0, mode='zero'):
    tables = [state.get(f'{t}.relative_position_bias_table') for t in (f'{name}.attn', 'rel_pos_bias')]
    return sum(bias(t, window, extra, mode) for t in tables if t is not None)


def masked_logits(state, images, mask, heads, window, start=0):
    """Logits of all patches: of the main branch, and of the second if there is one."""
    seen = blocks(state, embed(state, images, mask), heads, window)
    out = [norm(state, 'norm', seen[-1])[:, 1:] @ state['lm_head.weight'].T + state['lm_head.bias']]
    if start:
        t = np.concatenate([seen[-1][:, :1], seen[start - 1][:, 1:]], axis=1)
        for name in sorted(
            {name.rsplit('.norm1', 1)[0] for name in state if 'cls_pt_layers' in name and 'norm1' in name}
        ):
            t = run_block(state, name, t, heads, added(state, name, window))
        own = 'cls_pt_' if 'cls_pt_lm_head.weight' in state else ''
        t = norm(state, f'{own}norm', t)[:, 1:]
        out.append(t @ state[f'{own}lm_head.weight'].T + state[f'{own}lm_head.bias'])
    return out
