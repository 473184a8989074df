"""Image towers of SigLIP and SigLIP 2 (arXiv 2303.15343, 2502.14786) as Hugging Face publishes them.

`vision_model.` comes before the tower's names in files of whole models, and not in those of a tower alone. big_vision's
own files are read by `big_vision`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_vit import HEADS, Names, ViTPlan, hub_conventions
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

NAME = 'siglip'
ABOUT = "image towers of Hugging Face's SigLIP ('vision_model.head.probe', no class_embedding)"

_PREFIXES = ('vision_model.', '')
_NAMES = Names(
    patch='embeddings.patch_embedding', position='embeddings.position_embedding.weight', norm='post_layernorm',
    block='encoder.layers.{}.', norm1='layer_norm1', norm2='layer_norm2',
    qkv=tuple(f'self_attn.{part}_proj' for part in 'qkv'), out='self_attn.out_proj', mlp=(('mlp.fc1', 'mlp.fc2'),),
)  # fmt: skip
_IGNORED = {
    r'text_model\..*': 'text tower',
    r'logit_(scale|bias)': 'scale of the scores between images and texts',
    r'(.*\.)?position_ids': 'buffer, recomputed',
    r'classifier\.(weight|bias)': 'task head',
    r'(vision_model\.)?head\..*': 'attention pooling; these features are pooled otherwise',
}


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a tower's: CLIP's, which are much the same, have a class embedding."""
    return any(
        {f'{p}embeddings.patch_embedding.weight', f'{p}encoder.layers.0.layer_norm1.weight'} <= set(names)
        and f'{p}embeddings.class_embedding' not in names
        for p in _PREFIXES
    )


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ViT with a MAP head, or without one (`vision_use_head=False`) for the mean of all tokens."""
    prefix = next(p for p in _PREFIXES if f'{p}embeddings.patch_embedding.weight' in source.members)
    names = _NAMES.within(prefix)
    if len(source.members[f'{names.patch}.weight'].shape) == 2:
        raise UsageError(
            f'{source.path} is a NaFlex ViT (patches of any aspect as a linear layer), which vpt_jax does not run'
        )
    plan = ViTPlan(source, "a SigLIP in Hugging Face's names", names, hints, {**HEADS, 1536: 16})
    plan.norm('Transformer/encoder_norm', names.norm)
    if f'{prefix}head.probe' in plan and hints.get('pool', 'map') == 'map':
        head = f'{prefix}head.'
        plan.tokens('MAPHead_0/probe', f'{head}probe')
        plan.fused('MAPHead_0/MultiHeadDotProductAttention_0', f'{head}attention.in_proj_')
        plan.out('MAPHead_0/MultiHeadDotProductAttention_0', f'{head}attention.out_proj')
        plan.norm('MAPHead_0/LayerNorm_0', f'{head}layernorm')
        plan.linear('MAPHead_0/MlpBlock_0/Dense_0', f'{head}mlp.fc1')
        plan.linear('MAPHead_0/MlpBlock_0/Dense_1', f'{head}mlp.fc2')
    settings = plan.settings(**hub_conventions(source, 'gelu_tanh', 1e-6), posemb_rule='cubic')
    return dataclasses.replace(plan.ported('vit', settings, _IGNORED), pixels='half')
