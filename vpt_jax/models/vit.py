"""The Vision Transformer (arXiv 2010.11929) in every dialect that public checkpoints speak, frozen or not.

One linen module whose settings cover Google's and big_vision's ViTs, AugReg, DeiT, MAE, MoCo v3, DINO, DINOv2, CLIP
and SigLIP. Parameter names are big_vision's. Weights never tell these settings, so they come from `zoo`.

Shapes: B images, T tokens, N patches, D width, H heads, F MLP width, L blocks.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import posemb
from vpt_jax.models.places import UNCHANGED, Context, Places
from vpt_jax.models.transformer import ACTIVATIONS, Encoder, MAPHead, layer_norm, project, stack_blocks, unstack_blocks

VARIANTS = {
    'Ti': {'width': 192, 'depth': 12, 'mlp_dim': 768, 'heads': 3},
    'S': {'width': 384, 'depth': 12, 'mlp_dim': 1536, 'heads': 6},
    'B': {'width': 768, 'depth': 12, 'mlp_dim': 3072, 'heads': 12},
    'L': {'width': 1024, 'depth': 24, 'mlp_dim': 4096, 'heads': 16},
    'H': {'width': 1280, 'depth': 32, 'mlp_dim': 5120, 'heads': 16},
    'g': {'width': 1408, 'depth': 40, 'mlp_dim': 6144, 'heads': 16},
}

POOLS = ('tok', 'gap', 'map', '0', 'none')


class PatchEmbedding(nn.Module):
    """The patch convolution: stride equal to the kernel, no padding, a remainder dropped.

    Written as one product of flattened patches with the kernel [p, p, channels, D]: the same numbers as a convolution,
    whose gradient XLA's CPU backend computes without its matrix routines.
    """

    width: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Maps [B, H, W, channels] to [B, rows, columns, D]."""
        (rows, columns), p, channels = grid, self.patch_size, images.shape[-1]
        kernel = self.param('kernel', nn.initializers.lecun_normal(in_axis=(0, 1, 2)), (p, p, channels, self.width))
        bias = self.param('bias', nn.initializers.zeros, (self.width,)) if self.use_bias else None
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        x = images[:, : rows * p, : columns * p].reshape(-1, rows, p, columns, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, p, p, channels)
        return project(x, kernel, bias).reshape(-1, rows, columns, self.width)


