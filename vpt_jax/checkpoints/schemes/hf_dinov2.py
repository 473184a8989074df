"""DINOv2 of Hugging Face's `transformers`, with and without registers (arXiv 2304.07193, 2309.16588).

The features are what its classifiers see: CLS and the mean of the patches side by side; `pool='tok'` for CLS alone.
Names of both generations are read: version 5 renamed attention and gated MLPs, and writes the old names.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_vit import Names, ViTPlan, hub_conventions
from vpt_jax.checkpoints.source import Source

NAME = 'hf_dinov2'
ABOUT = "DINOv2 of Hugging Face ('dinov2.encoder.layer.0.layer_scale1.lambda1')"

_PREFIXES = ('dinov2.', 'dinov2_with_registers.', '')
_OUTER = {
    'patch': 'embeddings.patch_embeddings.projection', 'position': 'embeddings.position_embeddings',
    'cls': 'embeddings.cls_token', 'registers': 'embeddings.register_tokens', 'norm': 'layernorm',
    'block': 'encoder.layer.{}.', 'norm1': 'norm1', 'norm2': 'norm2', 'mlp': (('mlp.fc1', 'mlp.fc2'),),
    'gated': ('mlp.weights_in', 'mlp.weights_out'),
    'scales': (('layer_scale1.lambda1', 'layer_scale2.lambda1'),),
}  # fmt: skip
_OLD = Names(qkv=tuple(f'attention.attention.{part}' for part in ('query', 'key', 'value')),
             out='attention.output.dense', **_OUTER)  # fmt: skip
_NEW = Names(qkv=tuple(f'attention.{part}_proj' for part in 'qkv'), out='attention.o_proj', **_OUTER)
_IGNORED = {r'(\w+\.)?embeddings\.mask_token': 'what masked pretraining predicts with',
            r'classifier\.(weight|bias)': 'task head'}  # fmt: skip


class _Plan(ViTPlan):
    def mlp(self, canonical: str, name: str) -> None:
        """As a ViT's; the new names keep the halves of a gated MLP apart."""
        if f'{name}mlp.gate_proj.weight' not in self:
            super().mlp(canonical, name)
            return
        for ours, theirs in (('gate', 'gate_proj'), ('Dense_0', 'up_proj'), ('Dense_1', 'down_proj')):
            self.linear(f'{canonical}/{ours}', f'{name}mlp.{theirs}')


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a DINOv2's."""
    return any(
        {f'{p}encoder.layer.0.layer_scale1.lambda1', f'{p}embeddings.position_embeddings'} <= set(names)
        for p in _PREFIXES
    )


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ViT; positions are resampled as `transformers` does it, with registers and without."""
    prefix = next((p for p in _PREFIXES if f'{p}embeddings.cls_token' in source.members), '')
    old = f'{prefix}encoder.layer.0.{_OLD.qkv[0]}.weight' in source.members
    plan = _Plan(source, "a DINOv2 in Hugging Face's names", (_OLD if old else _NEW).within(prefix), hints)
    plan.norm('Transformer/encoder_norm', f'{prefix}layernorm')
    registers = f'{prefix}embeddings.register_tokens' in plan
    settings = plan.settings(**hub_conventions(source, 'gelu', 1e-6),
                             posemb_rule='cubic_antialias' if registers else 'cubic', pool='tok_gap')  # fmt: skip
    return plan.ported('vit', settings, _IGNORED)
