"""Text towers of CLIP (arXiv 2103.00020), in OpenAI's names and in Hugging Face's, for `models.clip_text.CLIPText`.

A file of both towers is taken for its image tower unless this scheme is asked for by name.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vpt_jax.checkpoints.layouts import linear, same
from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.clip import HUB, OPENAI
from vpt_jax.checkpoints.schemes.torch_vit import Names, ViTPlan, hub_conventions
from vpt_jax.checkpoints.source import Source

NAME = 'clip_text'
ABOUT = "text towers of CLIP, OpenAI's ('token_embedding.weight') and Hugging Face's ('text_model...')"

_OPENAI = dataclasses.replace(
    OPENAI, patch='token_embedding', position='positional_embedding', norm='ln_final',
    block='transformer.resblocks.{}.',
)  # fmt: skip
_HUB = dataclasses.replace(
    HUB, patch='text_model.embeddings.token_embedding', position='text_model.embeddings.position_embedding.weight',
    norm='text_model.final_layer_norm', block='text_model.encoder.layers.{}.',
)  # fmt: skip
_PROJECTIONS = (('text_projection', same), ('text_projection.weight', linear))
_IGNORED = {
    r'visual(_projection)?\..*|visual\.proj|vision_model\..*': 'image tower',
    r'input_resolution|context_length|vocab_size|logit_bias': 'a setting',
    r'(.*\.)?position_ids|attn_mask': 'buffer, recomputed',
}
#: Trained scales end at this bound; files of the text tower alone do not hold theirs.
_LOGIT_SCALE = math.log(100)


def claims(names: Collection[str]) -> bool:
    """Whether a text tower of CLIP is among the names."""
    return _spelling(names) is not None


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a text tower; `hints` may have 'heads' and 'activation' as for image towers."""
    plan = _TextPlan(source, _spelling(source.members) or _OPENAI, hints)
    name, layout = next((pair for pair in _PROJECTIONS if pair[0] in plan), _PROJECTIONS[0])
    plan.add('proj/kernel', name, 2, layout)
    if 'logit_scale' in plan:
        plan.add('logit_scale', 'logit_scale', 0)
    else:
        plan.made('logit_scale', np.float32(_LOGIT_SCALE).reshape(()))
    vocab, width = plan.shape(f'{plan.names.patch}.weight', 2)
    conventions = hub_conventions(plan.source, 'quick_gelu', 1e-5)
    settings = {
        'vocab': vocab,
        'context': plan.shape(plan.names.position, 2)[0],
        'width': width,
        'depth': plan.depth,
        'heads': plan.heads,
        'mlp_dim': 4 * width,
        'embed_width': plan.shape(name, 2)[0 if layout is linear else 1],
        **conventions,
    }
    return plan.ported('clip_text', settings | {k: hints[k] for k in ('activation',) if k in hints}, _IGNORED)


class _TextPlan(ViTPlan):
    """Collects the weights of a text tower, whose blocks are a ViT's."""

    def __init__(self, source: Source, names: Names, hints: Mapping[str, Any]):
        # Of a config.json, what speaks of this tower, where `ViTPlan` looks for the image tower's.
        config = source.config.get('text_config', source.config)
        Plan.__init__(self, Source(source.path, source.members, config), 'the text tower of a CLIP')
        self.names = names
        self.add('token_embedding', f'{names.patch}.weight', 2)
        self.add('pos_embedding', names.position, 2)
        self.width = self.shape(names.position, 2)[1]
        self.heads = self._heads(hints, {})
        self.depth = self._depth()
        for i in range(self.depth):
            self._block(f'Transformer/encoderblock_{i}', names.block.format(i))
        self.norm('Transformer/encoder_norm', names.norm)


def _spelling(names: Collection[str]) -> Names | None:
    return next((s for s in (_OPENAI, _HUB) if f'{s.patch}.weight' in names and f'{s.norm}.weight' in names
                 and any(projection in names for projection, _ in _PROJECTIONS)), None)  # fmt: skip
