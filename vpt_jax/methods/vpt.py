"""VPT: Visual Prompt Tuning, shallow and deep (arXiv 2203.12119; KMnP/vpt@4410440).

Shallow: H_0 = [c; P_0; X_0], H_{l+1} = Block_l(H_l). Deep: H_{l+1} = Block_l([c_l; P_l; X_l]), every block with its own
P_l; what a block made of its prompts is thrown away. Prompts get no position embedding.

Shapes: B images, P prompts, D width, q projected width, L blocks.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.models.initialisers import kaiming_normal_fan_out, torch_uniform
from vpt_jax.models.places import Context

POOLS = ('original', 'imgprompt_pool', 'img_pool', 'prompt_pool')


def check_num_tokens(method: str, num_tokens: int) -> None:
    """Refuses a number of prompts below 1.

    Raises:
      UsageError: naming the method and the number.
    """
    if num_tokens < 1:
        raise UsageError(f'method {method}: num_tokens must be >= 1, got {num_tokens}')


def check_dropout(method: str, **rates: float) -> None:
    """Refuses dropout rates outside [0, 1).

    Raises:
      UsageError: naming the method, the setting and the rate.
    """
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise UsageError(f'method {method}: {name} must be in [0, 1), got {rate}')


def uniform_prompts(key: jax.Array, shape: tuple[int, ...], patch_size: int) -> jax.Array:
    """U(-v, v) with v = sqrt(6 / (3 p^2 + w)), w the last axis of `shape`: Xavier over the patch projection."""
    bound = math.sqrt(6.0 / (3 * patch_size**2 + shape[-1]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


@dataclasses.dataclass(frozen=True)
class VPT(Method):
    """Learned tokens between CLS and the patches.

    Prompts: `prompts` [P, D or q]; deep: `deep` [layers - 1, P, D or q]; projected: `proj/{kernel [q, D], bias [D]}`.

    Attributes:
      num_tokens: P.
      deep: new prompts before every block, not only before the first.
      dropout: element-wise, on the expanded [B, P, D] prompts, in training.
      project: q; prompts of this width go through one shared linear layer. None for prompts of width D.
      deep_layers: deep prompts in the first so many blocks only; after these the prompts travel on transformed.
      drop_after: with `deep_layers`: take the prompts out after those blocks (the original's no-expand).
      shared: every block gets the same prompts again. The original also allocates, counts and never uses the deep ones.
      pool: head input: 'original' (the backbone's own), or the mean over 'imgprompt_pool' (everything but the prefix),
        'img_pool' (patches), 'prompt_pool' (prompts), after the final norm.
      last_layers_overwriting_patches: the published REVERSE_DEEP with its error: only the last so many blocks get
        prompts, and the first of them overwrites the first P patches, which are lost. For reproduction only.

    Raises:
      UsageError: a setting out of range, or settings that exclude each other.
    """

    name: ClassVar[str] = 'vpt'
    feeds_blocks: ClassVar[bool] = True
    num_tokens: int = 5
    deep: bool = False
    dropout: float = 0.0
    project: int | None = None
    deep_layers: int | None = None
    drop_after: bool = False
    shared: bool = False
    pool: str = 'original'
    last_layers_overwriting_patches: int | None = None

    def __post_init__(self):
        check_num_tokens(self.name, self.num_tokens)
        check_dropout(self.name, dropout=self.dropout)
        if self.pool not in POOLS:
            raise unknown('VPT pooling', self.pool, POOLS)
        for setting in ('project', 'deep_layers', 'last_layers_overwriting_patches'):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise UsageError(f'method {self.name}: {setting} must be >= 1 or None, got {value}')
        deep_only = {
            'deep_layers': self.deep_layers,
            'shared': self.shared,
            'last_layers_overwriting_patches': self.last_layers_overwriting_patches,
        }
        for setting, value in deep_only.items():
            if value and not self.deep:
                raise UsageError(f'method {self.name}: {setting}={value} needs deep=True')
        if self.drop_after and self.deep_layers is None:
            raise UsageError(f'method {self.name}: drop_after=True needs deep_layers')
        if self.drop_after and self.pool == 'prompt_pool':
            raise UsageError(
                f"method {self.name}: pool='prompt_pool' needs prompts at the end, but drop_after=True drops them"
            )
        if self.last_layers_overwriting_patches and (self.deep_layers or self.shared):
            raise UsageError(f'method {self.name}: last_layers_overwriting_patches excludes deep_layers and shared')

    def check(self, model: Any) -> None:
        """Refuses more prompted blocks than the backbone has."""
        super().check(model)
        for setting in ('deep_layers', 'last_layers_overwriting_patches'):
            if (getattr(self, setting) or 0) > model.depth:
                raise UsageError(
                    f'method {self.name}: {setting}={getattr(self, setting)}, but the backbone has {model.depth} blocks'
                )

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the prompts."""
        k1, k2, k3, k4 = jax.random.split(key, 4)
        width, patch = self.project or model.width, model.patch_size
        prompts = {}
        if not self.last_layers_overwriting_patches:
            prompts['prompts'] = uniform_prompts(k1, (self.num_tokens, width), patch)
        rows = self.last_layers_overwriting_patches or (self.deep_layers or model.depth) - 1
        if self.deep and not self.shared and rows:
            prompts['deep'] = uniform_prompts(k2, (rows, self.num_tokens, width), patch)
        if self.project:
            prompts['proj'] = {
                'kernel': kaiming_normal_fan_out(k3, (self.project, model.width)),
                'bias': torch_uniform(k4, (model.width,), self.project),
            }
        return prompts

    def rows(self, prompts: PyTree, i: int | jax.Array) -> jax.Array:
        """The prompts [P, D or q] of block i, as they are stored; `i` is 0, or >= 1 and perhaps traced."""
        first = self.shared or (isinstance(i, int) and i == 0)
        return prompts['prompts'] if first else prompts['deep'][i - 1]

    def expand(self, prompts: PyTree, rows: jax.Array, batch: int, i: int | jax.Array, ctx: Context) -> jax.Array:
        """Prompts [P, D or q] of block i as the tokens [B, P, D] that enter it."""
        if self.project:
            rows = rows @ prompts['proj']['kernel'] + prompts['proj']['bias']
        rows = jnp.broadcast_to(rows, (batch, *rows.shape))
        return ctx.dropout(rows, self.dropout, 'prompts', i)

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Inserts the first prompts."""
        if self.last_layers_overwriting_patches:
            return x
        return ctx.insert(x, self.expand(prompts, self.rows(prompts, 0), x.shape[0], 0, ctx))

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """Replaces the prompts before a deep block."""
        depth = ctx.model.depth
        if self.last_layers_overwriting_patches:
            first = depth - self.last_layers_overwriting_patches
            if ctx.start == first:
                ctx.claim(self.num_tokens)
            if ctx.start >= first:
                x = ctx.replace(x, self.expand(prompts, prompts['deep'][i - first], x.shape[0], i, ctx))
        elif self.deep:
            layers = self.deep_layers or depth
            if 0 < ctx.start < layers:
                x = ctx.replace(x, self.expand(prompts, self.rows(prompts, i), x.shape[0], i, ctx))
            elif self.drop_after and ctx.start == layers:
                x = ctx.replace(x, None)
        return block(x)

    def readout(self, prompts: PyTree, x: jax.Array, pool: Callable, ctx: Context) -> jax.Array:
        """The published pooling variants."""
        if self.pool == 'imgprompt_pool':
            return x[:, ctx.prefix :].mean(axis=1)
        if self.pool == 'img_pool':
            return ctx.patches(x).mean(axis=1)
        if self.pool == 'prompt_pool':
            return ctx.own(x).mean(axis=1)
        return pool(x)

    def changes(self, place: str) -> bool:
        """VPT leaves the readout alone unless a pooling variant is chosen."""
        return super().changes(place) and (place != 'readout' or self.pool != 'original')

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Block 0 differs from the others, and so does what follows the last prompted block."""
        if self.last_layers_overwriting_patches:
            first = depth - self.last_layers_overwriting_patches
            return (first, first + 1)
        if not self.deep:
            return ()
        return (1, self.deep_layers, self.deep_layers + 1) if self.deep_layers else (1,)
