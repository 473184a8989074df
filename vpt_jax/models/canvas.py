"""ViTs for images with more patches: the canvas, and a table of positions that fits it.

Nothing of the network changes but that table, so its user needs no code: a canvas is an image, and where it is not
square the network's `window_rows` and `window_columns` say so.

Shapes: B images, K more patches, p side of a patch, D width, N patches of an image, T = N + prefix entries with a
position.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vpt_jax.models import posemb
from vpt_jax.models.vit import ViT

PyTree = Any


def table(model: ViT, params: PyTree) -> np.ndarray:
    """The positions that a ViT adds, for images of its own size: float32 [T, D]."""
    grid = model.grid(model.image_size)
    if model.posemb == 'learn':
        rule = (model.posemb_prefix, model.posemb_rule, model.window)
        return np.asarray(posemb.resample(jnp.asarray(params['pos_embedding'], jnp.float32), grid, *rule))[0]
    if model.posemb == 'sincos2d':
        return posemb.sincos2d(grid, model.width)[0]
    return np.zeros((grid[0] * grid[1], model.width), np.float32)


def deployed(model: ViT, params: PyTree, pos: Any) -> tuple[ViT, PyTree]:
    """The same network for canvases of K more patches: its table of positions has K more rows, and that is all.

    Args:
      model, params: the network.
      pos: [K, D], the rows, zeros if the patches are to get no position.

    Returns:
      (module, parameters).
    """
    held, (rows, columns) = table(model, params), model.grid(model.image_size)
    whole = np.concatenate([held, pos]).astype(np.float32)
    window = layout((rows, columns), len(pos))
    model = model.clone(
        posemb='learn', posemb_prefix=len(held) - rows * columns, window_rows=window[0], window_columns=window[1]
    )
    return model, {**params, 'pos_embedding': jnp.asarray(whole)[None]}


def layout(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """(Rows, columns) of a canvas of an image's patches and `count` more, in this order.

    More rows below the image if that comes out even; otherwise everything in one row, because every cell of a canvas is
    a token, and one too many would change the scores.
    """
    rows, columns = grid
    return (1, rows * columns + count) if count % columns else (rows + count // columns, columns)


def canvas(images: np.ndarray, patches: np.ndarray, window: tuple[int, int] | None = None) -> np.ndarray:
    """Images with patches joined to them: [B, H, W, 3] and [B, K, p, p, 3] to [B, rows p, columns p, 3].

    Args:
      images: a remainder smaller than a patch is dropped, as the networks do.
      patches: in the same units.
      window: (rows, columns) of the result; `layout`'s by default.
    """
    (batch, count, p), (rows, columns) = patches.shape[:3], (side // patches.shape[2] for side in images.shape[1:3])
    cells = images[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p, p, 3)
    cells = np.concatenate([cells, patches.astype(images.dtype)], axis=1)
    rows, columns = window or layout((rows, columns), count)
    cells = cells.reshape(batch, rows, columns, p, p, 3).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(batch, rows * p, columns * p, 3)
