"""The Vision Transformer (arXiv 2010.11929) in every dialect that public checkpoints speak, frozen or not.

One linen module whose settings cover Google's and big_vision's ViTs, AugReg, DeiT, MAE, MoCo v3, DINO, DINOv2, CLIP
and SigLIP. Parameter names are big_vision's. Weights never tell these settings, so they come from `zoo`.

Shapes: B images, T tokens, N patches, D width, H heads, F MLP width, L blocks.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpt_jax.checkpoints.schemes.bit import reduction
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import posemb
from vpt_jax.models.bit import HybridStem
from vpt_jax.models.network import Network, whole
from vpt_jax.models.places import UNCHANGED, Context, Places
from vpt_jax.models.transformer import ACTIVATIONS, Encoder, MAPHead, layer_norm, project, stack_blocks, unstack_blocks

VARIANTS = {
    'Ti': {'width': 192, 'depth': 12, 'mlp_dim': 768, 'heads': 3},
    'S': {'width': 384, 'depth': 12, 'mlp_dim': 1536, 'heads': 6},
    'B': {'width': 768, 'depth': 12, 'mlp_dim': 3072, 'heads': 12},
    'L': {'width': 1024, 'depth': 24, 'mlp_dim': 4096, 'heads': 16},
    'H': {'width': 1280, 'depth': 32, 'mlp_dim': 5120, 'heads': 16},
    'g': {'width': 1408, 'depth': 40, 'mlp_dim': 6144, 'heads': 16},
    'mu': {'width': 32, 'depth': 1, 'mlp_dim': 128, 'heads': 2},
    'M': {'width': 512, 'depth': 12, 'mlp_dim': 2048, 'heads': 8},
    'So400m': {'width': 1152, 'depth': 27, 'mlp_dim': 4304, 'heads': 16},
    'g-opt': {'width': 1536, 'depth': 40, 'mlp_dim': 6144, 'heads': 16},
    'G': {'width': 1664, 'depth': 48, 'mlp_dim': 8192, 'heads': 16},
    'G-opt': {'width': 1536, 'depth': 48, 'mlp_dim': 8192, 'heads': 16},
    'e': {'width': 1792, 'depth': 56, 'mlp_dim': 15360, 'heads': 16},
}

# AugReg's hybrids (arXiv 2106.10270), whose patches are 32, 32, 32 and 16 pixels wide.
VARIANTS |= {
    name: {**VARIANTS[name.split('+')[1]], 'stem_depths': depths}
    for name, depths in (('R+Ti', ()), ('R26+S', (2, 2, 2, 2)), ('R50+L', (3, 4, 6, 3)), ('R50+B', (3, 4, 9)))
}

POOLS = ('tok', 'gap', 'map', '0', 'none', 'tok_gap')
#: A norm after pooling: none, with weights of its own in the file, from scratch, with those of the file's last norm.
FC_NORMS = (False, True, 'new', 'norm')


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


class ViT(Network, nn.Module):
    """A Vision Transformer as a pure function of (params, images, method, prompts).

    Attributes:
      width, depth, mlp_dim, heads, patch_size: D, L, F, H and the patch side in pixels.
      image_size: side of the images that the stored position embedding was made for.
      window_rows, window_columns: patches that it is stored for, where they are not those of `image_size`; 0 where
        they are.
      pool: 'tok' (CLS), 'gap' (mean of all tokens but the prefix, a method's included), 'map', '0' (first token),
        'none' (all tokens) or 'tok_gap' (both side by side, as Hugging Face's DINOv2 classifies).
      posemb: 'learn', 'sincos2d' or 'none'.
      posemb_prefix: how many prefix tokens have entries of their own in `pos_embedding`, before the grid's.
      posemb_rule: how a learned grid is resampled to images of another size (`posemb.RULES`).
      cls_token, dist_token, registers: the prefix tokens, in this order; registers usually have no position.
      patch_bias: whether the patch convolution has a bias (CLIP's has none).
      pre_norm: LayerNorm of the sequence that enters block 0, a method's tokens included (CLIP).
      final_norm: LayerNorm after the last block.
      fc_norm: LayerNorm after pooling (MAE, BEiT). Where a file is read, True takes its own, 'new' starts from scale 1
        and bias 0 (VPT's MAE), 'norm' takes what was trained as the final norm (SPT's MAE).
      layer_scale: learned vectors on both branches of every block.
      pre_logits: width of the tanh layer after pooling, 0 for none.
      projection: width of the linear map without bias after pooling (CLIP's embedding), 0 for none.
      activation: a name of `ACTIVATIONS`; `ln_eps`: epsilon of every LayerNorm.
      stem_depths: a hybrid's, the units of every stage of the ResNet that makes the maps which are cut into patches;
        () for its root alone, None for no ResNet. Patches are still counted in pixels.
      stem_width: channels of the ResNet's root.
      classes: of the classifier that the network came with (`Network`), 0 for none.
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
    fc_norm: bool | str = False
    layer_scale: bool = False
    pre_logits: int = 0
    projection: int = 0
    activation: str = 'gelu'
    ln_eps: float = 1e-6
    stem_depths: tuple[int, ...] | None = None
    stem_width: int = 64
    classes: int = 0
    dropout: float = 0.0
    scan: bool = False
    dtype: Any = None
    window_rows: int = 0
    window_columns: int = 0

    places = Network.places | {'tokens', 'attention'}

    def __post_init__(self):
        for kind, value, known in (
            ('pooling', self.pool, POOLS),
            ('activation', self.activation, ACTIVATIONS),
            ('position embedding', self.posemb, ('learn', 'sincos2d', 'none')),
            ('position-embedding resampling rule', self.posemb_rule, posemb.RULES),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        if self.fc_norm not in FC_NORMS:
            raise UsageError(f"fc_norm must be True, False, 'new' or 'norm', got {self.fc_norm!r}")
        if self.width % self.heads:
            raise UsageError(f'the width {self.width} is not divisible by {self.heads} heads')
        if self.pool in ('tok', 'tok_gap') and not self.cls_token:
            raise UsageError(f'pool={self.pool!r} needs cls_token=True')
        if self.pool == 'tok_gap' and (self.fc_norm or self.pre_logits or self.projection):
            raise UsageError("pool='tok_gap' excludes layers after pooling: fc_norm, pre_logits, projection")
        if self.stem_depths is not None:
            object.__setattr__(self, 'stem_depths', tuple(self.stem_depths))
        if self.patch_size % self.stem_reduction:
            raise UsageError(
                f'patches of {self.patch_size} pixels cannot be cut from maps of a hybrid, each entry of which is '
                f'{self.stem_reduction} pixels wide'
            )
        super().__post_init__()

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: CLS, distillation, registers."""
        return int(self.cls_token) + int(self.dist_token) + self.registers

    @property
    def stem_reduction(self) -> int:
        """Pixels a side that make one entry of the map which is cut into patches."""
        return 1 if self.stem_depths is None else reduction(self.stem_depths)

    @property
    def first_layers(self) -> tuple[str, ...]:
        """The patch convolution, or the root of a hybrid's ResNet."""
        return ('embedding',) if self.stem_depths is None else ('stem/conv_root', 'stem/gn_root')

    @property
    def feature_width(self) -> int:
        """Width of the features that the head receives."""
        return self.classes or self.projection or self.pre_logits or self.width * (2 if self.pool == 'tok_gap' else 1)

    def grid(self, height: int, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image; a remainder smaller than a patch is dropped, as published.

        Raises:
          UsageError: the image is smaller than one patch.
        """
        side = self.patch_size // self.stem_reduction
        rows, columns = (-(-pixels // self.stem_reduction) // side for pixels in (height, width or height))
        if not rows or not columns:
            size = f'{height}x{width or height}'
            raise UsageError(f'an image of {size} pixels is smaller than one patch of {self.patch_size} pixels')
        return rows, columns

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of patches that stored positions are for."""
        rows, columns = self.grid(self.image_size)
        return self.window_rows or rows, self.window_columns or columns

    def canonical(self, params: dict) -> dict:
        """Stored parameters as one tree per block, which is what methods and checkpoints speak of."""
        return unstack_blocks(params) if self.scan else params

    def stored(self, params: dict) -> dict:
        """The inverse of `canonical`."""
        return stack_blocks(params) if self.scan else params

    def gathered(self, params: dict) -> dict:
        """Scanned blocks stay split: the scan gathers one at a time."""
        if not self.scan:
            return whole(params)
        stacked = {'encoderblock': params['Transformer']['encoderblock']}
        rest = whole({**params, 'Transformer': {k: v for k, v in params['Transformer'].items() if k not in stacked}})
        return {**rest, 'Transformer': {**rest['Transformer'], **stacked}}

    def activation_shape(self, i: int) -> tuple[int, int]:
        """(T, D) of the tokens that enter block `i` or, for i = depth, the readout; no prompts inserted."""
        rows, columns = self.grid(self.image_size)
        return self.prefix + rows * columns, self.width

    def with_dropout(self, rate: float) -> 'ViT':
        """The network with dropout after the embedding and inside the MLPs."""
        return self.clone(dropout=rate)

    def block_settings(self) -> dict[str, Any]:
        """The settings of every `transformer.Block`."""
        return {'width': self.width, 'heads': self.heads, 'mlp_dim': self.mlp_dim, 'activation': self.activation,
                'ln_eps': self.ln_eps, 'layer_scale': self.layer_scale, 'dropout': self.dropout,
                'dtype': self.dtype}  # fmt: skip

    def setup(self):
        """Makes the sub-modules and parameters."""
        side = self.patch_size // self.stem_reduction
        self.embedding = PatchEmbedding(self.width, side, self.patch_bias, self.dtype)
        if self.stem_depths is not None:
            self.stem = HybridStem(self.stem_depths, self.stem_width, self.dtype)
        normal = nn.initializers.normal(0.02)
        if self.cls_token:
            self.cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
        if self.dist_token:
            self.dist = self.param('dist', nn.initializers.zeros, (1, 1, self.width))
        if self.registers:
            self.register_tokens = self.param('registers', normal, (1, self.registers, self.width))
        if self.posemb == 'learn':
            rows, columns = self.window
            shape = (1, self.posemb_prefix + rows * columns, self.width)
            self.pos_embedding = self.param('pos_embedding', nn.initializers.normal(self.width**-0.5), shape)
        if self.pre_norm:
            self.norm_pre = layer_norm(self.ln_eps, self.dtype, 'pre_norm')
        self.encoder = Encoder(self.depth, self.block_settings(), self.final_norm, self.scan, name='Transformer')
        if self.pool == 'map':
            self.map_head = MAPHead(
                self.heads, self.mlp_dim, self.activation, self.ln_eps, self.dtype, name='MAPHead_0'
            )
        if self.fc_norm:
            self.norm_fc = layer_norm(self.ln_eps, self.dtype, 'fc_norm')
        if self.pre_logits:
            self.pre_logits_layer = nn.Dense(self.pre_logits, dtype=self.dtype, name='pre_logits')
        if self.projection:
            self.proj = nn.Dense(self.projection, use_bias=False, dtype=self.dtype)
        self.make_classifier()
        self.drop = nn.Dropout(self.dropout, deterministic=not self.dropout)

    def patches(self, images: jax.Array) -> jax.Array:
        """The patches without positions, behind a hybrid's ResNet: [B, H, W, channels] to [B, rows, columns, D]."""
        grid = self.grid(*images.shape[1:3])
        return self.embedding(images if self.stem_depths is None else self.stem(images), grid)

    def embed(self, images: jax.Array) -> jax.Array:
        """Patch tokens with positions behind the prefix tokens: [B, H, W, channels] to [B, prefix + N, D]."""
        return self.sequence(self.patches(images))

    def sequence(self, x: jax.Array) -> jax.Array:
        """Patches [B, rows, columns, D] to tokens [B, prefix + N, D], with positions and prefix."""
        grid = x.shape[1:3]
        x = x.reshape(x.shape[0], grid[0] * grid[1], self.width)
        prefix = ([self.cls] if self.cls_token else []) + ([self.dist] if self.dist_token else [])
        prefix += [self.register_tokens] if self.registers else []
        if self.posemb == 'learn':
            pos = posemb.resample(self.pos_embedding, grid, self.posemb_prefix, self.posemb_rule, self.window)
            x = x + pos[:, self.posemb_prefix :].astype(x.dtype)
            if placed := min(self.posemb_prefix, self.prefix):
                prefix = [jnp.concatenate(prefix, axis=1).at[:, :placed].add(pos[:, :placed])]
        elif self.posemb == 'sincos2d':
            x = x + posemb.sincos2d(grid, self.width).astype(x.dtype)
        prefix = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in prefix]
        return self.drop(jnp.concatenate([*prefix, x], axis=1))

    def encode(self, x: jax.Array, method: Places, prompts: Any, ctx: Context, rows: int | None = None) -> jax.Array:
        """The blocks and the final norm: [B, T, D] to [B, T, D], or to [B, rows, D] if no more is read."""
        return self.encoder(x, method, prompts, ctx, rows=rows)

    def read_tokens(self, method: Places) -> int | None:
        """How many of the encoder's first tokens are read at the end; None where all may be."""
        if self.pool not in ('tok', '0') or not method.untouched_end(self.depth):
            return None
        return 2 if self.pool == 'tok' and self.dist_token else 1

    def pool_tokens(self, x: jax.Array) -> jax.Array:
        """The backbone's own readout: [B, T, D] from the encoder to [B, D] (or [B, T, D] for pool='none')."""
        if self.pool == 'map':
            return self.map_head(x)
        if self.pool == 'gap':
            return x[:, self.prefix :].mean(axis=1)
        if self.pool == 'tok':
            return x[:, :2].mean(axis=1) if self.dist_token else x[:, 0]
        if self.pool == 'tok_gap':
            return jnp.concatenate([x[:, 0], x[:, self.prefix :].mean(axis=1)], axis=1)
        return x[:, 0] if self.pool == '0' else x

    def __call__(self, images: jax.Array, method: Places = UNCHANGED, prompts: Any = None,
                 ctx: Context | None = None) -> jax.Array:  # fmt: skip
        """Features of normalised images.

        Args:
          images: [B, H, W, channels] float, normalised as the weights expect.
          method: what to do at the places `tokens`, `layer` and `readout`.
          prompts: the method's pytree.
          ctx: the forward pass's `Context`; a fresh one in evaluation mode if None.

        Returns:
          [B, feature_width] features ([B, T, feature_width] for pool='none').
        """
        ctx = Context() if ctx is None else ctx
        ctx.model, ctx.images = self, images
        x = self.embed(images)
        ctx.prefix, ctx.num_patches = self.prefix, x.shape[1] - self.prefix
        x = method.tokens(prompts, x, ctx)
        x = self.norm_pre(x) if self.pre_norm else x
        x = self.encode(x, method, prompts, ctx, self.read_tokens(method))
        x = method.readout(prompts, x, self.pool_tokens, ctx)
        x = self.norm_fc(x) if self.fc_norm else x
        x = nn.tanh(self.pre_logits_layer(x)) if self.pre_logits else x
        return self.classify(self.proj(x) if self.projection else x)
