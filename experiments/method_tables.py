"""Writes the tables of docs/methods.md that the code itself tells.

    python -m experiments.method_tables [--tables=matrix,costs,ap]

    matrix    which method trains on which family: all are trained for a few steps on tiny networks (minutes)
    costs     trained parameters, and what a training image costs, on ViT-B/16 with 224 pixels and 100 classes
    ap        operations and memory of activation prompts by their place on the same network

Costs are XLA's count for the compiled train step (`training.cost.train_cost`) on this machine; no weights are needed.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.method_matrix import NETWORKS, SIDE, case, descend, missing
from vpt_jax import cli
from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown
from vpt_jax.methods import (
    AP,
    CVPT,
    IIP,
    METHODS,
    PGN,
    SPT,
    VAPT,
    VP,
    VPT,
    VPTM,
    Adapter,
    Bias,
    ClsToken,
    Condensed,
    Full,
    Linear,
    LoRA,
    Method,
    MLPHead,
    NormTune,
    Partial,
    VPTAdd,
    VPTBelow,
    VPTPad,
    VPTPixels,
    with_head,
)  # fmt: skip
from vpt_jax.models.beit import BEiT
from vpt_jax.models.vit import VARIANTS, ViT
from vpt_jax.models.zoo import initial
from vpt_jax.training.cost import TrainCost, train_cost

PAGE = Path(__file__).parents[1] / 'docs' / 'methods.md'
CLASSES, BLOCKS = 100, 12
VIT = ViT(**VARIANTS['B'], patch_size=16)
_QUICK = {'compiler_options': {'xla_backend_optimization_level': 0}}  # programs that run once

#: The rows of the page's first table, by their first cell: what is counted, by what is said beside the number.
ROWS: dict[str, dict[str, Method]] = {
    '`linear`': {'': Linear()},
    '`mlp`': {'k = 3': MLPHead(layers=3)},
    '`vpt` shallow': {'': VPT(num_tokens=10)},
    '`vpt` deep': {'': VPT(num_tokens=10, deep=True)},
    '`vpt` deep, projected': {'q = 64': VPT(num_tokens=10, deep=True, project=64)},
    '`vpt_add`': {'deep': VPTAdd(deep=True)},
    '`vpt_pixels`': {'': VPTPixels(num_tokens=10)},
    '`vpt_pad`': {'n = 8': VPTPad(num_pixels=8)},
    '`vpt_below`': {'P = 1': VPTBelow(num_channels=1)},
    '`vapt`': {'': VAPT(num_tokens=10)},
    '`spt`': {'P = 20': SPT(num_tokens=20), 'shallow, P = 100': SPT(num_tokens=100, deep=False)},
    '`cvpt`': {'': CVPT(num_tokens=10), 'trained': CVPT(num_tokens=10, sharing='trained')},
    '`condensed`': {'100 deep prompts at 30 %': Condensed(num_tokens=100, deep=True, kept=(30,) * BLOCKS)},
    '`pgn`': {'P = 16, N = 256': PGN()},
    '`iip`': {'P = 16': IIP()},
    '`vptm`': {'P = 20, V = R = 8192, d = 128': VPTM(num_tokens=20)},
    '`vp`': {'pad, P = 30': VP(), 'patch, P = 30': VP(kind='fixed_patch'), 'whole image': VP(kind='full')},
    '`ap`': {'': AP(), 'channel': AP(shape='channel')},
    '`norm`': {'': NormTune()},
    '`lora`': {'r = 8, query and value': LoRA()},
    '`bias`': {'': Bias()},
    '`cls`': {'': ClsToken()},
    '`partial`': {'k = 1': Partial()},
    '`adapter`': {'r = 8': Adapter(reduction=8)},
    '`full`': {'': Full()},
}


def network_of(method: Method) -> ViT:
    """ViT-B/16, or the BEiT of this size for the method that needs one."""
    if method.name != 'vptm':
        return VIT
    return BEiT(**VARIANTS['B'], patch_size=16, posemb='none', layer_scale=True, mask_token=True, vocab=8192)


def trained(method: Method) -> int:
    """Trained parameters of a method beside those of the linear head, if it has that or one of its own."""
    model, key = network_of(method), jax.random.key(0)
    params = jax.eval_shape(lambda: initial(model))
    shapes = jax.eval_shape(lambda p: with_head(method).init(key, model, p, CLASSES), params)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return count if method.name == 'vptm' else count - (model.width + 1) * CLASSES


def matrix(trains: Callable[[Method, object], bool] | None = None) -> str:
    """The table of methods and families.

    Args:
      trains: whether a method that a network takes lowers the loss; None to take it for granted.
    """
    lines = [f'| method | {" | ".join(NETWORKS)} |', '| --- |' + ' --- |' * len(NETWORKS)]
    with tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            cells = []
            for network in NETWORKS:
                method, model = case(name, network, Path(folder))
                place = missing(method, model)
                cells.append(f'no {place}' if place else 'trains' if not trains or trains(method, model) else 'FAILS')
            lines.append(f'| `{name}` | {" | ".join(cells)} |')
            if trains:
                print(lines[-1], flush=True)
    return '\n'.join(lines)


def _trains(method: Method, model) -> bool:
    images = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)
    params = jax.jit(initial, static_argnums=0, **_QUICK)(model)
    losses, _, _ = descend(method, model, params, images, options=_QUICK)
    return bool(np.isfinite(losses).all() and losses[-1] < losses[0])


def with_costs(table: str) -> str:
    """The page's first table with the numbers of its rows: trained parameters, cost by linear's, cost by full's."""
    known = {name: train_cost(VIT, with_head(m), CLASSES) for name, m in (('linear', Linear()), ('full', Full()))}
    lines = table.strip().split('\n')
    for i, line in enumerate(lines[2:], 2):
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if cells[0] not in ROWS:
            continue
        found: list[list[str]] = []
        for note, method in ROWS[cells[0]].items():
            cost = known.get(method.name) or train_cost(network_of(method), with_head(method), CLASSES)
            ratios = [f'{cost.flops / known[name].flops:.2f}' for name in ('linear', 'full')]
            found.append([f'{trained(method):,}' + (f' ({note})' if note else ''), *ratios])
        cells[4:7] = ('; '.join(column) for column in zip(*found, strict=True))
        lines[i] = f'| {" | ".join(cells)} |'
        print(lines[i], flush=True)
    return '\n'.join(lines)


