"""The methods: how a small pytree of prompts enters a frozen network. One file a method; `base` is the mechanism."""

import dataclasses
from typing import Any

from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods.adapter import Adapter
from vpt_jax.methods.ap import AP
from vpt_jax.methods.base import Context, Method, Stack, forward
from vpt_jax.methods.clip_head import CLIPHead
from vpt_jax.methods.condense import Condensed
from vpt_jax.methods.cvpt import CVPT
from vpt_jax.methods.dino_head import DINOHead
from vpt_jax.methods.finetune import Bias, ClsToken, Full, Partial
from vpt_jax.methods.head import Linear, MLPHead
from vpt_jax.methods.label_mapping import LabelMapping
from vpt_jax.methods.lora import LoRA
from vpt_jax.methods.merging import merge
from vpt_jax.methods.norm import NormTune
from vpt_jax.methods.pgn import IIP, PGN
from vpt_jax.methods.spt import SPT
from vpt_jax.methods.vapt import VAPT
from vpt_jax.methods.vp import VP
from vpt_jax.methods.vpt import VPT
from vpt_jax.methods.vpt_add import VPTAdd
from vpt_jax.methods.vpt_below import VPTBelow
from vpt_jax.methods.vpt_pad import VPTPad
from vpt_jax.methods.vpt_pixels import VPTPixels
from vpt_jax.methods.vptm import VPTM

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (VPT, VPTAdd, VPTPixels, VPTPad, VPTBelow, VAPT, VPTM, SPT, CVPT, Condensed, Linear, MLPHead, Full,
              Partial, Bias, ClsToken, Adapter, VP, LabelMapping, CLIPHead, AP, NormTune, LoRA, PGN,
              IIP, DINOHead)
}  # fmt: skip

__all__ = ['AP', 'CVPT', 'IIP', 'METHODS', 'PGN', 'SPT', 'VAPT', 'VP', 'VPT', 'VPTM', 'Adapter', 'Bias', 'CLIPHead',
           'ClsToken', 'Condensed', 'Context', 'DINOHead', 'Full', 'LabelMapping', 'Linear', 'LoRA', 'MLPHead',
           'Method', 'NormTune', 'Partial', 'Stack', 'VPTAdd', 'VPTBelow', 'VPTPad', 'VPTPixels', 'build', 'describe',
           'forward', 'merge', 'rebuild', 'with_head']  # fmt: skip


def build(name: str, **settings: Any) -> Method:
    """A method from its name and settings, as configs and prompt files give them.

    Args:
      name: a key of `METHODS`, or several joined with '+' (`'vpt+bias'`).
      settings: the method's attributes; for a joined name, one dict of attributes per member name.

    Raises:
      UsageError: unknown name or setting, with the nearest known ones; a setting out of range.
    """
    names = name.split('+')
    if len(names) > 1:
        for key in settings:
            if key not in names:
                raise unknown(f'member of the stack {name!r}', key, names)
        return Stack(*(build(n, **settings.get(n, {})) for n in names))
    if name not in METHODS:
        raise unknown('method', name, METHODS)
    known = {f.name: f for f in dataclasses.fields(METHODS[name])}
    # JSON has no tuples.
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    for key, value in settings.items():
        if key not in known:
            raise unknown(f'setting of method {name!r}', key, known)
        if not _fits(value, known[key].default):
            kind = 'int or None' if known[key].default is None else type(known[key].default).__name__
            raise UsageError(f'method {name}: {key} must be of type {kind}, got {value!r}')
    return METHODS[name](**settings)


def _fits(value: Any, default: Any) -> bool:
    """Whether a setting has the type of its default; settings that default to None are whole numbers."""
    kinds = {type(None): (int, type(None)), float: (int, float)}.get(type(default), (type(default),))
    return isinstance(value, kinds) and (isinstance(default, bool) or not isinstance(value, bool))


def describe(method: Method) -> list[dict]:
    """A method as plain data, one entry a member; `build` of each entry gives it back."""
    members = method.methods if isinstance(method, Stack) else (method,)
    return [{'name': m.name, 'settings': dataclasses.asdict(m)} for m in members]


def rebuild(described: list[dict]) -> Method:
    """The inverse of `describe`."""
    members = [build(entry['name'], **entry['settings']) for entry in described]
    return members[0] if len(members) == 1 else Stack(*members)


def with_head(method: Method, head: Method | None = None) -> Method:
    """The method with a head: itself if it has one, else stacked with `head` (a `Linear` by default)."""
    return method if method.changes('logits') else Stack(method, head or Linear())
