"""CLIP's head: cosines between images and texts (arXiv 2103.00020), as visual prompts use it (2203.17274, 2211.11635).

scores = exp(s) f / |f| (t_c / |t_c|)^T, with texts t_c of the classes. With several texts a class, such as all pairs of
a template and a class name, the mapping picks those that stand for the classes (ILM-VP's CLIP form).

Shapes: B images, E width of the joint embedding, S texts, C classes.
"""

import dataclasses
import os
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.errors import UsageError
from vpt_jax.methods.base import PyTree
from vpt_jax.methods.label_mapping import Mapped, read_arrays
from vpt_jax.models.places import Context

_NAMES = ('text_features', 'logit_scale')


def save_texts(path: str | os.PathLike, text_features: jax.Array, logit_scale: float) -> None:
    """Writes the file that `CLIPHead.texts` names.

    Args:
      path: ends in .npz.
      text_features: [S, E], of any length (`models.clip_text` makes them); classes, or template * C + class.
      logit_scale: s, a logarithm as CLIP stores it.
    """
    arrays = (np.asarray(text_features, np.float32), np.float32(logit_scale))
    np.savez(path, **dict(zip(_NAMES, arrays, strict=True)))


@dataclasses.dataclass(frozen=True)
class CLIPHead(Mapped):
    """The scores of texts, or of the one among several that the mapping picks for a class.

    State: `texts` [S, E] of length 1, `scale` [] (s), `mapping` int32 [C, k].

    Attributes:
      texts: an .npz file from `save_texts`, read when a run starts.
      The others are `Mapped`'s; 'first' takes one text a class, in the order of the classes.
    """

    name: ClassVar[str] = 'clip_head'
    mapping: str = 'first'
    texts: str = ''

    def check(self, model: Any) -> None:
        """Refuses to run without texts."""
        super().check(model)
        if not self.texts:
            raise UsageError('method clip_head needs features of texts: give texts=FILE.npz, made by '
                             'methods.clip_head.save_texts')  # fmt: skip

    def classifier_state(self, model: Any) -> tuple[PyTree, int]:
        """The texts."""
        texts, scale = read_arrays(self.name, self.texts, _NAMES)
        if texts.ndim != 2 or texts.shape[1] != model.feature_width or scale.ndim:
            raise UsageError(
                f'{self.texts}: this network needs text_features [S, {model.feature_width}] and one logit_scale, not '
                f'{list(texts.shape)} and {list(scale.shape)}'
            )
        texts = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        return {'texts': jnp.asarray(texts), 'scale': jnp.asarray(scale)}, len(texts)

    def sources(self, features: jax.Array, ctx: Context) -> jax.Array:
        """The scores [B, S] of all texts."""
        features = features.astype(jnp.float32)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        return jnp.exp(ctx.state['scale']) * features @ ctx.state['texts'].T
