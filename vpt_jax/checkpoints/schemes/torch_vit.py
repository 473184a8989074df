"""What the PyTorch families of ViTs share: a table of names each, and one plan for all of them.

Shapes: D width, H heads, k = D / H, T position embeddings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vpt_jax.checkpoints.layouts import from_heads, into_heads, linear, reshaped, rows
from vpt_jax.checkpoints.plan import Plan
from vpt_jax.checkpoints.ported import Weight
from vpt_jax.checkpoints.schemes import big_vision
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError, unknown

#: Heads where they are not D / 64: big_vision's So400m, H, g, G and e, whose shapes PyTorch's files have too.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
#: Hugging Face's `hidden_act` to ours.
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
                'quick_gelu': 'quick_gelu'}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family calls the parts of a ViT; '' for what it never has.

    Attributes:
      patch: the patch convolution.
      position: the position embedding, [1, T, D] or [T, D].
      norm: the norm after the last block.
      block: prefix of a block, with its number as {}.
      norm1, norm2: inside a block.
      qkv: its fused query-key-value layer up to the leaf ('attn.qkv.'), or the names of the three.
      out: the attention's output layer.
      mlp: first and second layer, of the spelling that a file has.
      gated: of a gated MLP: the fused layer of both halves, and the last one.
      scales: the two vectors of layer scale, of the spelling that a file has.
      cls, dist, registers: the prefix tokens.
      pre_norm: the norm before the first block.
    """

    patch: str
    position: str
    norm: str
    block: str
    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[tuple[str, str], ...]
    gated: tuple[str, str] | None = None
    scales: tuple[tuple[str, str], ...] = ()
    cls: str = ''
    dist: str = ''
    registers: str = ''
    pre_norm: str = ''

    def within(self, prefix: str) -> 'Names':
        """The names behind a prefix."""
        outer = ('patch', 'position', 'norm', 'block', 'cls', 'dist', 'registers', 'pre_norm')
        return dataclasses.replace(self, **{f: prefix + getattr(self, f) for f in outer if getattr(self, f)})

    def spelled(self, separator: str) -> 'Names':
        """The names with another separator than a dot."""

        def change(value: Any) -> Any:
            return value.replace('.', separator) if isinstance(value, str) else value and tuple(map(change, value))

        return Names(**{field.name: change(getattr(self, field.name)) for field in dataclasses.fields(self)})


