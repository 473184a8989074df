"""CVPT: prompts that image tokens attend to instead of meeting them in self-attention (arXiv 2408.14961; ICCV 2025).

CA_i(X) = softmax((X W_q + b_q) (p_i W_k + b_k)^T / sqrt(k)) (p_i W_v + b_v) W_o + b_o, head by head, over the P prompts
of block i only. X is the residual stream as it is, with CLS, and p_i the parameter as it is: no norm, gate or scale.
Published (position 3): X <- X + SA(LN(X)); X <- X + CA_i(X); X <- X + MLP(LN(X)). Source: Xlgsyzp/CVPT@5765f0e.

Shapes: B images, T tokens, P prompts, D width of a block, L blocks, n prompted blocks of a width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import MissingPlace, UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.methods.vpt import check_dropout, check_num_tokens
from vpt_jax.models.places import Context, Places

SHARINGS = ('frozen', 'trained', 'random', 'random_frozen')


class _Attentions(Places):
    """Notes the attention weights of every block, or others of the same shapes, drawn from `key` as a network's are."""

    def __init__(self, key: jax.Array | None):
        self.key = key

    def layer(self, prompts, block, x, i, ctx):
        if self.key is None:
            weights = block.attention.variables['params']
            ctx.memo[ctx.start] = {name: weights[name] for name in ('query', 'key', 'value', 'out')}
        else:
            sample, own_key = jnp.zeros((1, 1, x.shape[-1])), jax.random.fold_in(self.key, ctx.start)
            ctx.memo[ctx.start] = block.attention.clone(parent=None).init(own_key, sample, sample)['params']
        return block(x)

    def boundaries(self, depth):
        return tuple(range(depth))


