"""The parts of a pre-norm transformer: attention, MLP, block, encoder, and attention pooling.

Every transformer backbone is made of these; the encoder is where a method's `layer` is called. Parameter names are
big_vision's.

Shapes: B images, T tokens, D width, H heads, k = D / H, F MLP width, L blocks.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.models.network import all_but_weights, whole
from vpt_jax.models.places import Context, Places
from vpt_jax.models.relative import RelativeBias

ACTIVATIONS: dict[str, Callable] = {
    'gelu': lambda x: nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
    'swiglu': nn.silu,
}
#: Activations of MLPs with a gate: the activation of one linear layer times another one.
GATED = ('swiglu',)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Softmax attention of queries [B, T, H, k] over keys and values [B or 1, S, H, k]; returns [B, T, H, k].

    `bias` [B or 1, H, T, S] is added to the scaled scores (relative positions, masks).

    Accelerators take the platform's fused kernel. XLA's CPU backend has none, and there heads-first operands halve
    the time of the two batched products.
    """
    k, v = (jnp.broadcast_to(a, (q.shape[0], *a.shape[1:])) for a in (k, v))
    if jax.default_backend() != 'cpu':
        return jax.nn.dot_product_attention(q, k, v, None if bias is None else bias.astype(q.dtype))
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    scores = jnp.einsum('bhtd,bhsd->bhts', q * (1.0 / math.sqrt(q.shape[-1])), k)
    scores = scores if bias is None else scores + bias.astype(scores.dtype)
    return jnp.swapaxes(jnp.einsum('bhts,bhsd->bhtd', nn.softmax(scores), v), 1, 2)


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """A linear map as one two-dimensional product, whatever the axes.

    XLA's CPU backend computes the kernel's gradient of a product over several batch axes many times slower.

    Args:
      x: [B, T, *inputs].
      kernel: [*inputs, *outputs].
      bias: [*outputs] or None.

    Returns:
      [B, T, *outputs].
    """
    inputs = x.ndim - 2
    outputs = kernel.shape[inputs:]
    y = x.reshape(x.shape[0] * x.shape[1], -1) @ kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
    y = y if bias is None else y + bias.reshape(-1)
    return y.reshape(*x.shape[:2], *outputs)


class Dense(nn.Module):
    """`project` with parameters `kernel` [*inputs, *features] and, unless it has none, `bias` [*features]."""

    features: tuple[int, ...]
    dtype: Any = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, *inputs] to [B, T, *features]."""
        shape = (*x.shape[2:], *self.features)

        def init(key, shape):
            flat = (math.prod(x.shape[2:]), math.prod(self.features))
            return nn.initializers.xavier_uniform()(key, flat).reshape(shape)

        kernel = self.param('kernel', init, shape)
        bias = self.param('bias', nn.initializers.zeros, self.features) if self.use_bias else None
        return project(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value kernels [D, H, k].

    Attributes:
      heads: H.
      dtype: computation type.
      biased: which of query, key and value have a bias, by their first letters; `out` always has one.
      relative: what self-attention adds to its scores by relative position; None for nothing.
    """

    heads: int
    dtype: Any = None
    biased: str = 'qkv'
    relative: RelativeBias | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, keys: jax.Array | None = None, bias: jax.Array | None = None, rows: int | None = None
    ) -> jax.Array:
        """Attends from `x` [B, T, D] to `keys` [B or 1, S, D] (itself if None), with `attention`'s bias.

        Returns:
          [B, T, D]; the first `rows` of the T tokens alone if that is given.
        """
        width = x.shape[-1]
        if self.relative is not None and keys is None:
            shape = self.relative.own_shape
            own = self.param('relative_bias', nn.initializers.zeros, shape) if shape else None
            by_position = self.relative(x.shape[1], own)
            bias = by_position if bias is None else bias + by_position
        keys = x if keys is None else keys
        split = (self.heads, width // self.heads)
        bias = bias if bias is None else bias[:, :, :rows]
        q = Dense(split, self.dtype, 'q' in self.biased, name='query')(x[:, :rows])
        k = Dense(split, self.dtype, 'k' in self.biased, name='key')(keys)
        v = Dense(split, self.dtype, 'v' in self.biased, name='value')(keys)
        return Dense((width,), self.dtype, name='out')(attention(q, k, v, bias))


class Mlp(nn.Module):
    """Dense, activation, Dense; dropout after both if `dropout` > 0.

    With an activation of `GATED`, act(gate(x)) * Dense_0(x) is what the last layer sees (arXiv 2002.05202).
    """

    hidden: int
    activation: str
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        width = x.shape[-1]
        act, up = ACTIVATIONS[self.activation], Dense((self.hidden,), self.dtype, name='Dense_0')
        gate = Dense((self.hidden,), self.dtype, name='gate') if self.activation in GATED else None
        x = act(gate(x)) * up(x) if gate else act(up(x))
        x = nn.Dropout(self.dropout, deterministic=not self.dropout)(x)
        x = Dense((width,), self.dtype, name='Dense_1')(x)
        return nn.Dropout(self.dropout, deterministic=not self.dropout)(x)


def layer_norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
    """A LayerNorm over the last axis."""
    # The fast variance E[x^2] - E[x]^2 loses the digits that parity needs.
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)


