"""VAPT: Visual Adaptive Prompt Tuning (arXiv 2501.18936; Minhchuyentoancbn/VAPT@ff3e65b).

VPT-deep whose prompts, from block V on, are computed from the patch tokens X [B, N, D] that enter the block:

    Xn = LayerNorm_j(X);  Y = conv(Xn, F_j);  Q = A_j Y + a_j;  P = W_2 act(W_1 Q) * s + Q

with one K x K kernel per block, shared by all channels, over the G x G' grid of patches; A_j mixes positions into P
prompts; W_1, W_2 are one small bottleneck for all blocks. The skip "+ Q" is in the published code, not in the paper's
formula. Convolution and mix are both linear over positions and the same for every channel, so they are multiplied out
first: one [P, N] matrix per block and a single matrix product with the tokens, for any grid.

Shapes: B images, P prompts, D width, N = G G' patches, H H' map after the convolution, r hidden width, L blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.base import Method, PyTree
from vpt_jax.methods.vpt import check_dropout, check_num_tokens, uniform_prompts
from vpt_jax.models import patch_grid
from vpt_jax.models.initialisers import torch_uniform
from vpt_jax.models.places import Context

ACTIVATIONS: dict[str, Callable] = {
    'relu': jax.nn.relu,  # its gradient at 0 is 0, as in the reference; training starts exactly there
    'sigmoid': jax.nn.sigmoid,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'attention': lambda x: jax.nn.softmax(x, axis=-1),
    'identity': lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class VAPT(Method):
    """Input-adaptive deep prompts.

    Prompts (J = L - V adaptive blocks): `prompts` [P, D]; V > 1: `deep` [V - 1, P, D]; `norm/{scale, bias}` [J, D];
    `conv/kernel` [J, K, K] ([J, K, K, D] if depthwise); `mix/{kernel [J, H H', P], bias [J, P]}`;
    `proj/{down [D, r], up [r, D]}`, and `scale` [1] if learnable (all [J, ...] if the projector is not shared). At
    first every adaptive prompt is the zero vector.

    Attributes:
      num_tokens: P.
      dropout: of the static prompts, in training.
      hidden: r.
      projector_dropout: after the projector's activation, in training.
      activation: a name of `ACTIVATIONS`; 'attention' is a softmax over the r hidden units.
      conv: False mixes the normalised tokens directly.
      kernel, padding: K and the zero padding of the convolution.
      map_dropout: share of (image, channel) maps dropped before the mix in training; the original's fixed 0.1.
      depthwise: a kernel per channel (the original's CHANNELWISE=False).
      projector: False leaves P = Q.
      shared_projector: one projector for all blocks.
      static_layers: V, how many blocks take static prompts.
      learnable_scale: s is trained, from 1.

    Raises:
      UsageError: a setting out of range, or settings that exclude each other.
    """

    name: ClassVar[str] = 'vapt'
    feeds_blocks: ClassVar[bool] = True
    num_tokens: int = 5
    dropout: float = 0.0
    hidden: int = 8
    projector_dropout: float = 0.1
    activation: str = 'relu'
    conv: bool = True
    kernel: int = 2
    padding: int = 0
    map_dropout: float = 0.1
    depthwise: bool = False
    projector: bool = True
    shared_projector: bool = True
    static_layers: int = 1
    learnable_scale: bool = False
    ln_eps: ClassVar[float] = 1e-5

    def __post_init__(self):
        check_num_tokens(self.name, self.num_tokens)
        check_dropout(
            self.name, dropout=self.dropout, projector_dropout=self.projector_dropout, map_dropout=self.map_dropout
        )
        if self.activation not in ACTIVATIONS:
            raise unknown('VAPT activation', self.activation, ACTIVATIONS)
        for setting, low in (('hidden', 1), ('kernel', 1), ('padding', 0), ('static_layers', 1)):
            if getattr(self, setting) < low:
                raise UsageError(f'method vapt: {setting} must be >= {low}, got {getattr(self, setting)}')
        if self.depthwise and not self.conv:
            raise UsageError('method vapt: depthwise=True needs conv=True')
        if not self.projector and (self.learnable_scale or not self.shared_projector):
            raise UsageError('method vapt: learnable_scale and shared_projector=False need projector=True')

    def check(self, model: Any) -> None:
        """Refuses a backbone with fewer blocks than static layers, or a grid smaller than the kernel."""
        super().check(model)
        if self.static_layers > model.depth:
            raise UsageError(
                f'method vapt: static_layers={self.static_layers}, but the backbone has {model.depth} blocks'
            )
        if min(self._map(model.grid(model.image_size))) < 1:
            raise UsageError(
                f'method vapt: a kernel of {self.kernel} with padding {self.padding} does not fit a grid of '
                f'{model.grid(model.image_size)} patches; use a smaller kernel or larger images'
            )

    def _map(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns after the convolution."""
        return patch_grid.map_of(grid, self.kernel, self.padding) if self.conv else grid

    def init(self, key: jax.Array, model: Any, params: PyTree, num_classes: int) -> PyTree:
        """Draws the prompts and their generator."""
        keys = jax.random.split(key, 5)
        width, hidden, count = model.width, self.hidden, self.num_tokens
        adaptive = model.depth - self.static_layers
        rows, columns = self._map(model.grid(model.image_size))
        prompts = {'prompts': uniform_prompts(keys[0], (count, width), model.patch_size)}
        if self.static_layers > 1:
            prompts['deep'] = uniform_prompts(keys[1], (self.static_layers - 1, count, width), model.patch_size)
        if not adaptive:
            return prompts
        prompts['norm'] = {'scale': jnp.ones((adaptive, width)), 'bias': jnp.zeros((adaptive, width))}
        if self.conv:
            shape = (adaptive, self.kernel, self.kernel) + ((width,) if self.depthwise else ())
            prompts['conv'] = {'kernel': jax.random.normal(keys[2], shape)}
        prompts['mix'] = {
            'kernel': jnp.zeros((adaptive, rows * columns, count)),
            'bias': jnp.zeros((adaptive, count)),
        }
        if self.projector:
            lead = () if self.shared_projector else (adaptive,)
            prompts['proj'] = {
                'down': torch_uniform(keys[3], (*lead, width, hidden), width),
                'up': torch_uniform(keys[4], (*lead, hidden, width), hidden),
            }
        if self.learnable_scale:
            prompts['scale'] = jnp.ones(1 if self.shared_projector else (adaptive, 1))
        return prompts

    def tokens(self, prompts: PyTree, x: jax.Array, ctx: Context) -> jax.Array:
        """Inserts the static prompts of block 0."""
        return ctx.insert(x, self._static(prompts['prompts'], x.shape[0], 0, ctx))

    def layer(self, prompts: PyTree, block: Callable, x: jax.Array, i: int | jax.Array, ctx: Context) -> jax.Array:
        """Replaces the prompts: by static ones in the first V blocks, by adaptive ones after them."""
        if ctx.start >= self.static_layers:
            x = ctx.replace(x, self.adaptive_prompts(prompts, ctx.patches(x), i - self.static_layers, ctx))
        elif ctx.start > 0:
            x = ctx.replace(x, self._static(prompts['deep'][i - 1], x.shape[0], i, ctx))
        return block(x)

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """Block 0, the static blocks, the adaptive blocks."""
        return (1, self.static_layers)

    def _static(self, rows: jax.Array, batch: int, i: int | jax.Array, ctx: Context) -> jax.Array:
        return ctx.dropout(jnp.broadcast_to(rows, (batch, *rows.shape)), self.dropout, 'prompts', i)

    def adaptive_prompts(self, prompts: PyTree, x: jax.Array, j: int | jax.Array, ctx: Context) -> jax.Array:
        """The prompts of adaptive block j.

        Args:
          prompts: this method's pytree.
          x: [B, N, D] patch tokens that enter the block.
          j: index of the block among the adaptive ones.
          ctx: the forward pass.

        Returns:
          [B, P, D].
        """
        grid = ctx.model.grid(*ctx.images.shape[1:3])
        x = x.astype(jnp.float32)
        x = jax.nn.standardize(x, axis=-1, epsilon=self.ln_eps, variance=x.var(axis=-1, keepdims=True))
        x = x * prompts['norm']['scale'][j] + prompts['norm']['bias'][j]
        mix, bias = prompts['mix']['kernel'][j].T, prompts['mix']['bias'][j]
        if self.depthwise:
            x = patch_grid.depthwise(x, prompts['conv']['kernel'][j], grid, self.padding)
        elif self.conv:
            mix = patch_grid.multiplied_out(mix, prompts['conv']['kernel'][j], grid, self.padding)
        q = jnp.einsum('pn,bnd->bpd', mix, x)
        if self.conv:
            # Dropping a channel's whole map before the mix is dropping that channel after it, but for the bias.
            q = ctx.dropout(q, self.map_dropout, 'map', j, shared=(1,))
        q = q + bias[:, None]
        if not self.projector:
            return q
        down, up, scale = prompts['proj']['down'], prompts['proj']['up'], prompts.get('scale')
        if not self.shared_projector:
            down, up, scale = down[j], up[j], None if scale is None else scale[j]
        h = ctx.dropout(ACTIVATIONS[self.activation](q @ down), self.projector_dropout, 'hidden', j)
        return (h @ up) * (1.0 if scale is None else scale) + q
