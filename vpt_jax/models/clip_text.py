"""CLIP's text tower (arXiv 2103.00020): features of class names in templates, for the scores of `methods.clip_head`.

Causal blocks over token embeddings with positions; the feature is read at the end-of-text token, the largest number of
a text. Text becomes numbers by `models.clip_tokens`.

Shapes: N texts, T tokens of a text, W width, E width of the joint embedding.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vpt_jax.checkpoints import containers, fetch, scheme
from vpt_jax.errors import UsageError
from vpt_jax.models.loading import check_names
from vpt_jax.models.places import UNCHANGED, Context
from vpt_jax.models.transformer import Encoder

#: What ILM-VP's and VP's texts start with; OpenAI's own list for ImageNet is `clip_templates.IMAGENET`.
TEMPLATE = 'This is a photo of a {}.'
_CHUNK = 64


class _Causal:
    """What a block adds to the scores of attention: no token attends to a later one."""

    own_shape = ()

    def __call__(self, count: int, own: None) -> jax.Array:
        return jnp.where(np.tri(count, dtype=bool), 0.0, -1e9)[None, None]


class CLIPText(nn.Module):
    """The text tower.

    Attributes:
      vocab, context: numbers there are, and the most tokens of a text.
      width, depth, heads, mlp_dim: W, and the sizes of the blocks.
      embed_width: E.
      activation, ln_eps: as in `models.vit.ViT`.
      dtype: computation type.
    """

    vocab: int
    context: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    embed_width: int
    activation: str = 'quick_gelu'
    ln_eps: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Features [N, E], not normalised, of tokens int32 [N, T], T <= context."""
        normal = nn.initializers.normal(0.02)
        embedding = self.param('token_embedding', normal, (self.vocab, self.width))
        position = self.param('pos_embedding', normal, (self.context, self.width))
        self.param('logit_scale', nn.initializers.constant(np.log(1 / 0.07)), ())
        block = {'width': self.width, 'heads': self.heads, 'mlp_dim': self.mlp_dim, 'activation': self.activation,
                 'ln_eps': self.ln_eps, 'dtype': self.dtype}  # fmt: skip
        x = embedding[tokens] + position[: tokens.shape[1]]
        encoder = Encoder(self.depth, block, True, False, name='Transformer')
        x = encoder(x, UNCHANGED, None, Context(), _Causal())
        end = x[jnp.arange(len(x)), tokens.argmax(-1)]
        return nn.Dense(self.embed_width, use_bias=False, dtype=self.dtype, name='proj')(end)


def load_text_tower(name: str | os.PathLike, **settings: Any) -> tuple[CLIPText, dict]:
    """A text tower from a file that holds one, such as a whole CLIP.

    Args:
      name: a path, or an address as `load_backbone` takes it ('hf:openai/clip-vit-base-patch32').
      **settings: what weights do not tell: `heads`, `activation='gelu'` for LAION's.

    Returns:
      (module, parameters, with `logit_scale` among them).

    Raises:
      UsageError: no such file, or none that holds a text tower.
    """
    address = os.fspath(name)
    path = fetch.present(address) if fetch.is_address(address) else Path(address).expanduser()
    with containers.opened(path) as file:
        return build(file, **settings)


def build(source: scheme.Source, **settings: Any) -> tuple[CLIPText, dict]:
    """`load_text_tower` of an opened file."""
    part, ported = scheme.port(source, 'clip_text', settings)
    model = CLIPText(**{**ported.settings, **settings})
    tokens = jax.ShapeDtypeStruct((1, model.context), jnp.int32)
    template = jax.eval_shape(lambda x: model.init(jax.random.key(0), x)['params'], tokens)
    check_names(ported.weights, flatten_dict(template, sep='/'), source.path, ())
    return model, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), scheme.load(part, ported))


def text_features(model: CLIPText, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Features float32 [N, E], not normalised, of tokens int32 [N, T]."""
    run = jax.jit(lambda params, tokens: model.apply({'params': params}, tokens))
    count = len(tokens)
    padded = np.resize(tokens, (-(-count // _CHUNK) * _CHUNK, tokens.shape[1])) if count > _CHUNK else tokens
    size = min(count, _CHUNK)
    parts = [np.asarray(run(params, padded[i : i + size])) for i in range(0, len(padded), size)]
    return np.concatenate(parts)[:count]


def texts(class_names: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> list[str]:
    """Every class in every template, template by template, so that text template * C + class is of that class.

    Args:
      class_names: C names; '_' and '-' become spaces, and capitals small letters, as VP has it.
      templates: texts with {} for the name.

    Raises:
      UsageError: a template without a place for the name.
    """
    for template in templates:
        if template.count('{}') != 1:
            raise UsageError(f'a template has one {{}} for the name of the class, got {template!r}')
    names = [name.replace('_', ' ').replace('-', ' ').lower() for name in class_names]
    return [template.format(name) for template in templates for name in names]
