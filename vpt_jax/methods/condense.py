"""PC: prompt condensation, a trained VPT with its unimportant prompts taken out of the sequence (arXiv 2305.17223).

No code was published. The importance of prompt p of block l, from the gradient g of the mean loss: s = |sum_d g_d p_d|,
a first-order estimate of what setting p to zero would change; prompts are ranked over all blocks at once. Definitions
that the paper's readable parts leave open are this project's.

Shapes: B examples, L prompted blocks, n_l prompts of block l, q their stored width (D, or what `project` says).
"""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import UsageError
from vpt_jax.methods.base import Method, PyTree, Stack
from vpt_jax.methods.vpt import VPT, uniform_prompts

#: Importance [n] from gradients [n, q] and prompts [n, q]. Over a data set it is the mean over mini-batches, and for
#: '..._samplemean' over single examples. E2VPT's relative of it (arXiv 2307.13770) is 'signed_taylor'.
SCORES = {
    'taylor_token': lambda g, p: jnp.abs((g * p).sum(-1)),
    'taylor_token_samplemean': lambda g, p: jnp.abs((g * p).sum(-1)),
    'taylor_element': lambda g, p: jnp.abs(g * p).sum(-1),
    'signed_taylor': lambda g, p: (g * p).sum(-1),
    'grad_l2': lambda g, p: jnp.sqrt(jnp.square(g).sum(-1)),
}


@dataclasses.dataclass(frozen=True)
class Condensed(VPT):
    """VPT with a number of prompts of its own in every block, none perhaps; the sequence is as short as they are few.

    Prompts: `rows/l` [n_l, D or q] for every block l that has some, and `proj` as in `VPT`. Blocks of different lengths
    are not scanned.

    Attributes:
      kept: n_l of every prompted block; () for num_tokens in each.
      The others are `VPT`'s.

    Raises:
      UsageError: a negative number, no prompt at all, or settings of VPT that cannot be condensed.
    """

    name: ClassVar[str] = 'condensed'
    kept: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.kept and not (all(isinstance(n, int) and n >= 0 for n in self.kept) and sum(self.kept)):
            raise UsageError(f'method condensed: kept must be numbers >= 0, not all of them 0, got {self.kept}')
        if self.shared or self.last_layers_overwriting_patches or self.pool == 'prompt_pool':
            raise UsageError(
                "prompts that blocks share, that overwrite patches, or that the head reads (pool='prompt_pool') cannot "
                'be condensed; use VPT without these settings'
            )

    def _counts(self, model: Any) -> tuple[int, ...]:
        blocks = (self.deep_layers or model.depth) if self.deep else 1
        return self.kept or (self.num_tokens,) * blocks

    def check(self, model: Any) -> None:
        """Refuses another number of blocks than `kept` has entries."""
        super().check(model)
        expected = len(dataclasses.replace(self, kept=())._counts(model))
        if len(self._counts(model)) != expected:
            raise UsageError(
                f'method condensed: kept has {len(self.kept)} numbers, but the backbone has {expected} prompted blocks'
            )

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws prompts as VPT does, in these numbers."""
        prompts = super().init(key, model, params, num_classes)
        width = self.project or model.width
        rows = {
            str(i): uniform_prompts(jax.random.fold_in(key, i), (n, width), model.patch_size)
            for i, n in enumerate(self._counts(model))
            if n
        }
        return {'rows': rows} | ({'proj': prompts['proj']} if self.project else {})

    def rows(self, prompts: PyTree, i: int | jax.Array) -> jax.Array:
        """The prompts [n_i, D or q] of block i."""
        rows = prompts['rows']
        if str(i) in rows:
            return rows[str(i)]
        some = next(iter(rows.values()))
        return jnp.zeros((0, some.shape[1]), some.dtype)

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Every prompted block, and what follows the last."""
        return tuple(range(1, (self.deep_layers or depth - 1) + 1)) if self.deep else ()


def rows_of(prompts: PyTree, blocks: int) -> list[jax.Array]:
    """The prompts [n_l, D or q] of every prompted block, from the pytree of a VPT (any kind) with so many of them."""
    if 'rows' not in prompts:
        return [prompts['prompts'], *prompts.get('deep', ())]
    empty = next(iter(prompts['rows'].values()))[:0]
    return [prompts['rows'].get(str(i), empty) for i in range(blocks)]


def keep(scores: Sequence[np.ndarray], ratio: float, per_layer: bool = False) -> list[np.ndarray]:
    """Which prompts stay.

    Args:
      scores: importance [n_l] of the prompts of every block.
      ratio: share that stays, in (0, 1]: floor(ratio * number + 0.5) of them.
      per_layer: rank inside every block instead of over all blocks at once.

    Returns:
      The indices that stay in every block, ascending; equal scores keep the lower block and index.

    Raises:
      UsageError: a share out of range, or so small that no prompt stays.
    """
    if not 0 < ratio <= 1:
        raise UsageError(f'the share of prompts to keep must be in (0, 1], got {ratio}')
    groups = [np.asarray(s) for s in scores] if per_layer else [np.concatenate(scores)]
    # 0.7 * 45 is a hair below 31.5.
    kept = [
        np.sort(np.argsort(-group, kind='stable')[: math.floor(ratio * len(group) + 0.5 + 1e-9)]) for group in groups
    ]
    if not sum(map(len, kept)):
        raise UsageError(f'keeping {ratio:g} of {sum(map(len, scores))} prompts leaves none; keep more')
    if per_layer:
        return kept
    ends = np.cumsum([0, *map(len, scores)])
    return [kept[0][(a <= kept[0]) & (kept[0] < b)] - a for a, b in pairwise(ends)]


def condense(method: Method, prompts: PyTree, kept: Sequence[np.ndarray]) -> tuple[Method, PyTree]:
    """A trained VPT, alone or in a stack, with only the prompts in `kept`.

    Args:
      method: the method that was trained.
      prompts: its pytree.
      kept: for every prompted block the indices that stay (`keep`).

    Returns:
      (the method with `Condensed` for its VPT, its pytree).

    Raises:
      UsageError: no VPT in the method, or one that cannot be condensed.
    """
    vpt = prompts_of(method)
    settings = {f.name: getattr(vpt, f.name) for f in dataclasses.fields(VPT)}
    condensed = Condensed(**{**settings, 'kept': tuple(len(k) for k in kept)})
    own = prompts[vpt.name] if isinstance(method, Stack) else prompts
    rows = rows_of(own, len(kept))
    tree = {'rows': {str(i): row[index] for i, (row, index) in enumerate(zip(rows, kept, strict=True)) if len(index)}}
    tree |= {'proj': own['proj']} if vpt.project else {}
    if not isinstance(method, Stack):
        return condensed, tree
    members = [condensed if m is vpt else m for m in method.methods]
    others = {name: value for name, value in prompts.items() if name != vpt.name}
    return Stack(*members), {**others, condensed.name: tree}


def prompts_of(method: Method) -> VPT:
    """The VPT of a method: itself, or the one such member of a stack.

    Raises:
      UsageError: none, or several.
    """
    members = method.methods if isinstance(method, Stack) else (method,)
    found = [m for m in members if isinstance(m, VPT)]
    if len(found) != 1:
        names = ', '.join(m.name for m in members)
        raise UsageError(f'condensing needs a method with one set of VPT prompts (vpt, spt or condensed), got {names}')
    return found[0]
