"""Prompt inversion: pixels that a frozen ViT's patch convolution turns into given prompts (idea of arXiv 2210.06466).

A patch v [3 p^2] becomes the token W v + b + q, where q is the position that the network adds to it, if any. So a
prompt P is the patch

    v = W^+ (P - b - q) + (I - W^+ W) u

for any u. That is exact if W has rank D, which takes 3 p^2 >= D. Whoever runs the network then needs nothing but an
image with more patches, and a table of positions with as many more rows (`models.canvas`). No code was published; the
derivation is ours.

Everything here is numpy on the host, in float64.

Shapes: B images, K prompts, p side of a patch, D width.
"""

import dataclasses
from typing import Any

import numpy as np

from vpt_jax.errors import UsageError
from vpt_jax.methods.base import Method, Stack
from vpt_jax.methods.pgn import IIP, PGN
from vpt_jax.methods.vpt import VPT
from vpt_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True, eq=False)
class Inverse:
    """A patch convolution with its pseudo-inverse.

    Attributes:
      patch_size: p.
      matrix: W^T, [3 p^2, D].
      bias: b, [D].
      pinv: the pseudo-inverse of `matrix`, [D, 3 p^2].
      rank: of W; every prompt can be inverted if it is D.
      condition: largest over smallest singular value of W; rounding errors of pixels grow with it.
    """

    patch_size: int
    matrix: np.ndarray
    bias: np.ndarray
    pinv: np.ndarray
    rank: int
    condition: float

    @property
    def exact(self) -> bool:
        """Whether every prompt can be inverted."""
        return self.rank == self.matrix.shape[1]

    def patches(self, prompts: Any, pos: Any = None, toward: Any = None) -> np.ndarray:
        """Patches that become the prompts: float64 [B, K, p, p, 3] in the network's normalised pixels.

        Args:
          prompts: [B, K, D].
          pos: [K, D] or [D], q; None for nothing.
          toward: patches [..., p, p, 3] that the result is to be as near as possible to, or a color [3]; None for 0.
        """
        wanted = self._wanted(prompts, pos)
        p = self.patch_size
        start = np.zeros((p, p, 3)) if toward is None else np.broadcast_to(toward, (*np.shape(toward)[:-3], p, p, 3))
        start = np.asarray(start, np.float64).reshape(*start.shape[:-3], -1)
        flat = start + (wanted - start @ self.matrix) @ self.pinv
        return flat.reshape(*wanted.shape[:-1], p, p, 3)

    def into_range(self, patches: np.ndarray, low: Any, high: Any, rounds: int) -> np.ndarray:
        """Patches of the same tokens, nearer to pixels in [low, high] (a number a channel each).

        Clips, and goes to the nearest patch with the same token, so many times. Where p^2 is little more than D / 3
        there is hardly anything to gain.
        """
        token = _flat(patches) @ self.matrix
        for _ in range(rounds):
            flat = _flat(np.clip(patches, low, high))
            patches = (flat + (token - flat @ self.matrix) @ self.pinv).reshape(patches.shape)
        return patches

    def residual(self, patches: np.ndarray, prompts: Any, pos: Any = None) -> np.ndarray:
        """How much of every prompt the patches miss: |W v + b + q - P| / |P - b - q|, [B, K]."""
        wanted = self._wanted(prompts, pos)
        missed = _flat(patches) @ self.matrix - wanted
        return np.linalg.norm(missed, axis=-1) / np.maximum(np.linalg.norm(wanted, axis=-1), 1e-300)

    def _wanted(self, prompts: Any, pos: Any) -> np.ndarray:
        return np.asarray(prompts, np.float64) - self.bias - (0.0 if pos is None else np.asarray(pos, np.float64))


def _flat(patches: np.ndarray) -> np.ndarray:
    return np.asarray(patches, np.float64).reshape(*patches.shape[:-3], -1)


def inverse_of(kernel: Any, bias: Any = None, least_squares: bool = False) -> Inverse:
    """The inverse of a patch convolution.

    Args:
      kernel: [p, p, 3, D].
      bias: [D] or None.
      least_squares: take a convolution, too, that cannot make every token; patches then come as near as they can.

    Raises:
      UsageError: its rank is below D, without `least_squares`.
    """
    p, _, channels, width = kernel.shape
    matrix = np.asarray(kernel, np.float64).reshape(-1, width)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int((values > values[0] * max(matrix.shape) * np.finfo(np.float64).eps).sum())
    pinv = (right[:rank].T / values[:rank]) @ left[:, :rank].T
    bias = np.zeros(width) if bias is None else np.asarray(bias, np.float64)
    found = Inverse(p, matrix, bias, pinv, rank, float(values[0] / values[rank - 1]) if rank else np.inf)
    if not found.exact and not least_squares:
        count = len(matrix)
        if count < width:
            why = f'a patch of {p} x {p} x {channels} = {count} numbers cannot make every token of width {width}'
        else:
            why = f'its patch convolution has rank {rank}, and tokens have width {width}'
        raise UsageError(
            f'the prompts of this network cannot be turned into pixels: {why}; use a backbone with larger patches, or '
            'least squares (--least_squares) for pixels that come as near as they can, with other scores'
        )
    return found


def invert(
    prompts: Any, kernel: Any, bias: Any = None, pos: Any = None, *, toward: Any = None, least_squares: bool = False
) -> np.ndarray:
    """Patches that a patch convolution turns into prompts.

    Args:
      prompts: [B, K, D].
      kernel, bias: of the convolution, [p, p, 3, D] and [D] or None.
      pos: [K, D] or [D], what the network adds to the patches' tokens; None for nothing.
      toward: what the patches are to be near to (`Inverse.patches`).
      least_squares: see `inverse_of`.

    Returns:
      float64 [B, K, p, p, 3], in normalised pixels.

    Raises:
      UsageError: the convolution cannot make every token, without `least_squares`.
    """
    return inverse_of(kernel, bias, least_squares).patches(prompts, pos, toward)


def check_method(method: Method) -> None:
    """Refuses a method that does more than insert tokens, once, beside the embedded patches.

    Raises:
      UsageError: with the member of the stack that does.
    """
    members = [m for m in (method.methods if isinstance(method, Stack) else (method,)) if not m.changes('logits')]
    for m in members or [method]:
        shallow = isinstance(m, VPT) and not m.deep and not m.changes('readout')
        if not shallow and not isinstance(m, (PGN, IIP)):
            raise UsageError(
                f'only prompts that enter once, beside the patches, can be turned into pixels (pgn, iip, vpt with '
                f'deep=False), and {m.name!r} does something else'
            )


def check_model(model: Any) -> None:
    """Refuses a network whose patches are not cut from the image, or whose tokens know each other's places.

    Raises:
      UsageError: with the reason.
    """
    reason = ''
    if not isinstance(model, ViT):
        reason = f'a {type(model).__name__} has no sequence that prompts could join'
    elif model.stem_depths is not None:
        reason = "a hybrid's patches are cut from the maps of a ResNet, not from pixels"
    elif getattr(model, 'relative', 'none') != 'none':
        reason = f'in a {type(model).__name__} patches attend to each other by their relative positions, prompts do not'
    if reason:
        raise UsageError(f'prompts of this network cannot be turned into pixels: {reason}')
