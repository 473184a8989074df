"""VPTM: visual prompt learning as masked visual token modeling (arXiv 2303.04998), in this project's reading of it.

No code was published, and of the paper little more than the abstract could be read: docs/vptm.md says which choices
are the paper's and which are ours. A network of masked pretraining sees [CLS; P; MASK; X] and names a visual token at
MASK; a prototypical verbalizer turns the name into a class:

    h = norm(x)[MASK];  z = lm_head(h);  r = z;  u = W^T r;  score_k = cos(u, c_k) / tau

Nothing tells the inserted tokens where they are, so their order does not matter.

Shapes: B images, P prompts, D width, L blocks, V vocabulary, R width of r, d of prototypes, C classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import MissingPlace, UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.methods.vpt import uniform_prompts
from vpt_jax.models.initialisers import torch_uniform
from vpt_jax.models.places import Context

READS = ('logits', 'probs', 'codebook', 'hidden')


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


#: From u [B, d] and prototypes [C, d] to scores [B, C].
SIMILARITIES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'cosine': lambda u, c: _unit(u) @ _unit(c).T,
    'dot': lambda u, c: u @ c.T,
    'neg_sq_l2': lambda u, c: -jnp.square(u[:, None] - c).sum(-1),
}


@dataclasses.dataclass(frozen=True)
class VPTM(Method):
    """Prompts and a mask token, whose predicted visual token is compared with a prototype for every class.

    Prompts: `prompts` [P, D]; deep: `deep` [L - 1, P, D]; `mask_token` [D] if trained; `projection` [R, d] if there is
    one; `prototypes` [C, d].

    Attributes:
      num_tokens: P; 0 for the mask token alone.
      deep: new prompts before every block; MASK, like CLS and the patches, flows on.
      read: r: 'logits' over the vocabulary, their softmax 'probs', the expected code vector 'codebook', or the
        network's own state at MASK, 'hidden'.
      prototype_dim: d; 0 for prototypes of r's own width, without a projection.
      similarity: a name of `SIMILARITIES`.
      temperature: tau.
      train_mask: whether MASK, which starts as pretrained, is trained too.

    Raises:
      UsageError: a setting out of range.
    """

    name: ClassVar[str] = 'vptm'
    num_tokens: int = 10
    deep: bool = False
    read: str = 'logits'
    prototype_dim: int = 128
    similarity: str = 'cosine'
    temperature: float = 0.1
    train_mask: bool = False

    def __post_init__(self):
        for kind, value, known in (('readout', self.read, READS), ('similarity', self.similarity, SIMILARITIES)):
            if value not in known:
                raise unknown(f'{kind} of method vptm', value, known)
        for setting in ('num_tokens', 'prototype_dim'):
            if getattr(self, setting) < 0:
                raise UsageError(f'method vptm: {setting} must be >= 0, got {getattr(self, setting)}')
        if not self.temperature > 0:
            raise UsageError(f'method vptm: temperature must be > 0, got {self.temperature}')
        if self.deep and not self.num_tokens:
            raise UsageError('method vptm: deep=True needs num_tokens >= 1')

    def check(self, model: Any) -> None:
        """Refuses networks without mask token and head over visual tokens, or without the codes that are asked for."""
        super().check(model)
        if not (getattr(model, 'mask_token', False) and getattr(model, 'vocab', 0)):
            raise MissingPlace(
                'mask token',
                f'method vptm needs a network of masked pretraining, with its mask token and its head over visual '
                f'tokens, and this {type(model).__name__} lacks them: use a BEiT as pretrained, not one fine-tuned',
            )
        if self.read == 'codebook' and not model.code_width:
            raise UsageError(
                "method vptm: read='codebook' needs the code vectors of the tokenizer with the backbone, which this "
                'one comes without; use another read, or weights that hold quantize.embedding.weight'
            )

    def _read_width(self, model: Any) -> int:
        return {'hidden': model.width, 'codebook': model.code_width}.get(self.read, model.vocab)

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws prompts, projection and prototypes; takes the mask token over."""
        k1, k2, k3, k4 = jax.random.split(key, 4)
        width, read = model.width, self._read_width(model)
        prompts = {}
        if self.num_tokens:
            prompts['prompts'] = uniform_prompts(k1, (self.num_tokens, width), model.patch_size)
        if self.deep and model.depth > 1:
            prompts['deep'] = uniform_prompts(k2, (model.depth - 1, self.num_tokens, width), model.patch_size)
        if self.train_mask:
            prompts['mask_token'] = jnp.asarray(params['mask_token'], jnp.float32).reshape(width)
        if self.prototype_dim:
            # The default of a linear layer of PyTorch, as in the prototypical verbalizer of text (arXiv 2203.09770).
            prompts['projection'] = torch_uniform(k3, (read, self.prototype_dim), read)
        shape = (num_classes, self.prototype_dim or read)
        return {**prompts, 'prototypes': jax.nn.initializers.xavier_uniform()(k4, shape)}

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Inserts prompts and mask token, in this order."""
        mask = prompts['mask_token'] if self.train_mask else ctx.model.mask_embedding
        mask = jnp.broadcast_to(mask.reshape(1, 1, -1).astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        return ctx.insert(x, self._before(prompts.get('prompts'), mask))

    def _before(self, rows: jax.Array | None, mask: jax.Array) -> jax.Array:
        """Prompts [P, D] before the mask token [B, 1, D]: [B, P + 1, D]."""
        if rows is None:
            return mask
        rows = jnp.broadcast_to(rows.astype(mask.dtype), (mask.shape[0], *rows.shape))
        return jnp.concatenate([rows, mask], axis=1)

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """Replaces the prompts before a deep block."""
        if self.deep and ctx.start:
            x = ctx.replace(x, self._before(prompts['deep'][i - 1], ctx.own(x)[:, -1:]))
        return block(x)

    def readout(self, prompts: PyTree, x: jax.Array, pool: Callable, ctx: Context) -> jax.Array:
        """What is read at MASK: [B, R]."""
        hidden = ctx.own(x)[:, -1:]
        if self.read == 'hidden':
            return hidden[:, 0].astype(jnp.float32)
        logits = ctx.model.predict_tokens(hidden)[:, 0].astype(jnp.float32)
        if self.read == 'logits':
            return logits
        probs = jax.nn.softmax(logits)
        return probs if self.read == 'probs' else probs @ ctx.model.codes.astype(jnp.float32)

    def project(self, prompts: PyTree, read: jax.Array) -> jax.Array:
        """From r [B, R] to what is compared with prototypes, u [B, d]."""
        return read @ prompts['projection'] if self.prototype_dim else read

    def logits(self, prompts: PyTree, features: jax.Array, ctx: Context) -> jax.Array:
        """The verbalizer: class scores [B, C] from r [B, R]."""
        compare = SIMILARITIES[self.similarity]
        return compare(self.project(prompts, features), prompts['prototypes']) / self.temperature

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Block 0 differs from the others if deep."""
        return (1,) if self.deep else ()
