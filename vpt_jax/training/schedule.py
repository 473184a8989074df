"""The learning-rate schedules of the published protocols, as functions of the step whose numbers are data.

| name | from | changes |
| --- | --- | --- |
| cosine | VPT, VAPT (KMnP/vpt@4410440, `src/solver/lr_scheduler.py`) | every epoch, or every step |
| pgn | PGN (jochemloedeman/PGN@fe5ebc2, `cosine_with_warmup.py`) | every epoch |
| vp | VP (hjbahng/visual_prompting@679e71f, `utils.py`) | every step |
| multistep | ILM-VP (OPTML-Group/ILM-VP@84ca042) | every epoch |
| spt | SPT (WangYZ1608/Self-Prompt-Tuning@ce0754f, `utils.py`) | every step |
| cvpt | CVPT (timm 0.5.4's cosine as its trainers call it) | every epoch |
"""

import jax
import jax.numpy as jnp

from vpt_jax.errors import unknown

NAMES = ('cosine', 'pgn', 'vp', 'multistep', 'spt', 'cvpt')
# Rates that the published codes end or start at, whatever the base rate is.
_SPT_LAST = 1e-8
_CVPT_FIRST, _CVPT_LAST = 1e-6, 1e-5
_PGN_LAST_SHARE = 0.01


def rate(
    name: str,
    step: jax.Array,
    learning_rate: jax.Array,
    warmup_epochs: jax.Array,
    epochs: jax.Array,
    steps_per_epoch: jax.Array,
    per_step: bool = False,
) -> jax.Array:
    """The learning rate of a step.

    Args:
      name: one of `NAMES`.
      step: t >= 0, scalar or [...].
      learning_rate: the highest rate.
      warmup_epochs: >= 0; `'multistep'` has no warm-up.
      epochs: > warmup_epochs.
      steps_per_epoch: >= 1.
      per_step: let `'cosine'` change every step instead of every epoch.

    Returns:
      float32 of the shape of `step`.

    Raises:
      UsageError: there is no such schedule.
    """
    values = (step, learning_rate, warmup_epochs, epochs, steps_per_epoch)
    step, top, warmup, total, length = (jnp.asarray(a, jnp.float32) for a in values)
    exact = step / length
    epoch = jnp.floor(exact)
    if name == 'cosine':
        return top * warmup_cosine(exact if per_step else epoch, warmup, total)
    if name == 'pgn':
        low = _PGN_LAST_SHARE * top
        return jnp.where(
            epoch < warmup,
            top * jnp.maximum(epoch, 1.0) / jnp.maximum(warmup, 1.0),  # epochs 0 and 1 are equal
            low + (top - low) * _half_cosine((epoch - warmup) / (total - warmup)),
        )
    if name == 'vp':
        rising = (step + 1) / jnp.maximum(warmup * length, 1.0)
        return top * jnp.where(exact < warmup, rising, _half_cosine((exact - warmup) / (total - warmup)))
    if name == 'multistep':
        return top * 0.1 ** ((epoch >= jnp.floor(0.5 * total)) + 1.0 * (epoch >= jnp.floor(0.72 * total)))
    if name == 'spt':
        falling = _SPT_LAST + (top - _SPT_LAST) * _half_cosine((exact - warmup) / (total - warmup))
        return jnp.where(exact < warmup, top * exact / jnp.maximum(warmup, 1.0), falling)
    if name == 'cvpt':
        # timm's scheduler was stepped after each epoch, with that epoch's number: one epoch late.
        late = jnp.maximum(epoch - 1, 0.0)
        rising = _CVPT_FIRST + late * (top - _CVPT_FIRST) / jnp.maximum(warmup, 1.0)
        return jnp.where(late < warmup, rising, _CVPT_LAST + (top - _CVPT_LAST) * _half_cosine(late / total))
    raise unknown('schedule', name, NAMES)


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
    falling = _half_cosine((epoch - warmup) / jnp.maximum(total - warmup, 1.0))
    return jnp.where(epoch < warmup, rising, falling)


def _half_cosine(share: jax.Array) -> jax.Array:
    """1 at 0, 0 at 1."""
    return 0.5 * (1 + jnp.cos(jnp.pi * share))
