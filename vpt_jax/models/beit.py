"""BEiT and BEiT v2 (arXiv 2106.08254, 2208.06366; microsoft/unilm@768a3c87 beit2): ViTs that name masked patches.

The blocks are the ViT's, with relative position biases, without a key bias. One class covers the networks of masked
pretraining (mask token, a head over the tokenizer's vocabulary, v2's second branch from the CLS token) and the
classifiers that come of them.

Shapes: B images, N patches, D width, H heads, V vocabulary, T tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import relative as relatives
from vpt_jax.models.places import UNCHANGED, Context, Places
from vpt_jax.models.transformer import Dense, Encoder
from vpt_jax.models.vit import ViT

RELATIVE = ('none', 'shared', 'block', 'both')


class BEiT(ViT):
    """A ViT with relative position biases and, after masked pretraining, a head that names tokens.

    Tokens that a method inserts between CLS and the patches are no part of the window: `extra_bias` says what their
    pairs get, at every block and for any number of them. Attention to explicit keys has no relative bias.

    Attributes:
      biased: which of query, key and value have a bias, by their first letters.
      relative: which tables there are: 'none', 'shared' (one for all blocks: pretraining), 'block' (one a block:
        classifiers) or 'both', added up.
      relative_rule: how tables are resampled to another grid (`relative.RULES`).
      extra_bias: what inserted tokens get (`relative.EXTRA`).
      window_rows, window_columns: patches that tables and absolute positions are stored for, as in `ViT`.
      mask_token: whether there is a token for masked patches.
      vocab: V, 0 without a head over tokens.
      branch_from: 1-based number of the block whose patches, with the last CLS, feed the second branch; 0 for none.
      branch_depth: blocks of the branch.
      branch_head: whether the branch has its own norm and head.
      code_width: width of the tokenizer's code vectors kept beside the head, 0 for none.
      The others are `ViT`'s.
    """

    biased: str = 'qv'
    relative: str = 'shared'
    relative_rule: str = 'geometric_cubic'
    extra_bias: str = 'zero'
    mask_token: bool = False
    vocab: int = 0
    branch_from: int = 0
    branch_depth: int = 2
    branch_head: bool = False
    code_width: int = 0

    def __post_init__(self):
        for kind, value, known in (
            ('kind of relative position tables', self.relative, RELATIVE),
            ('relative-position resampling rule', self.relative_rule, relatives.RULES),
            ('bias for inserted tokens', self.extra_bias, relatives.EXTRA),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        if self.prefix != 1:
            raise UsageError(f'a BEiT has one token, CLS, before the patches, not {self.prefix}')
        if not 0 <= self.branch_from <= self.depth:
            raise UsageError(f'branch_from={self.branch_from} is no block of a network of {self.depth}')
        if self.vocab and not self.final_norm:
            raise UsageError('a BEiT with a head over tokens needs final_norm=True')
        if (self.branch_from or self.code_width) and not self.vocab:
            raise UsageError('a BEiT with a second branch or with codes needs a head over tokens: vocab > 0')
        super().__post_init__()

    def block_settings(self) -> dict[str, Any]:
        """The settings of every block."""
        return {**super().block_settings(), 'biased': self.biased}

    def setup(self):
        """Makes the sub-modules and parameters."""
        super().setup()
        normal = nn.initializers.normal(0.02)
        if self.mask_token:
            self.mask_embedding = self.param('mask_token', normal, (1, 1, self.width))
        if self.relative in ('shared', 'both'):
            shape = (relatives.table_rows(self.window), self.heads)
            self.table = self.param('relative_bias', nn.initializers.zeros, shape)
        if self.vocab:
            self.head = Dense((self.vocab,), self.dtype, name='lm_head')
        if self.branch_from:
            self.branch = Encoder(self.branch_depth, self.block_settings(), self.branch_head, False, name='branch')
            if self.branch_head:
                self.head_of_branch = Dense((self.vocab,), self.dtype, name='branch_lm_head')
        if self.code_width:
            self.codes = self.param('codebook', normal, (self.vocab, self.code_width))

    def embed(self, images: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """As a ViT's: [B, H, W, C] to [B, 1 + N, D]; where `mask` [B, N] is set, the mask token instead of the patch.

        Masked patches keep their positions.
        """
        x = self.patches(images)
        if mask is not None:
            x = jnp.where(mask.reshape(*x.shape[:3], 1), self.mask_embedding.astype(x.dtype)[:, None], x)
        return self.sequence(x)

    def relative_bias(self, images: jax.Array) -> relatives.RelativeBias | None:
        """What attention adds to its scores, for images [B, H, W, C] of this size."""
        if self.relative == 'none':
            return None
        return relatives.RelativeBias(
            self.grid(*images.shape[1:3]), self.window, self.relative_rule, self.extra_bias,
            self.table if self.relative in ('shared', 'both') else None,
            self.heads if self.relative in ('block', 'both') else 0,
        )  # fmt: skip

    def encode(self, x: jax.Array, method: Places, prompts: Any, ctx: Context, rows: int | None = None) -> jax.Array:
        """The blocks and the final norm, as a `ViT`'s."""
        return self.encoder(x, method, prompts, ctx, self.relative_bias(ctx.images), rows)

    def __call__(self, images: jax.Array, method: Places = UNCHANGED, prompts: Any = None,
                 ctx: Context | None = None) -> jax.Array:  # fmt: skip
        """Features of normalised images; arguments and result are `ViT`'s."""
        if self.is_initializing() and self.vocab:
            self.masked_logits(images)  # a network makes only the parameters that its first call uses
        return super().__call__(images, method, prompts, ctx)

    def predict_tokens(self, x: jax.Array) -> jax.Array:
        """The head over the vocabulary, on normalised tokens: [B, T, D] to logits [B, T, V]."""
        return self.head(x)

    def masked_features(self, images: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Normalised tokens of images with masked patches, in the main and, if there is one, the second branch.

        Args:
          images: [B, H, W, C] float, normalised as the weights expect.
          mask: [B, N] bool, patches to hide; None for none.

        Returns:
          ([B, 1 + N, D], [B, 1 + N, D] or None), CLS first.
        """
        ctx = Context()
        ctx.model, ctx.images = self, images
        x = self.embed(images, mask)
        ctx.prefix, ctx.num_patches = 1, x.shape[1] - 1
        if not self.branch_from:
            return self.encode(x, UNCHANGED, None, ctx), None
        x = self.encode(x, _Watch(self.branch_from, self.depth), None, ctx)
        early, last = ctx.memo['early'], ctx.memo['last']
        t = jnp.concatenate([last[:, :1], early[:, 1:]], axis=1)
        t = self.branch(t, UNCHANGED, None, ctx, self.relative_bias(images))
        return x, t if self.branch_head else self.encoder.norm(t)

    def masked_logits(self, images: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Logits [B, N, V] of all patches from images with masked patches, one array a branch; as `masked_features`."""
        x, t = self.masked_features(images, mask)
        logits = self.predict_tokens(x[:, 1:])
        if t is None:
            return (logits,)
        return logits, (self.head_of_branch if self.branch_head else self.head)(t[:, 1:])


class _Watch(Places):
    """Keeps what comes out of two blocks."""

    def __init__(self, early: int, last: int):
        self.kept = {'early': early, 'last': last}

    def layer(self, prompts, block, x, i, ctx):
        x = block(x)
        for name, number in self.kept.items():
            if ctx.start == number - 1:
                ctx.memo[name] = x
        return x

    def boundaries(self, depth):
        return tuple(b for number in self.kept.values() for b in (number - 1, number))


def initial_params(
    shapes: Mapping, key: jax.Array, *, one_sigma: bool = True, layer_scale: float = 0.1, branch_from: int = 0
) -> dict:
    """Parameters to train from scratch, as published (microsoft/unilm@768a3c87 beit2).

    Kernels, tokens and positions are normal with deviation 0.02, biases, tables and LayerNorms neutral; what the
    branches of block l (from 0) end with is divided by sqrt(2 (l + 1)). Kernels of the second branch are uniform, as
    PyTorch draws them.

    Args:
      shapes: a tree like the network's parameters, blocks one by one.
      key: a jax random key.
      one_sigma: cut the normal at one deviation (pretraining) instead of not at all (classifiers, the tokenizer).
      layer_scale: where layer scales start: 0.1 for the base size, 1e-5 for the large one.
      branch_from: as the network's.

    Returns:
      A tree like `shapes`, float32.
    """
    flat = flatten_dict(dict(shapes))
    # One draw for all arrays: a program with hundreds of them takes minutes to compile.
    ends = np.cumsum([leaf.size for leaf in flat.values()])
    if one_sigma:
        normal = 0.02 * jax.random.truncated_normal(key, -1, 1, (ends[-1],))
    else:
        normal = 0.02 * jax.random.normal(key, (ends[-1],))
    uniform = jax.random.uniform(jax.random.fold_in(key, 1), (ends[-1],), minval=-1)
    drawn = {}
    for (path, leaf), end in zip(flat.items(), ends, strict=True):
        name, part = path[-1], slice(end - leaf.size, end)
        if name == 'scale':
            drawn[path] = jnp.ones(leaf.shape)
        elif name.startswith('layer_scale'):
            drawn[path] = jnp.full(leaf.shape, layer_scale, jnp.float32)
        elif name in ('bias', 'relative_bias'):
            drawn[path] = jnp.zeros(leaf.shape)
        elif path[0] == 'branch':
            # `query`, `key` and `value` have their heads, two axes, as outputs.
            outputs = 2 if path[-2] in ('query', 'key', 'value') else 1
            drawn[path] = math.prod(leaf.shape[:-outputs]) ** -0.5 * uniform[part].reshape(leaf.shape)
        else:
            drawn[path] = normal[part].reshape(leaf.shape)
        block = next((p for p in path if p.startswith('encoderblock_')), '')
        if block and name == 'kernel' and path[-2] in ('out', 'Dense_1'):
            number = int(block.rsplit('_', 1)[1]) + (branch_from if path[0] == 'branch' else 0)
            drawn[path] /= math.sqrt(2 * (number + 1))
    return unflatten_dict(drawn)