class Block(nn.Module):
    """A pre-norm transformer block, callable as a whole or by its parts.

    `attend` and `feed` are the two residual branches; `norm1`, `attention`, `norm2`, `mlp` their parts.

    Attributes:
      rows: gives the first so many tokens only, which saves the work on the others; None for all.
      The others are the parts' settings.
    """

    width: int
    heads: int
    mlp_dim: int
    activation: str
    ln_eps: float
    layer_scale: bool = False
    dropout: float = 0.0
    dtype: Any = None
    biased: str = 'qkv'
    relative: RelativeBias | None = None
    rows: int | None = None

    def setup(self):
        """Makes the sub-modules and parameters."""
        self.norm1 = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_0')
        self.attention = Attention(
            self.heads, self.dtype, self.biased, self.relative, name='MultiHeadDotProductAttention_0'
        )
        self.norm2 = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_1')
        self.mlp = Mlp(self.mlp_dim, self.activation, self.dropout, self.dtype, name='MlpBlock_0')
        if self.layer_scale:
            init = nn.initializers.constant(1e-5)
            self.scale1 = self.param('layer_scale_1', init, (self.width,))
            self.scale2 = self.param('layer_scale_2', init, (self.width,))

    def attend(self, x: jax.Array) -> jax.Array:
        """The attention branch, without the residual: [B, T, D] to [B, T or `rows`, D]."""
        y = self.attention(self.norm1(x), rows=self.rows)
        return y * self.scale1.astype(y.dtype) if self.layer_scale else y

    def feed(self, x: jax.Array, beside: jax.Array | None = None) -> jax.Array:
        """The MLP branch, without the residual: [B, T, D] to [B, T, D]; `beside` is added behind the norm."""
        y = self.norm2(x)
        y = self.mlp(y if beside is None else y + beside)
        return y * self.scale2.astype(y.dtype) if self.layer_scale else y

    def __call__(self, x: jax.Array) -> jax.Array:
        """The whole block: [B, T, D] to [B, T or `rows`, D]."""
        x = x[:, : self.rows] + self.attend(x)
        return x + self.feed(x)