@dataclasses.dataclass(frozen=True)
class CVPT(Method):
    """Cross-attention to learned prompts in every block, or in some.

    Everything is keyed by the width D of the blocks ('768'), because blocks of hierarchical networks differ in it.
    Prompts: `prompts/D` [n, P, D]; `attention/D`, the trained cross-attentions with a leading axis of n, where there
    are such. State: `attention/D` likewise for 'random_frozen'.

    Attributes:
      num_tokens: P.
      position: where the cross-attention stands. 1: before self-attention; 2: beside it; 3: between it and the MLP, as
        published; 4: added to the MLP's normalised input; 5: after the MLP.
      sharing: the cross-attention's weights. 'frozen': the block's own self-attention, as published; 'trained': a copy
        of it, trained while self-attention stays; 'random', 'random_frozen': drawn anew (Xavier), trained or not.
      layers: the prompted blocks, ascending; () for all. The published code has only all.
      dropout: element-wise, on the expanded [B, P, D] prompts, in training; published 0.1.
      drop_path: in training, whole branches of a block are dropped for an image, at a rate that rises linearly from 0
        in block 0 to this in the last, on the frozen branches too; published 0.1. In positions 2 and 4 the
        cross-attention is inside such a branch.
      prompt_init: 'xavier', U(-v, v) with v = sqrt(6 / ((P + n) D)) as torch counts a [n, P, D] tensor, or 'zeros'.

    Raises:
      UsageError: a setting out of range.
    """

    name: ClassVar[str] = 'cvpt'
    rewrites_block: ClassVar[bool] = True
    num_tokens: int = 10
    position: int = 3
    sharing: str = 'frozen'
    layers: tuple[int, ...] = ()
    dropout: float = 0.1
    drop_path: float = 0.1
    prompt_init: str = 'xavier'

    def __post_init__(self):
        check_num_tokens(self.name, self.num_tokens)
        check_dropout(self.name, dropout=self.dropout, drop_path=self.drop_path)
        if self.position not in range(1, 6):
            raise UsageError(f'method cvpt: position must be 1, 2, 3, 4 or 5, got {self.position}')
        for kind, value, known in (
            ('sharing of weights in CVPT', self.sharing, SHARINGS),
            ('initialisation of CVPT prompts', self.prompt_init, ('xavier', 'zeros')),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        if list(self.layers) != sorted({i for i in self.layers if isinstance(i, int) and i >= 0}):
            raise UsageError(f'method cvpt: layers are different block numbers >= 0, ascending, got {self.layers}')

    def check(self, model: Any) -> None:
        """Refuses a backbone whose blocks have no attention, or fewer blocks than `layers` names."""
        super().check(model)
        if 'attention' not in model.places:
            raise MissingPlace(
                'attention',
                f"method 'cvpt' needs the 'attention' of every block, which {type(model).__name__} does not offer; "
                'choose another method or backbone',
            )
        if self.layers and self.layers[-1] >= model.depth:
            raise UsageError(
                f'method cvpt: layers names block {self.layers[-1]}, but the backbone has blocks 0 to {model.depth - 1}'
            )

    def _rows(self, model: Any) -> dict[str, list[int]]:
        """The prompted blocks of every width."""
        rows: dict[str, list[int]] = {}
        for i in self.layers or range(model.depth):
            rows.setdefault(str(model.activation_shape(i)[-1]), []).append(i)
        return rows

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the prompts; copies or draws the attentions that are trained."""
        rows, prompts = self._rows(model), {}
        k1, k2 = jax.random.split(key)
        for width, blocks in rows.items():
            shape = (len(blocks), self.num_tokens, int(width))
            bound = math.sqrt(6 / ((self.num_tokens + len(blocks)) * int(width)))
            bound = bound if self.prompt_init == 'xavier' else 0.0
            key = jax.random.fold_in(k1, int(width))
            prompts[width] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        if self.sharing not in ('trained', 'random'):
            return {'prompts': prompts}
        attention = self._attention(model, model.stored(params), k2 if self.sharing == 'random' else None)
        return {'prompts': prompts, 'attention': attention}

    def init_state(self, model: Any, num_classes: int = 0, key: jax.Array | None = None) -> PyTree:
        """The random attentions that are not trained."""
        if self.sharing != 'random_frozen':
            return {}
        key = jax.random.key(0) if key is None else key

        def draw() -> PyTree:
            images = jnp.zeros((1, model.image_size, model.image_size, 3))
            return self._attention(model, model.init(key, images)['params'], key)

        return {'attention': jax.jit(draw)()}  # compiled, nothing of the network itself is drawn or run

    def _attention(self, model: Any, stored: PyTree, key: jax.Array | None) -> PyTree:
        """Copies of the prompted blocks' attentions, or other weights in their shapes if there is a key."""
        ctx, images = Context(), jnp.zeros((1, model.image_size, model.image_size, 3))
        model.apply({'params': stored}, images, _Attentions(key), None, ctx)
        return {
            width: jax.tree.map(lambda *a: jnp.stack(a).astype(jnp.float32), *(ctx.memo[i] for i in blocks))
            for width, blocks in self._rows(model).items()
        }

    def cross(self, prompts: PyTree, block: Any, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """CA_i of tokens [B, T, D] or a map [B, H, W, D], of the same shape."""
        width = str(x.shape[-1])
        blocks = self._rows(ctx.model)[width]
        row = blocks.index(ctx.start) + (i - ctx.start)
        keys = prompts['prompts'][width][row][None].astype(x.dtype)
        if ctx.train and self.dropout:
            keys = ctx.dropout(jnp.broadcast_to(keys, (x.shape[0], *keys.shape[1:])), self.dropout, 'prompts', i)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.sharing == 'frozen':
            return block.attention(tokens, keys).reshape(x.shape)
        weights = (ctx.state if self.sharing == 'random_frozen' else prompts)['attention'][width]
        weights = jax.tree.map(lambda a: a[row], weights)
        return block.attention.clone(parent=None).apply({'params': weights}, tokens, keys).reshape(x.shape)

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """The block with cross-attention at its position."""
        position = self.position if self._prompted(ctx.start) else 0
        if not position and not (ctx.train and self.drop_path):
            return block(x)

        def cross(x: jax.Array) -> jax.Array:
            return self.cross(prompts, block, x, i, ctx)

        def path(y: jax.Array, branch: str) -> jax.Array:
            rate = self.drop_path * i / max(ctx.model.depth - 1, 1)
            return ctx.dropout(y, rate, branch, i, shared=tuple(range(1, y.ndim)))

        if position == 1:
            x = x + cross(x)
        y = block.attend(x)
        x = x + path(y + cross(x) if position == 2 else y, 'attend')
        if position == 3:
            x = x + cross(x)
        x = x + path(block.feed(x, cross(x)) if position == 4 else block.feed(x), 'feed')
        return x + cross(x) if position == 5 else x

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Where prompted blocks begin or end."""
        return tuple(i for i in range(1, depth) if self._prompted(i) != self._prompted(i - 1))

    def first_block(self, model: Any) -> int:
        """The first prompted block."""
        return next((i for i in range(model.depth) if self._prompted(i)), model.depth)

    def _prompted(self, i: int) -> bool:
        return not self.layers or i in self.layers
