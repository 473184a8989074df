"""Image towers of CLIP (arXiv 2103.00020) that are ViTs, in OpenAI's names and in Hugging Face's.

The features are the embedding, which texts are compared with: the projection of CLS. `projection=0` leaves the
projection out, for CLS after the last norm.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.layouts import linear, same
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_vit import Names, ViTPlan, hub_conventions
from vpt_jax.checkpoints.source import Source

NAME = 'clip'
ABOUT = "ViT image towers of CLIP, OpenAI's ('visual.class_embedding') and Hugging Face's ('...pre_layrnorm.weight')"

OPENAI = Names(
    patch='visual.conv1', position='visual.positional_embedding', norm='visual.ln_post',
    block='visual.transformer.resblocks.{}.', norm1='ln_1', norm2='ln_2', qkv=('attn.in_proj_',), out='attn.out_proj',
    mlp=(('mlp.c_fc', 'mlp.c_proj'),), cls='visual.class_embedding', pre_norm='visual.ln_pre',
)  # fmt: skip
HUB = Names(
    patch='embeddings.patch_embedding', position='embeddings.position_embedding.weight', norm='post_layernorm',
    block='encoder.layers.{}.', norm1='layer_norm1', norm2='layer_norm2',
    qkv=tuple(f'self_attn.{part}_proj' for part in 'qkv'), out='self_attn.out_proj', mlp=(('mlp.fc1', 'mlp.fc2'),),
    cls='embeddings.class_embedding', pre_norm='pre_layrnorm',
)  # fmt: skip
_SPELLINGS = (OPENAI, HUB.within('vision_model.'), HUB)
_IGNORED = {
    r'text_model\..*|(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection(\.weight)?':
        'text tower',
    r'logit_scale': 'scale of the scores between images and texts',
    r'input_resolution|context_length|vocab_size': 'a setting',
    r'(.*\.)?position_ids': 'buffer, recomputed',
    r'visual\.proj|visual_projection\.weight': 'projection behind the features; asked for with projection=WIDTH',
    r'classifier\.(weight|bias)': 'task head',
}  # fmt: skip


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a tower's."""
    return _spelling(names) is not None


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ViT; without a config.json the activation is OpenAI's (for LAION's, `activation='gelu'`)."""
    names = _spelling(source.members) or OPENAI
    plan = ViTPlan(source, 'the image tower of a CLIP', names, hints)
    plan.norm('Transformer/encoder_norm', names.norm)
    if hints.get('projection') != 0:
        for name, layout in (('visual.proj', same), ('visual_projection.weight', linear)):
            if name in plan:
                plan.add('proj/kernel', name, 2, layout)
    conventions = hub_conventions(source, 'quick_gelu', 1e-5)
    settings = plan.settings(**conventions, posemb_rule='cubic_antialias' if names == OPENAI else 'cubic')
    return dataclasses.replace(plan.ported('vit', settings, _IGNORED), pixels='clip')


def _spelling(names: Collection[str]) -> Names | None:
    return next((s for s in _SPELLINGS if s.cls in names and f'{s.block.format(0)}{s.norm1}.weight' in names), None)
