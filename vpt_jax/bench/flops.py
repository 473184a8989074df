"""Floating-point operations of a frozen ViT under a prompt method, counted by formula: a multiply-add is two."""

from vpt_jax.methods import Method
from vpt_jax.models.vit import ViT


def forward_flops(model: ViT, prompts: int = 0) -> float:
    """Operations of one image's forward pass: the matrix products, nothing elementwise.

    Args:
      model: a ViT; T tokens, width D, F MLP width, L blocks, N patches of p x p pixels.
      prompts: tokens that a method inserts before every block.

    Returns:
      L (8 T D^2 + 4 T D F + 4 T^2 D) + 2 N 3 p^2 D.
    """
    rows, columns = model.grid(model.image_size)
    tokens, width = model.prefix + rows * columns + prompts, model.width
    block = 8 * tokens * width**2 + 4 * tokens * width * model.mlp_dim + 4 * tokens**2 * width
    return model.depth * block + 2 * rows * columns * 3 * model.patch_size**2 * width


def train_flops(model: ViT, method: Method, prompts: int = 0) -> float:
    """Operations of one image's train step.

    The backward pass of a frozen block is one product with every weight, as much as its forward pass; a block whose
    weights are trained costs one more, and blocks before the first that a method touches cost none.
    """
    forward = forward_flops(model, prompts)
    members = {m.name for m in getattr(method, 'methods', (method,))}
    if members <= {'linear', 'mlp'}:
        return forward
    return (3 if 'full' in members else 2) * forward
