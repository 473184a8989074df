"""Floating-point operations of a frozen ViT under a prompt method, counted by formula: a multiply-add is two."""

from vpt_jax.methods import Method, prefix
from vpt_jax.models.vit import ViT


def forward_flops(model: ViT, prompts: int = 0, first: int = 0, read: int | None = None) -> float:
    """Operations of one image's forward pass: the matrix products, nothing elementwise.

    Args:
      model: a ViT; T tokens, width D, F MLP width, L blocks, N patches of p x p pixels.
      prompts: tokens that a method inserts before every block.
      first: the block at which it starts; before block 0 are the patches.
      read: R, how many tokens are computed in the last block (`ViT.read_tokens`), None for all.

    Returns:
      For every block 4 R D^2 + 4 T D^2 + 4 R D F + 4 R T D with R = T but in the last, and 2 N 3 p^2 D.
    """
    rows, columns = model.grid(model.image_size)
    tokens, width = model.prefix + rows * columns + prompts, model.width

    def block(rows: int) -> float:
        return 4 * (rows + tokens) * width**2 + 4 * rows * width * model.mlp_dim + 4 * rows * tokens * width

    blocks = [block(tokens)] * (model.depth - 1) + [block(read or tokens)]
    embedding = 0 if first else 2 * rows * columns * 3 * model.patch_size**2 * width
    return sum(blocks[first:]) + embedding


def train_flops(model: ViT, method: Method, prompts: int = 0) -> float:
    """Operations of one image's train step.

    The backward pass of a frozen block is one product with every weight, as much as its forward pass; a block whose
    weights are trained costs one more, and blocks before the first that a method touches none: they are run once.
    """
    first = prefix.entry(method, model)
    trained = {'full', 'partial'} & {m.name for m in getattr(method, 'methods', (method,))}
    return (3 if trained else 2) * forward_flops(model, prompts, first, model.read_tokens(method))
