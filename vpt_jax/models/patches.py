"""Patch kernels of another size (FlexiViT, arXiv 2212.08013)."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from vpt_jax.models.posemb import resize_matrix


def resample(kernel: Any, size: int) -> Any:
    """The kernel for patches of another size that answers as alike as can be to patches resized with the image.

    The pseudo-inverse of bilinear resizing without anti-aliasing, along both axes; where patches grow, a resized patch
    gets exactly the answer of the original.

    Args:
      kernel: [p, p, channels, D].
      size: side of the new patches in pixels.

    Returns:
      float32 [size, size, channels, D].
    """
    # B of resizing an image is the Kronecker product of the two axes' matrices, and so is its pseudo-inverse.
    matrix = jnp.asarray(np.linalg.pinv(resize_matrix(kernel.shape[0], size, 'linear').T.astype(np.float64)), 'float32')
    return jnp.einsum('ra,sb,abcd->rscd', matrix, matrix, jnp.asarray(kernel, 'float32'), precision='highest')
