"""ViTs of Hugging Face's `transformers`, for PyTorch and for Flax.

`vit.` comes before all names in classifiers, and not in a `ViTModel`, which adds a pooler that nothing here uses.
Version 5 renamed the modules; its files still have the old names, and both are read. Flax has the old ones with '/',
its kernels are [in, out] already.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.layouts import reshaped
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_vit import Names, ViTPlan, hub_conventions
from vpt_jax.checkpoints.source import Source

NAME = 'hf_vit'
ABOUT = "ViTs of Hugging Face ('vit.encoder.layer.0.attention.attention.query.weight'), Flax's too"

_OUTER = {'patch': 'embeddings.patch_embeddings.projection', 'position': 'embeddings.position_embeddings',
          'cls': 'embeddings.cls_token', 'norm': 'layernorm', 'norm1': 'layernorm_before',
          'norm2': 'layernorm_after'}  # fmt: skip
_OLD = Names(
    block='encoder.layer.{}.', qkv=tuple(f'attention.attention.{part}' for part in ('query', 'key', 'value')),
    out='attention.output.dense', mlp=(('intermediate.dense', 'output.dense'),), **_OUTER,
)  # fmt: skip
_NEW = Names(
    block='layers.{}.', qkv=tuple(f'attention.{part}_proj' for part in 'qkv'), out='attention.o_proj',
    mlp=(('mlp.fc1', 'mlp.fc2'),), **_OUTER,
)  # fmt: skip
_IGNORED = {
    r'(vit[./])?pooler[./].*': 'layer behind the features',
    r'classifier[./].*': 'task head',
    r'(vit[./])?embeddings[./]mask_token|decoder[./].*': 'what masked pretraining predicts with',
}


class _FlaxPlan(ViTPlan):
    """Reads the leaves of Flax, which need no transposing."""

    def leaf(self, name: str, leaf: str) -> str:
        return f'{name}/{leaf}'

    def norm(self, canonical: str, name: str) -> None:
        for leaf in ('scale', 'bias'):
            self.add(f'{canonical}/{leaf}', f'{name}/{leaf}', 1)

    def conv(self, canonical: str, name: str, bias: bool = True) -> None:
        self._layer(canonical, name, 4)

    def linear(self, canonical: str, name: str, bias: bool = True) -> None:
        self._layer(canonical, name, 2)

    def into(self, canonical: str, name: str) -> None:
        self.add(f'{canonical}/kernel', f'{name}/kernel', 2, reshaped(self.width, self.heads, -1))
        self.add(f'{canonical}/bias', f'{name}/bias', 1, reshaped(self.heads, -1))

    def out(self, canonical: str, name: str) -> None:
        self.add(f'{canonical}/out/kernel', f'{name}/kernel', 2, reshaped(self.heads, -1, self.width))
        self.add(f'{canonical}/out/bias', f'{name}/bias', 1)

    def _layer(self, canonical: str, name: str, rank: int) -> None:
        self.add(f'{canonical}/kernel', f'{name}/kernel', rank)
        self.add(f'{canonical}/bias', f'{name}/bias', 1)


def claims(names: Collection[str]) -> bool:
    """Whether the names are such a ViT's; BEiT's, which are much the same, have further ones in every block."""
    return _spelling(names) is not None


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a ViT; without a config.json, epsilon is the 1e-12 of all published ones."""
    names, flax = _spelling(source.members) or (_OLD, False)
    plan = (_FlaxPlan if flax else ViTPlan)(source, "a ViT in Hugging Face's names", names, hints)
    plan.norm('Transformer/encoder_norm', names.norm)
    settings = plan.settings(**hub_conventions(source, 'gelu', 1e-12), posemb_rule='cubic')
    return dataclasses.replace(plan.ported('vit', settings, _IGNORED), pixels='half')


def _spelling(names: Collection[str]) -> tuple[Names, bool] | None:
    """How the file spells the names, and whether they are Flax's."""
    if any(name.endswith(('lambda_1', 'lambda_2')) or 'relative_position_bias' in name for name in names):
        return None
    for spelling in (_OLD, _NEW):
        for prefix in ('vit.', ''):
            found = spelling.within(prefix)
            first = f'{found.block.format(0)}{found.norm1}.bias'
            for flax in (False, True):
                if {name.replace('.', '/') if flax else name for name in (first, f'{found.patch}.bias')} <= set(names):
                    return (found.spelled('/') if flax else found), flax
    return None
