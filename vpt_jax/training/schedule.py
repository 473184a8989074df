"""The learning-rate schedule of VPT and VAPT (arXiv 2203.12119; KMnP/vpt@4410440 src/solver/lr_scheduler.py)."""

import jax
import jax.numpy as jnp


def warmup_cosine(epoch: jax.Array, warmup_epochs: jax.Array, epochs: jax.Array) -> jax.Array:
    """The factor on the base learning rate: linear warm-up, then half a cosine to zero.

    e / w for e < w, then 0.5 (1 + cos(pi (e - w) / (T - w))). The published protocol gives whole epochs, so the
    rate is constant inside an epoch and the first epoch of a warm-up has rate 0. Fractions give the per-step form.

    Args:
      epoch: e, scalar or [...], whole or not.
      warmup_epochs: w >= 0.
      epochs: T > w.

    Returns:
      float32 of the shape of `epoch`, in [0, 1].
    """
    epoch, warmup, total = (jnp.asarray(a, jnp.float32) for a in (epoch, warmup_epochs, epochs))
    rising = epoch / jnp.maximum(warmup, 1.0)
    falling = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - warmup) / jnp.maximum(total - warmup, 1.0)))
    return jnp.where(epoch < warmup, rising, falling)
