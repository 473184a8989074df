"""Times training and evaluation: `python -m vpt_jax.bench --backbone=random:B/16 --methods=vapt,vpt_deep --batch=8,32`.

Figures are medians over `--repeats` steps after a warm-up, on synthetic images that are on the device already. Methods
that leave the first blocks alone train on what these made of the images, computed once (column `cached`). MFU is the
share of this device's own rate for a large matrix product in the same precision, measured in the same run. With
`--against=torch` a plain PyTorch implementation of the same work takes turns with ours in the same process; a ratio
above 1 means that vpt_jax is faster.
"""

import json
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from vpt_jax import cli
from vpt_jax.bench import measure
from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown
from vpt_jax.models import zoo

FLAGS = [
    flags.DEFINE_list('methods', ['vapt', 'vpt_deep'], f'Comma-separated, of {", ".join(measure.METHODS)}.'),
    flags.DEFINE_string('backbone', 'random:B/16', 'As for training; random weights are as fast as trained ones.'),
    flags.DEFINE_list('batch', ['8'], 'Comma-separated batch sizes.'),
    flags.DEFINE_list('precision', [], 'float32, bfloat16 or both; by default what training uses on this device.'),
    flags.DEFINE_string('against', '', "'torch': time a plain PyTorch implementation too (pip install '.[torch]')."),
    flags.DEFINE_bool('torch_compile', False, 'Time it through torch.compile.'),
    flags.DEFINE_integer('repeats', 5, 'Measured steps; after each, the other implementation has its turn.', 1),
    flags.DEFINE_integer('warmup', 2, 'Steps before the first measured one.', 1),
    flags.DEFINE_string('json', '', 'Also write the rows here.'),
]
_COLUMNS = {'method': 'method', 'cached_blocks': 'cached', 'batch': 'batch', 'precision': 'precision',
            'train_images_per_second': 'train img/s', 'train_spread': 'spread',
            'eval_images_per_second': 'eval img/s', 'compile_seconds': 'compile s', 'peak_memory_bytes': 'peak MiB',
            'train_flops_per_second': 'GFLOP/s', 'mfu': 'MFU', 'mfu_xla': 'MFU (XLA)',
            'train_ratio': 'train x torch', 'eval_ratio': 'eval x torch'}  # fmt: skip


def main(methods, backbone, batch, precision, against, torch_compile, repeats, warmup, json) -> None:
    """Measures every combination and prints one table."""
    jax.config.update('jax_enable_compilation_cache', False)  # the time to compile is one of the figures
    for name in methods:
        if name not in measure.METHODS:
            raise unknown('benchmark', name, measure.METHODS)
    for value in precision:
        if value not in ('float32', 'bfloat16'):
            raise unknown('precision', value, ('float32', 'bfloat16'))
    if against not in ('', 'torch'):
        raise unknown('implementation to compare with', against, ('torch',))
    sizes = [_size(text) for text in batch]
    precision = precision or ['float32' if jax.default_backend() == 'cpu' else 'bfloat16']
    frozen = zoo.load_backbone(backbone)
    peaks = {value: measure.matmul_rate(value) for value in precision}
    cases = [(m, b, p) for p in precision for b in sizes for m in methods]
    rows = []
    for case in tqdm(cases, unit='case', disable=len(cases) == 1):
        rows.append(_row(frozen, *case, peaks[case[2]], against, torch_compile, repeats, warmup))
    device = jax.devices()[0]
    rates = ', '.join(f'{value} {rate / 1e9:.0f} GFLOP/s' for value, rate in peaks.items())
    print(f'{backbone} on {jax.device_count()} x {device.device_kind}, jax {jax.__version__}; matrix product {rates}')
    print(_table(rows))
    if json:
        _write(Path(json), rows)


def _size(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise UsageError(f'--batch takes whole numbers >= 1 separated by commas, got {text!r}')
    return int(text)


def _row(backbone, method, batch, precision, peak, against, torch_compile, repeats, warmup) -> dict:
    ours = measure.Measured(backbone, method, batch, precision)
    contenders = {'train': [ours.train], 'eval': [ours.evaluate]}
    if against:
        from vpt_jax.bench import torch_side  # torch is an extra

        theirs = torch_side.Measured(backbone, ours, method, precision, torch_compile)
        contenders['train'].append(theirs.train)
        contenders['eval'].append(theirs.evaluate)
    row = {'method': method, 'cached_blocks': ours.cached_blocks, 'batch': batch, 'precision': precision}
    for kind, calls in contenders.items():
        seconds = [[] for _ in calls]
        for round_ in range(repeats):
            for call, held in zip(calls, seconds, strict=True):
                held += measure.timed(call, batch, warmup if round_ == 0 else 1, 1).seconds
                if against:
                    cli.give_back_freed_memory()  # there may not be enough for the temporaries of both
        timings = [measure.Timing(tuple(held), batch) for held in seconds]
        row[f'{kind}_images_per_second'] = timings[0].images_per_second
        row[f'{kind}_spread'] = timings[0].spread
        if against:
            row[f'torch_{kind}_images_per_second'] = timings[1].images_per_second
            row[f'torch_{kind}_spread'] = timings[1].spread
        row[f'{kind}_ratio'] = timings[0].images_per_second / timings[1].images_per_second if against else None
    per_image = row['train_images_per_second'] / batch
    row |= {
        'compile_seconds': ours.compile_seconds,
        'peak_memory_bytes': ours.peak_memory_bytes,
        'train_flops_per_second': ours.formula_flops * per_image,
        'mfu': ours.formula_flops * per_image / peak,
        'mfu_xla': None if ours.xla_flops is None else ours.xla_flops * per_image / peak,
    }
    return row


def _table(rows: list[dict]) -> str:
    columns = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [[_COLUMNS[name] for name in columns]]
    lines += [[_shown(name, row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return '\n'.join('  '.join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _shown(name: str, value: object) -> str:
    if value is None:
        return '-'
    if not isinstance(value, float) and name != 'peak_memory_bytes':
        return str(value)
    scale = {'peak_memory_bytes': 2**20, 'train_flops_per_second': 1e9}.get(name, 1)
    if name in ('mfu', 'mfu_xla', 'train_spread'):
        return f'{100 * value:.0f}%'
    return f'{value / scale:.0f}' if scale > 1 else f'{value:.2f}'


def _write(path: Path, rows: list[dict]) -> None:
    with atomic.replacing(path) as file:
        file.write(json.dumps(rows, indent=1).encode())


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, FLAGS)
