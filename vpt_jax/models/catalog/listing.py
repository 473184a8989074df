"""The table of backbones as text, for a terminal and for the documentation."""

from collections.abc import Mapping

from vpt_jax.models.catalog.row import BY_HAND, CONVERT, DOWNLOAD, PACKAGE, Row
from vpt_jax.models.families import FAMILIES
from vpt_jax.models.pixels import CLIP, HALF, IMAGENET

_PIXELS = {IMAGENET: 'ImageNet', HALF: '[-1, 1]', CLIP: 'CLIP'}
_POOLS = {'tok': 'CLS', 'gap': 'mean of patches', 'map': 'attention pooling'}
#: What a row's `how` means to somebody who wants the weights.
_STATES = {PACKAGE: 'in the package', DOWNLOAD: 'downloads', CONVERT: 'convert', BY_HAND: 'by hand'}


def text(rows: Mapping[str, Row]) -> str:
    """One line a row: name, MiB, licence, whether it is here, what it is."""
    columns = [('name', 'MiB', 'weights', 'licence', 'what')]
    for name, row in rows.items():
        here = row.how == PACKAGE or not row.path.exists()
        columns.append((name, _size(row), _STATES[row.how] if here else 'in the cache', row.license, row.note))
    widths = [max(len(line[i]) for line in columns) for i in range(4)]
    return '\n'.join(
        f'{name:{widths[0]}}  {size:>{widths[1]}}  {state:{widths[2]}}  {license:{widths[3]}}  {note}'
        for name, size, state, license, note in columns
    )


def markdown(rows: Mapping[str, Row]) -> str:
    """The table of docs/backbones.md."""
    lines = [
        '| name | what | images | run with | MiB | licence | weights |',
        '| --- | --- | --- | --- | ---: | --- | --- |',
    ]
    for name, row in rows.items():
        size = FAMILIES[row.family](**row.settings).image_size
        state = _STATES[row.how]
        link = f'[{state}]({row.url})' if row.url else state
        lines.append(f'| `{name}` | {row.note} | {size} | {conventions(row)} | {_size(row)} | {row.license} | {link} |')
    return '\n'.join(lines)


def conventions(row: Row) -> str:
    """How the network is run, in a few words: activation, input, features."""
    settings = row.settings
    words = [f'`{settings["activation"]}`'] if 'activation' in settings else []
    words.append(f'{_PIXELS[row.pixels]} pixels')
    pool = settings.get('pool', 'tok' if row.family in ('vit', 'beit') else None)
    if settings.get('projection'):
        words.append('projected CLS')
    elif pool:
        norm = {'new': ', untrained norm', 'norm': ', its last norm', True: ', norm'}.get(settings.get('fc_norm'), '')
        words.append(_POOLS[pool] + norm)
    if row.family == 'bit':
        words.append(f'max-pooling pads with {"zeros" if settings["pool_padding"] == "zero" else "-inf"}')
    return ', '.join(words)


def _size(row: Row) -> str:
    return '?' if row.mib is None else f'{row.mib:,}'