class ViTPlan(Plan):
    """Collects the weights of a ViT; `settings` has those that shapes tell.

    Attributes:
      names: the family's.
      heads: H.
      The others are `Plan`'s.
    """

    def __init__(self, source: Source, about: str, names: Names, hints: Mapping[str, Any],
                 heads: Mapping[int, int] = HEADS):  # fmt: skip
        super().__init__(source, about)
        self.names = names
        self.conv('embedding', names.patch, self.leaf(names.patch, 'bias') in self)
        self.width = self._weights['embedding/kernel'].shape[-1]
        self.heads = self._heads(hints, heads)
        for token in ('cls', 'dist', 'registers'):
            if getattr(names, token) in self:
                self.tokens(token, getattr(names, token))
        if names.position in self:
            self.tokens('pos_embedding', names.position)
        if names.pre_norm and self.leaf(names.pre_norm, 'bias') in self:
            self.norm('pre_norm', names.pre_norm)
        for i in range(self._depth()):
            self._block(f'Transformer/encoderblock_{i}', names.block.format(i))

    def leaf(self, name: str, leaf: str) -> str:
        """The name of a module's `weight` or `bias`."""
        return f'{name}.{leaf}'

    def settings(self, activation: str, ln_eps: float, posemb_rule: str, **others: Any) -> dict[str, Any]:
        """The settings of `models.vit.ViT`: what names and shapes tell, and the family's conventions."""
        found = big_vision.settings(self._weights, self.source.path)
        gated = found['activation'] == 'swiglu'
        conventions = {'activation': 'swiglu' if gated else activation, 'ln_eps': ln_eps, 'posemb_rule': posemb_rule}
        size = vision_config(self.source).get('image_size')
        if isinstance(size, int) and size // found['patch_size'] * found['patch_size'] == found.get('image_size'):
            conventions['image_size'] = size  # So400m/14 takes images of 384 pixels, which are no whole patches
        return found | conventions | others

    def made(self, canonical: str, array: np.ndarray) -> None:
        """An array that no file holds."""
        self._weights[canonical] = Weight(array.shape, (), lambda: array)

    def tokens(self, canonical: str, name: str) -> None:
        """Vectors of D numbers, of any shape in the file, as [1, count, D]."""
        rank = len(self.source.members[name].shape) if name in self else 3
        self.add(canonical, name, rank, reshaped(1, -1, self.width))

    def into(self, canonical: str, name: str) -> None:
        """A query, key or value layer by itself."""
        self.add(f'{canonical}/kernel', f'{name}.weight', 2, into_heads(self.heads))
        self.add(f'{canonical}/bias', f'{name}.bias', 1, into_heads(self.heads))

    def fused(self, canonical: str, name: str, parts: tuple[str, ...] = ('query', 'key', 'value')) -> None:
        """A layer of several of them, one below the other; its name goes up to the leaf."""
        for i, part in enumerate(parts):
            layout = rows(i, len(parts), into_heads(self.heads))
            self.add(f'{canonical}/{part}/kernel', f'{name}weight', 2, layout)
            self.add(f'{canonical}/{part}/bias', f'{name}bias', 1, layout)

    def out(self, canonical: str, name: str) -> None:
        """An attention's output layer."""
        self.add(f'{canonical}/out/kernel', f'{name}.weight', 2, from_heads(self.heads))
        self.add(f'{canonical}/out/bias', f'{name}.bias', 1)

    def gated(self, canonical: str, first: str, last: str) -> None:
        """A gated MLP whose first layer has the gate's rows, then the other half's."""
        for i, part in enumerate(('gate', 'Dense_0')):
            self.add(f'{canonical}/{part}/kernel', f'{first}.weight', 2, rows(i, 2, linear))
            self.add(f'{canonical}/{part}/bias', f'{first}.bias', 1, rows(i, 2))
        self.linear(f'{canonical}/Dense_1', last)

    def mlp(self, canonical: str, name: str) -> None:
        """The MLP of the block with this prefix, of whatever kind."""
        names, gated = self.names, self.names.gated
        if gated and self.leaf(name + gated[0], 'bias') in self:
            self.gated(canonical, name + gated[0], name + gated[1])
            return
        held = (pair for pair in names.mlp if self.leaf(name + pair[0], 'bias') in self)
        first, last = (name + part for part in next(held, names.mlp[0]))
        self.linear(f'{canonical}/Dense_0', first)
        self.linear(f'{canonical}/Dense_1', last)

    def _block(self, canonical: str, name: str) -> None:
        names, attention = self.names, f'{canonical}/MultiHeadDotProductAttention_0'
        self.norm(f'{canonical}/LayerNorm_0', name + names.norm1)
        self.norm(f'{canonical}/LayerNorm_1', name + names.norm2)
        if len(names.qkv) == 1:
            self.fused(attention, name + names.qkv[0])
        else:
            for part, theirs in zip(('query', 'key', 'value'), names.qkv, strict=True):
                self.into(f'{attention}/{part}', name + theirs)
        self.out(attention, name + names.out)
        self.mlp(f'{canonical}/MlpBlock_0', name)
        for pair in names.scales:
            if name + pair[0] in self:
                self.add(f'{canonical}/layer_scale_1', name + pair[0], 1)
                self.add(f'{canonical}/layer_scale_2', name + pair[1], 1)

    def _depth(self) -> int:
        """Number of blocks; a gap between them shows as a missing name later."""
        start, rest = self.names.block.split('{}')
        found = (n.removeprefix(start).split(rest)[0] for n in self.source.members if n.startswith(start))
        return 1 + max((int(number) for number in found if number.isdigit()), default=0)

    def _heads(self, hints: Mapping[str, Any], known: Mapping[int, int]) -> int:
        width, path = self.width, self.source.path
        heads = hints.get('heads') or vision_config(self.source).get('num_attention_heads') or known.get(width)
        heads = heads or (0 if width % 64 else width // 64)
        return checked_heads(path, width, heads)


def checked_heads(path: str, width: int, heads: Any) -> int:
    """A number of heads that a network of this width can have.

    Raises:
      UsageError: it is none, or not known (0, None).
    """
    if not heads:
        raise UsageError(
            f'{path} does not tell how many heads its width of {width} is for: give it with heads=, or once and '
            f'for all with python -m vpt_jax.convert {path} OUT.safetensors --set heads=N'
        )
    if type(heads) is not int or heads < 1:
        raise UsageError(f'{path}: {heads!r} is no number of heads: give another heads=')
    if width % heads:
        raise UsageError(f'{path}: {heads} heads do not divide its width of {width}: give another heads=')
    return heads


def vision_config(source: Source) -> Mapping[str, Any]:
    """What Hugging Face's config.json says of the image tower; {} without one."""
    inner = source.config.get('vision_config')
    return inner if isinstance(inner, Mapping) else source.config


def hub_conventions(source: Source, activation: str, ln_eps: float) -> dict[str, Any]:
    """Activation and epsilon of a Hugging Face config.json, or these where it does not say.

    Raises:
      UsageError: an activation that vpt_jax does not have.
    """
    config = vision_config(source)
    said = config.get('hidden_act')
    if said is not None and (not isinstance(said, str) or said not in _ACTIVATIONS):
        raise unknown(f'hidden_act of {source.path}', said, _ACTIVATIONS)
    return {'activation': _ACTIVATIONS.get(said, activation), 'ln_eps': config.get('layer_norm_eps', ln_eps)}
