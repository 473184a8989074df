"""Writing a scheme down: which arrays of a PyTorch file make which of ours, and that none is left over."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vpt_jax.checkpoints.layouts import Layout, conv, from_heads, into_heads, linear, rows, same
from vpt_jax.checkpoints.npz import natural
from vpt_jax.checkpoints.ported import Ported, Weight
from vpt_jax.checkpoints.source import Source
from vpt_jax.errors import UsageError


class Plan:
    """Collects the weights of a network, module by module; `ported` closes it.

    Canonical names are ours up to the leaf ('block_0/LayerNorm_0'), names are the file's ('layers.0.blocks.0.norm1').

    Attributes:
      source: the file.
      about: whose network it should be, for messages ('a Swin Transformer').
    """

    def __init__(self, source: Source, about: str):
        self.source, self.about = source, about
        self._weights: dict[str, Weight] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.source.members

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of a member.

        Raises:
          UsageError: the file has no such member, or one with another number of axes.
        """
        if name not in self:
            raise UsageError(f'{self.source.path} is not {self.about} that vpt_jax knows: it has no {name!r}')
        shape = self.source.members[name].shape
        if len(shape) != rank:
            raise UsageError(f'{self.source.path}: {name!r} has shape {list(shape)}, expected {rank} axes')
        return shape

    def add(self, canonical: str, name: str, rank: int, layout: Layout = same) -> None:
        """One array of ours, leaf included, out of a member of so many axes."""
        shape = self.shape(name, rank)
        try:  # layouts only move entries about, so the shape can be had without the data
            ours = layout(np.empty(shape, np.bool_)).shape
        except ValueError as error:
            raise UsageError(
                f'{self.source.path}: {name!r} has shape {list(shape)}, which does not fit {self.about}'
            ) from error
        self._weights[canonical] = Weight(ours, (name,), layout)

    def norm(self, canonical: str, name: str) -> None:
        """A LayerNorm."""
        self.add(f'{canonical}/scale', f'{name}.weight', 1)
        self.add(f'{canonical}/bias', f'{name}.bias', 1)

    def conv(self, canonical: str, name: str, bias: bool = True) -> None:
        """A two-dimensional convolution."""
        self.add(f'{canonical}/kernel', f'{name}.weight', 4, conv)
        if bias:
            self.add(f'{canonical}/bias', f'{name}.bias', 1)

    def linear(self, canonical: str, name: str, bias: bool = True) -> None:
        """A linear layer."""
        self.add(f'{canonical}/kernel', f'{name}.weight', 2, linear)
        if bias:
            self.add(f'{canonical}/bias', f'{name}.bias', 1)

    def attention(self, canonical: str, name: str, heads: int) -> None:
        """Attention with a fused `qkv` layer, rows [q | k | v] and heads first in each, and an output layer `proj`."""
        split = into_heads(heads)
        for i, part in enumerate(('query', 'key', 'value')):
            self.add(f'{canonical}/{part}/kernel', f'{name}.qkv.weight', 2, rows(i, 3, split))
            self.add(f'{canonical}/{part}/bias', f'{name}.qkv.bias', 1, rows(i, 3, split))
        self.add(f'{canonical}/out/kernel', f'{name}.proj.weight', 2, from_heads(heads))
        self.add(f'{canonical}/out/bias', f'{name}.proj.bias', 1)

    def ported(self, family: str, settings: Mapping[str, Any], ignored: Mapping[str, str]) -> Ported:
        """The finished plan.

        Args:
          family: key of `models.families.FAMILIES`.
          settings: the network's.
          ignored: pattern of names that are not read, to the reason.

        Raises:
          UsageError: a member that is neither read nor ignored.
        """
        read = {name for weight in self._weights.values() for name in weight.names}
        left, unknown = {}, []
        for name in self.source.members.keys() - read:
            reason = next((why for pattern, why in ignored.items() if re.fullmatch(pattern, name)), None)
            if reason is None:
                unknown.append(name)
            else:
                left[name] = reason
        if unknown:
            more = f' and {len(unknown) - 1} more such names' if len(unknown) > 1 else ''
            first = min(unknown, key=natural)
            raise UsageError(f'{self.source.path} is not {self.about} that vpt_jax knows: it holds {first!r}{more}')
        return Ported(family, dict(settings), self._weights, left)