class Encoder(nn.Module):
    """The stack of blocks and the final norm, with a method's `layer` around every block.

    With `scan` the blocks' parameters are one tree, `encoderblock`, with a leading axis of L (scheme S3), and each run
    of blocks that the method treats alike is compiled once.
    """

    depth: int
    block: dict
    final_norm: bool
    scan: bool

    def setup(self):
        """Makes the final norm, which a backbone may apply to other tokens too."""
        if self.final_norm:
            self.norm = layer_norm(self.block['ln_eps'], self.block['dtype'], 'encoder_norm')

    @nn.compact
    def __call__(
        self, x: jax.Array, method: Places, prompts: Any, ctx: Context, relative: RelativeBias | None = None,
        rows: int | None = None,
    ) -> jax.Array:  # fmt: skip
        """Runs the blocks over [B, T, D]; a method may change T on the way.

        Args:
          x, method, prompts, ctx: as everywhere.
          relative: what attention adds to its scores by relative position.
          rows: how many of the first tokens are read, None for all; the last block may leave out the others.
        """
        run = self._scanned if self.scan else self._unrolled
        x = run({**self.block, 'relative': relative}, x, method, prompts, ctx, rows)
        return self.norm(x) if self.final_norm else x

    def _unrolled(self, settings, x, method, prompts, ctx, rows):
        for i in range(self.depth):
            ctx.start = i
            kept = rows if i == self.depth - 1 else None
            x = method.layer(prompts, Block(**settings, rows=kept, name=f'encoderblock_{i}'), x, i, ctx)
        return x

    def _scanned(self, settings, x, method, prompts, ctx, rows):  # where all blocks are one, all give all tokens
        def init(key):
            block = Block(**{**settings, 'dropout': 0.0}, parent=None)
            sample = jnp.zeros((1, *x.shape[1:]))
            return jax.vmap(lambda k: block.init(k, sample)['params'])(jax.random.split(key, self.depth))

        stacked = self.param('encoderblock', init)
        key = self.make_rng('dropout') if self.block['dropout'] else None

        def step(x, args):
            i, params = args
            params = whole(params)
            rngs = {} if key is None else {'dropout': jax.random.fold_in(key, i)}
            block = Block(**settings, parent=None).bind({'params': params}, rngs=rngs)
            return method.layer(prompts, block, x, i, ctx), None

        scanned = jax.checkpoint(step, prevent_cse=False, policy=all_but_weights)
        inside = [b for b in method.boundaries(self.depth) if 0 < b < self.depth]
        for start, stop in pairwise(sorted({0, self.depth, *inside})):
            ctx.start = start
            run = jax.tree.map(lambda a, s=start, e=stop: a[s:e], stacked)
            if stop - start == 1:
                x, _ = step(x, (start, jax.tree.map(lambda a: a[0], run)))
            else:
                x, _ = jax.lax.scan(scanned, x, (jnp.arange(start, stop), run))
        return x


class MAPHead(nn.Module):
    """Multi-head attention pooling: a learned probe attends to the tokens, then a residual MLP."""

    heads: int
    mlp_dim: int
    activation: str
    ln_eps: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pools [B, T, D] to [B, D]."""
        probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = Attention(self.heads, self.dtype, name='MultiHeadDotProductAttention_0')(probe, x)
        y = layer_norm(self.ln_eps, self.dtype, 'LayerNorm_0')(x)
        x = x + Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name='MlpBlock_0')(y)
        return x[:, 0]


def stack_blocks(params: dict) -> dict:
    """The parameter tree of `scan=True` (one `encoderblock`, leading axis L) from one tree per block."""
    blocks = dict(params['Transformer'])
    count = sum(name.startswith('encoderblock_') for name in blocks)
    each = [blocks.pop(f'encoderblock_{i}') for i in range(count)]
    # Arrays of the host stay there: of a backbone that is to be split, no device can hold all.
    blocks['encoderblock'] = jax.tree.map(
        lambda *a: (np if all(isinstance(leaf, np.ndarray) for leaf in a) else jnp).stack(a), *each
    )
    return {**params, 'Transformer': blocks}


def unstack_blocks(params: dict) -> dict:
    """The inverse of `stack_blocks`."""
    blocks = dict(params['Transformer'])
    stacked = blocks.pop('encoderblock')
    count = jax.tree.leaves(stacked)[0].shape[0]
    blocks |= {f'encoderblock_{i}': jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(count)}
    return {**params, 'Transformer': blocks}
