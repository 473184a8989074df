"""BEiT and BEiT v2, from masked pretraining and fine-tuned: microsoft/unilm, timm and Hugging Face.

unilm (timm has the same names) fuses query, key and value and keeps `q_bias` and `v_bias` beside them; a pretraining
file has `mask_token`, `norm`, `lm_head`, one table `rel_pos_bias` for all blocks and, in v2, the second branch
`cls_pt_layers`. Hugging Face's hub files use the names of transformers < 5; those of transformers 5 are read too.

What weights do not tell, hints may: `branch_from`, the block that feeds the second branch (9 of 12 and 21 of 24 in the
released files); `window_rows` and `window_columns` of a window that is not square; `heads` of a file without tables,
where heads are not 64 wide.

Shapes: D width, H heads, R distances.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from vpt_jax.checkpoints.layouts import from_heads, into_heads, rows
from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Ported
from vpt_jax.checkpoints.schemes.torch_vit import checked_heads
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError

NAME = 'beit'
ABOUT = "BEiT and BEiT v2 of microsoft/unilm, timm and Hugging Face ('blocks.0.attn.q_bias', 'beit.embeddings...')"

# From the names used below to a file's: patterns, applied in order.
_UNILM = ((r'attn\.(q|v)\w+\.bias$', r'attn.\1_bias'),)
_HUB = (
    (r'^(cls_token|mask_token)$', r'embeddings.\1'),
    (r'^pos_embed$', 'embeddings.position_embeddings'),
    (r'^patch_embed\.proj', 'embeddings.patch_embeddings.projection'),
    (r'^fc_norm', 'pooler.layernorm'),
    (r'^norm\.', 'layernorm.'),
    (r'\.norm1\.', '.layernorm_before.'),
    (r'\.norm2\.', '.layernorm_after.'),
    (r'\.gamma_', '.lambda_'),
)
_HUB_4 = (
    *_HUB,
    (r'^rel_pos_bias', 'encoder.relative_position_bias'),
    (r'^blocks', 'encoder.layer'),
    (r'attn\.(query|key|value)', r'attention.attention.\1'),
    (r'attn\.relative', 'attention.attention.relative_position_bias.relative'),
    (r'attn\.proj', 'attention.output.dense'),
    (r'mlp\.fc1', 'intermediate.dense'),
    (r'mlp\.fc2', 'output.dense'),
)
_HUB_5 = (
    *_HUB,
    (r'^rel_pos_bias', 'shared_position_bias'),
    (r'^blocks', 'layers'),
    (r'attn\.(q|k|v)\w+\.', r'attention.\1_proj.'),
    (r'attn\.relative', 'relative_position_bias.relative'),
    (r'attn\.proj', 'attention.o_proj'),
)
_TABLE = 'relative_position_bias_table'
_IGNORED = {
    r'.*relative_position_index': 'buffer, recomputed',
    r'(head|classifier)\..*': 'task head',
    r'quantize\.(?!embedding\.weight).*': "the tokenizer's running counts",
}
#: Depth to the block that feeds the second branch, in the released files.
_BRANCH_FROM = {12: 9, 24: 21}


def claims(names: Collection[str]) -> bool:
    """Whether the names are a BEiT's."""
    names = set(names)
    if 'blocks.0.attn.qkv.weight' in names:
        of_beit = ('blocks.0.attn.q_bias', f'blocks.0.attn.{_TABLE}', f'rel_pos_bias.{_TABLE}', 'lm_head.weight')
        return any(name in names for name in of_beit)
    return any(re.fullmatch(r'(beit\.)?(encoder\.layer|layers)\.0\.lambda_1', name) for name in names) or (
        'beit.embeddings.cls_token' in names
    )