def ap_places() -> str:
    """The table of activation prompts by their place."""

    def row(name: str, cost: TrainCost) -> str:
        return f'| {name} | {cost.flops / 1e9:.1f} | {cost.memory / 2**20:.0f} |'

    lines = ['| method | GFLOP an image | MiB of temporaries an image |', '| --- | --- | --- |']
    lines += [row(f'`ap` at block {i}', train_cost(VIT, with_head(AP(at=(i,))), CLASSES)) for i in (0, 4, 8, 11)]
    lines += [
        row('`linear`', train_cost(VIT, Linear(), CLASSES)),
        row('`full`', train_cost(VIT, with_head(Full()), CLASSES)),
    ]
    return '\n'.join(lines)


def section(page: str, name: str) -> str:
    """What stands between the comments `<!-- NAME -->` and `<!-- end of NAME -->`."""
    found = re.search(rf'<!-- {name} -->\n(.*)\n<!-- end of {name} -->', page, re.DOTALL)
    if not found:
        raise UsageError(f'{PAGE} has no <!-- {name} --> and <!-- end of {name} -->')
    return found[1]


TABLES: dict[str, Callable[[str], str]] = {
    'matrix': lambda _: matrix(_trains),
    'costs': with_costs,
    'ap': lambda _: ap_places(),
}


def main(tables: list[str]) -> None:
    """Writes the tables, each as soon as it is known."""
    for name in tables:
        if name not in TABLES:
            raise unknown('table', name, TABLES)
    for name in tables:
        new = TABLES[name](section(PAGE.read_text(), name))
        page = PAGE.read_text()  # as it is by now
        page = page.replace(f'-->\n{section(page, name)}\n<!-- end of {name}', f'-->\n{new}\n<!-- end of {name}')
        with atomic.replacing(PAGE) as file:
            file.write(page.encode())


if __name__ == '__main__':
    names = flags.DEFINE_list('tables', list(TABLES), 'which of them')
    cli.run_with_flags(main, __doc__, [names])
