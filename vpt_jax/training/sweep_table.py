"""Tables of a sweep's results, beside published numbers: markdown, csv and json."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Published:
    """Numbers that somebody published.

    Attributes:
      method, backbone: what they are of.
      tasks: accuracy in per cent by dataset name; may be empty.
      groups: means of groups, in per cent; may be empty.
      mean_of_tasks: in per cent, if it is known.
      source: where the numbers are from.
      note: what to keep in mind.
    """

    method: str
    backbone: str
    tasks: Mapping[str, float]
    groups: Mapping[str, float]
    mean_of_tasks: float | None
    source: str
    note: str

    @property
    def title(self) -> str:
        """For a column."""
        return f'{self.method}, {self.backbone} (published)'


def read_published(folder: str | Path, benchmark: str, config: str) -> list[Published]:
    """The published numbers of a method on a benchmark.

    Args:
      folder: of the files, one a benchmark.
      benchmark: its name.
      config: name of the config file that stands for the method.

    Returns:
      Those that there are; none where there is no file.

    Raises:
      UsageError: a file that cannot be read.
    """
    path = Path(folder) / f'{benchmark}.json'
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())['entries']
        return [
            Published(e['method'], e['backbone'], e['tasks'], e['groups'], e.get('mean_of_tasks'), e['source'],
                      e.get('note', ''))
            for e in entries if e['config'] == config
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'cannot read the published numbers in {path} ({error!r})') from error


def means(values: Mapping[str, float], groups: Mapping[str, str]) -> tuple[dict[str, float], float, float]:
    """Means of tasks.

    Args:
      values: by task; not empty.
      groups: the group of each task.

    Returns:
      The mean of each group, the mean of these, and the mean over all tasks.
    """
    by_group: dict[str, list[float]] = {}
    for task, value in values.items():
        by_group.setdefault(groups[task], []).append(value)
    found = {group: float(np.mean(members)) for group, members in by_group.items()}
    return found, float(np.mean(list(found.values()))), float(np.mean(list(values.values())))


def summary(results: Sequence[dict], published: Sequence[Published] = ()) -> dict:
    """Everything that the tables show, as plain data; accuracies in per cent.

    Args:
      results: from `sweep`.
      published: columns to put beside them.

    Returns:
      `tasks`, a list of rows; `means`, with the groups', `of groups` and `of tasks`; `trained_parameters`, the mean
      over tasks; `published`, by column.
    """
    groups = {r['task']: r['group'] for r in results}
    rows = []
    for r in results:
        accuracies = 100 * np.array(r['test_accuracies'])
        rows.append(
            {
                **{
                    k: r[k]
                    for k in ('group', 'classes', 'settings_tried', 'seeds', 'trained_parameters', 'data_source')
                },
                'task': r['task'],
                'test_accuracy': float(accuracies.mean()),
                'test_deviation': float(accuracies.std()),
                'val_accuracy': 100 * r['val_accuracy'],
                'percent_of_backbone': 100 * r['trained_parameters'] / r['backbone_parameters'],
                **{field.rsplit('.', 1)[-1]: value for field, value in r['chosen'].items()},
            }
        )
    ours = {row['task']: row['test_accuracy'] for row in rows}
    columns = {}
    for entry in published:
        known = {task: entry.tasks[task] for task in ours if task in entry.tasks}
        column = {'tasks': known, 'source': entry.source, 'note': entry.note}
        if len(known) == len(ours):
            column['means'] = _means_row(known, groups)
        elif not known:
            mean = {} if entry.mean_of_tasks is None else {'of tasks': entry.mean_of_tasks}
            of_groups = {'of groups': float(np.mean(list(entry.groups.values())))} if entry.groups else {}
            column['means'] = {**entry.groups, **of_groups, **mean}
        columns[entry.title] = column
    return {
        'tasks': rows,
        'means': _means_row(ours, groups),
        'trained_parameters': float(np.mean([row['trained_parameters'] for row in rows])),
        'published': columns,
    }


def _means_row(values: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    by_group, of_groups, of_tasks = means(values, groups)
    several = {**by_group, 'of groups': of_groups} if len(by_group) > 1 else {}
    return {**several, 'of tasks': of_tasks}


def markdown(table: dict, title: str) -> str:
    """A table for people: a line a task, then the means, then where published numbers are from."""
    published = table['published']
    settings = [k for k in table['tasks'][0] if k not in _FIXED]
    head = ['task', 'test', *published, 'val', *(s.replace('_', ' ') for s in settings), 'trained parameters']
    lines = [f'# {title}', '', _line(head), _line(['---'] * len(head))]
    for row in table['tasks']:
        deviation = f' ± {row["test_deviation"]:.2f}' if len(row['seeds']) > 1 else ''
        beside = [_number(column['tasks'].get(row['task'])) for column in published.values()]
        chosen = [f'{row[s]:g}' if isinstance(row[s], float) else str(row[s]) for s in settings]
        trained = f'{row["trained_parameters"]:,} ({row["percent_of_backbone"]:.2f} %)'
        test, val = f'{row["test_accuracy"]:.2f}{deviation}', f'{row["val_accuracy"]:.2f}'
        lines.append(_line([row['task'], test, *beside, val, *chosen, trained]))
    for name, value in table['means'].items():
        beside = [_number(column.get('means', {}).get(name)) for column in published.values()]
        label = f'**mean {name}**' if name.startswith('of ') else f'**{name}**'
        trained = f'{table["trained_parameters"]:,.0f}' if name == 'of tasks' else ''
        lines.append(_line([label, f'{value:.2f}', *beside, '', *([''] * len(settings)), trained]))
    seeds = sorted({seed for row in table['tasks'] for seed in row['seeds']})
    lines += ['', f'Top-1 accuracy in per cent: mean ± deviation over seeds {", ".join(map(str, seeds))}, last epoch.']
    for name, column in published.items():
        note = f' {column["note"]}.' if column['note'] else ''
        lines.append(f'{name}: {column["source"]}.{note}')
    return '\n'.join(lines) + '\n'


_FIXED = ('group', 'classes', 'settings_tried', 'seeds', 'trained_parameters', 'data_source', 'task', 'test_accuracy',
          'test_deviation', 'val_accuracy', 'percent_of_backbone')  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}'


def comma_separated(table: dict) -> str:
    """The rows and means for spreadsheets."""
    published = table['published']
    names = [name for name in table['tasks'][0] if name != 'seeds']
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow([*names, 'seeds', *published])
    for row in table['tasks']:
        beside = [column['tasks'].get(row['task'], '') for column in published.values()]
        writer.writerow([*(row[name] for name in names), ' '.join(map(str, row['seeds'])), *beside])
    for mean, value in table['means'].items():
        cells = {'group': 'mean', 'task': mean, 'test_accuracy': value}
        beside = [column.get('means', {}).get(mean, '') for column in published.values()]
        writer.writerow([*(cells.get(name, '') for name in names), '', *beside])
    return out.getvalue()


def write_tables(folder: str | Path, results: Sequence[dict], title: str, published: Sequence[Published] = ()) -> str:
    """Writes `table.md`, `table.csv` and `table.json`; returns the markdown."""
    table = summary(results, published)
    text = markdown(table, title)
    contents = {
        'md': text,
        'csv': comma_separated(table),
        'json': json.dumps({'title': title, **table}, indent=2) + '\n',
    }
    for suffix, content in contents.items():
        with atomic.replacing(Path(folder) / f'table.{suffix}') as file:
            file.write(content.encode())
    return text