def port(source: Source, hints: Mapping[str, Any]) -> Ported:
    """The plan for a BEiT.

    A classifier's features are its own: the mean of the patches, then `fc_norm`, or the normalised CLS. Those of a
    pretraining file are the mean of the normalised patches.
    """
    plan = _BeitPlan(source, hints)
    for canonical, name, rank in (
        ('cls', 'cls_token', 3),
        ('mask_token', 'mask_token', 3),
        ('pos_embedding', 'pos_embed', 3),
        ('relative_bias', f'rel_pos_bias.{_TABLE}', 2),
        ('codebook', 'quantize.embedding.weight', 2),
    ):
        if plan.has(name) or name == 'cls_token':
            plan.add(canonical, name, rank)
    plan.conv('embedding', 'patch_embed.proj')
    for i in range(plan.depth):
        plan.block(f'Transformer/encoderblock_{i}', f'blocks.{i}')
    for canonical, name in (('Transformer/encoder_norm', 'norm'), ('fc_norm', 'fc_norm')):
        if plan.has(f'{name}.weight'):
            plan.norm(canonical, name)
    settings = plan.settings()
    if settings['vocab']:
        plan.linear('lm_head', 'lm_head')
    for i in range(settings.get('branch_depth', 0)):
        plan.block(f'branch/encoderblock_{i}', f'cls_pt_layers.{i}')
    if settings.get('branch_head'):
        plan.norm('branch/encoder_norm', 'cls_pt_norm')
        plan.linear('branch_lm_head', 'cls_pt_lm_head')
    return plan.ported('beit', settings, _IGNORED)