class ViT(nn.Module):
    """A Vision Transformer as a pure function of (params, images, method, prompts).

    Attributes:
      width, depth, mlp_dim, heads, patch_size: D, L, F, H and the patch side in pixels.
      image_size: side of the images that the stored position embedding was made for.
      pool: 'tok' (CLS), 'gap' (mean of all tokens but the prefix), 'map', '0' (first token) or 'none' (all tokens).
      posemb: 'learn', 'sincos2d' or 'none'.
      posemb_prefix: how many prefix tokens have entries of their own in `pos_embedding`, before the grid's.
      posemb_rule: how a learned grid is resampled to images of another size (`posemb.RULES`).
      cls_token, dist_token, registers: the prefix tokens, in this order; registers never get a position.
      patch_bias: whether the patch convolution has a bias (CLIP's has none).
      pre_norm: LayerNorm after the position embedding (CLIP).
      final_norm: LayerNorm after the last block; `fc_norm`: LayerNorm after pooling (MAE, BEiT).
      layer_scale: learned vectors on both branches of every block.
      pre_logits: width of the tanh layer after pooling, 0 for none.
      activation: a name of `ACTIVATIONS`; `ln_eps`: epsilon of every LayerNorm.
      dropout: rate after the embedding and inside the MLPs; frozen networks run with 0.
      scan: compile runs of equal blocks once; parameters are then stacked (`transformer.stack_blocks`).
      dtype: computation type; None computes in the parameters' type.
    """

    width: int
    depth: int
    mlp_dim: int
    heads: int
    patch_size: int
    image_size: int = 224
    pool: str = 'tok'
    posemb: str = 'learn'
    posemb_prefix: int = 1
    posemb_rule: str = 'corner'
    cls_token: bool = True
    dist_token: bool = False
    registers: int = 0
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    layer_scale: bool = False
    pre_logits: int = 0
    activation: str = 'gelu'
    ln_eps: float = 1e-6
    dropout: float = 0.0
    scan: bool = False
    dtype: Any = None

    places = frozenset({'weights', 'pixels', 'tokens', 'layer', 'logits'})

    def __post_init__(self):
        for kind, value, known in (
            ('pooling', self.pool, POOLS),
            ('activation', self.activation, ACTIVATIONS),
            ('position embedding', self.posemb, ('learn', 'sincos2d', 'none')),
            ('position-embedding resampling rule', self.posemb_rule, posemb.RULES),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        if self.width % self.heads:
            raise UsageError(f'the width {self.width} is not divisible by {self.heads} heads')
        if self.pool == 'tok' and not self.cls_token:
            raise UsageError("pool='tok' needs cls_token=True")
        super().__post_init__()

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: CLS, distillation, registers."""
        return int(self.cls_token) + int(self.dist_token) + self.registers

    @property
    def feature_width(self) -> int:
        """Width of the features that the head receives."""
        return self.pre_logits or self.width

    def grid(self, height: int, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image; a remainder smaller than a patch is dropped, as published.

        Raises:
          UsageError: the image is smaller than one patch.
        """
        rows, columns = height // self.patch_size, (width or height) // self.patch_size
        if not rows or not columns:
            size = f'{height}x{width or height}'
            raise UsageError(f'an image of {size} pixels is smaller than one patch of {self.patch_size} pixels')
        return rows, columns

    def canonical(self, params: dict) -> dict:
        """Stored parameters as one tree per block, which is what methods and checkpoints speak of."""
        return unstack_blocks(params) if self.scan else params

    def stored(self, params: dict) -> dict:
        """The inverse of `canonical`."""
        return stack_blocks(params) if self.scan else params

    def setup(self):
        """Makes the sub-modules and parameters."""
        self.embedding = PatchEmbedding(self.width, self.patch_size, self.patch_bias, self.dtype)
        normal = nn.initializers.normal(0.02)
        if self.cls_token:
            self.cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
        if self.dist_token:
            self.dist = self.param('dist', nn.initializers.zeros, (1, 1, self.width))
        if self.registers:
            self.register_tokens = self.param('registers', normal, (1, self.registers, self.width))
        if self.posemb == 'learn':
            rows, columns = self.grid(self.image_size)
            shape = (1, self.posemb_prefix + rows * columns, self.width)
            self.pos_embedding = self.param('pos_embedding', nn.initializers.normal(self.width**-0.5), shape)
        if self.pre_norm:
            self.norm_pre = layer_norm(self.ln_eps, self.dtype, 'pre_norm')
        block = {'width': self.width, 'heads': self.heads, 'mlp_dim': self.mlp_dim, 'activation': self.activation,
                 'ln_eps': self.ln_eps, 'layer_scale': self.layer_scale, 'dropout': self.dropout,
                 'dtype': self.dtype}  # fmt: skip
        self.encoder = Encoder(self.depth, block, self.final_norm, self.scan, name='Transformer')
        if self.pool == 'map':
            self.map_head = MAPHead(
                self.heads, self.mlp_dim, self.activation, self.ln_eps, self.dtype, name='MAPHead_0'
            )
        if self.fc_norm:
            self.norm_fc = layer_norm(self.ln_eps, self.dtype, 'fc_norm')
        if self.pre_logits:
            self.pre_logits_layer = nn.Dense(self.pre_logits, dtype=self.dtype, name='pre_logits')
        self.drop = nn.Dropout(self.dropout, deterministic=not self.dropout)

    def patches(self, images: jax.Array) -> jax.Array:
        """The patch convolution alone: [B, H, W, channels] to [B, rows, columns, D], without positions."""
        return self.embedding(images, self.grid(*images.shape[1:3]))

    def embed(self, images: jax.Array) -> jax.Array:
        """Patch tokens with positions behind the prefix tokens: [B, H, W, channels] to [B, prefix + N, D]."""
        x = self.patches(images)
        grid = x.shape[1:3]
        x = x.reshape(x.shape[0], grid[0] * grid[1], self.width)
        prefix = ([self.cls] if self.cls_token else []) + ([self.dist] if self.dist_token else [])
        if self.posemb == 'learn':
            pos = posemb.resample(self.pos_embedding, grid, self.posemb_prefix, self.posemb_rule)
            x = x + pos[:, self.posemb_prefix :].astype(x.dtype)
            prefix = [t + pos[:, i : i + 1] if i < self.posemb_prefix else t for i, t in enumerate(prefix)]
        elif self.posemb == 'sincos2d':
            x = x + posemb.sincos2d(grid, self.width).astype(x.dtype)
        prefix += [self.register_tokens] if self.registers else []
        prefix = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in prefix]
        x = self.drop(jnp.concatenate([*prefix, x], axis=1))
        return self.norm_pre(x) if self.pre_norm else x

    def pool_tokens(self, x: jax.Array) -> jax.Array:
        """The backbone's own readout: [B, T, D] from the encoder to [B, D] (or [B, T, D] for pool='none')."""
        if self.pool == 'map':
            x = self.map_head(x)
        elif self.pool == 'gap':
            x = x[:, self.prefix :].mean(axis=1)
        elif self.pool == 'tok':
            x = x[:, :2].mean(axis=1) if self.dist_token else x[:, 0]
        elif self.pool == '0':
            x = x[:, 0]
        return self.norm_fc(x) if self.fc_norm else x

    def __call__(self, images: jax.Array, method: Places = UNCHANGED, prompts: Any = None,
                 ctx: Context | None = None) -> jax.Array:  # fmt: skip
        """Features of normalised images.

        Args:
          images: [B, H, W, channels] float, normalised as the weights expect.
          method: what to do at the places `tokens`, `layer` and `readout`.
          prompts: the method's pytree.
          ctx: the forward pass's `Context`; a fresh one in evaluation mode if None.

        Returns:
          [B, D] features ([B, T, D] for pool='none'; [B, pre_logits] with a pre-logits layer).
        """
        ctx = Context() if ctx is None else ctx
        ctx.model, ctx.images = self, images
        x = self.embed(images)
        ctx.prefix, ctx.num_patches = self.prefix, x.shape[1] - self.prefix
        x = method.tokens(prompts, x, ctx)
        x = self.encoder(x, method, prompts, ctx)
        x = method.readout(prompts, x, self.pool_tokens, ctx)
        return nn.tanh(self.pre_logits_layer(x)) if self.pre_logits else x