class _BeitPlan(Plan):
    """The plan of a file in any of the spellings, in unilm's names but with query, key and value apart."""

    def __init__(self, source: Source, hints: Mapping[str, Any]):
        super().__init__(source, 'a BEiT')
        self.hints = hints
        first = next((n for n in source.members if re.search(r'(^|\.)(encoder\.layer|layers)\.0\.', n)), '')
        self.spelling = _HUB_5 if re.match(r'(beit\.)?layers', first) else _HUB_4 if first else _UNILM
        self.fused = self.spelling is _UNILM
        self.within = 'beit.' if first.startswith('beit.') else ''
        pattern = re.compile(re.escape(self.spelled('blocks.0.')).replace('0', r'(\d+)') + '.*')
        self.depth = 1 + max((int(m[1]) for name in source.members if (m := pattern.fullmatch(name))), default=-1)
        self.width = self.size('cls_token', 3)[2]
        self.heads = self._heads()

    def spelled(self, name: str) -> str:
        """The file's name for one of ours."""
        for pattern, new in self.spelling:
            name = re.sub(pattern, new, name)
        # The head of masked prediction and its norm lie outside the encoder.
        outside = (name, f'{self.within}{name}') if name.split('.')[0] in ('lm_head', 'layernorm', 'quantize') else ()
        return next((n for n in outside if n in self.source.members), f'{self.within}{name}')

    def has(self, name: str) -> bool:
        """Whether the file holds an array, whatever the spelling."""
        return self.spelled(name) in self

    def size(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of a member, whatever the spelling."""
        return self.shape(self.spelled(name), rank)

    def add(self, canonical: str, name: str, *args: Any) -> None:
        """As a plan's, whatever the spelling."""
        super().add(canonical, self.spelled(name), *args)

    def block(self, canonical: str, name: str) -> None:
        """One block with all that it has."""
        attention, split = f'{canonical}/MultiHeadDotProductAttention_0', into_heads(self.heads)
        self.norm(f'{canonical}/LayerNorm_0', f'{name}.norm1')
        self.norm(f'{canonical}/LayerNorm_1', f'{name}.norm2')
        for i, part in enumerate(('query', 'key', 'value')):
            if self.fused:
                self.add(f'{attention}/{part}/kernel', f'{name}.attn.qkv.weight', 2, rows(i, 3, split))
            else:
                self.add(f'{attention}/{part}/kernel', f'{name}.attn.{part}.weight', 2, split)
            if part[0] in self.biased:
                self.add(f'{attention}/{part}/bias', f'{name}.attn.{part}.bias', 1, split)
        self.add(f'{attention}/out/kernel', f'{name}.attn.proj.weight', 2, from_heads(self.heads))
        self.add(f'{attention}/out/bias', f'{name}.attn.proj.bias', 1)
        if self.has(f'blocks.0.attn.{_TABLE}'):
            self.add(f'{attention}/relative_bias', f'{name}.attn.{_TABLE}', 2)
        self.linear(f'{canonical}/MlpBlock_0/Dense_0', f'{name}.mlp.fc1')
        self.linear(f'{canonical}/MlpBlock_0/Dense_1', f'{name}.mlp.fc2')
        for i in (1, 2) if self.has('blocks.0.gamma_1') else ():
            self.add(f'{canonical}/layer_scale_{i}', f'{name}.gamma_{i}', 1)

    @property
    def biased(self) -> str:
        """The first letters of those of query, key and value that have a bias."""
        return ''.join(p[0] for p in ('query', 'key', 'value') if self.has(f'blocks.0.attn.{p}.bias'))

    def settings(self) -> dict[str, Any]:
        """The settings of `models.beit.BEiT`."""
        patch = self.size('patch_embed.proj.weight', 4)[2]
        window, pooled = self._window(), self.has('fc_norm.weight')
        own, shared = self.has(f'blocks.0.attn.{_TABLE}'), self.has(f'rel_pos_bias.{_TABLE}')
        vocab = self.size('lm_head.weight', 2)[0] if self.has('lm_head.weight') else 0
        found = {
            'width': self.width,
            'depth': self.depth,
            'mlp_dim': self.size('blocks.0.mlp.fc1.weight', 2)[0],
            'heads': self.heads,
            'patch_size': patch,
            'image_size': window[0] * patch,
            'window_rows': window[0],
            'window_columns': window[1],
            'pool': 'gap' if pooled or vocab else 'tok',
            'posemb': 'learn' if self.has('pos_embed') else 'none',
            'posemb_rule': 'cubic_offset' if self.fused else 'cubic',
            'relative': 'both' if own and shared else 'block' if own else 'shared' if shared else 'none',
            'relative_rule': 'geometric_cubic' if self.fused else 'linear',
            'biased': self.biased,
            'final_norm': self.has('norm.weight'),
            'fc_norm': pooled,
            'layer_scale': self.has('blocks.0.gamma_1'),
            'mask_token': self.has('mask_token'),
            'vocab': vocab,
            # Hugging Face's own default, which their conversion of these weights left in place.
            'ln_eps': 1e-6 if self.fused else self.source.config.get('layer_norm_eps', 1e-12),
        }
        if self.has('quantize.embedding.weight'):
            found['code_width'] = self.size('quantize.embedding.weight', 2)[1]
        return found | self._branch()

    def _branch(self) -> dict[str, Any]:
        pattern = re.compile(r'cls_pt_layers\.(\d+)\.norm1\.weight')
        depth = 1 + max((int(m[1]) for name in self.source.members if (m := pattern.fullmatch(name))), default=-1)
        if not depth:
            return {}
        start = self.hints.get('branch_from') or _BRANCH_FROM.get(self.depth)
        if start is None:
            raise UsageError(
                f'{self.source.path} has a second branch, and does not tell from which of its {self.depth} blocks it '
                'starts: give branch_from='
            )
        return {'branch_from': start, 'branch_depth': depth, 'branch_head': self.has('cls_pt_lm_head.weight')}

    def _heads(self) -> int:
        for table in (f'blocks.0.attn.{_TABLE}', f'rel_pos_bias.{_TABLE}'):
            if self.has(table):
                return self.size(table, 2)[1]
        heads = self.hints.get('heads') or self.source.config.get('num_attention_heads') or self.width // 64
        return checked_heads(self.source.path, self.width, heads)

    def _window(self) -> tuple[int, int]:
        """Rows and columns of patches that tables or positions are for."""
        given = self.hints.get('window_rows'), self.hints.get('window_columns')
        if all(given):
            return given
        for table in (f'blocks.0.attn.{_TABLE}', f'rel_pos_bias.{_TABLE}'):
            if self.has(table):
                count = self.size(table, 2)[0] - 3
                side = (math.isqrt(max(count, 0)) + 1) // 2
                square = (2 * side - 1) ** 2 == count
                break
        else:
            count = self.size('pos_embed', 3)[1] - 1
            side = math.isqrt(max(count, 0))
            square = side**2 == count
        if not square or not side:
            raise UsageError(
                f'{self.source.path} has positions of a window that is not square: give window_rows= and '
                'window_columns='
            )
        return side, side
