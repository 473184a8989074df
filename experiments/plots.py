"""Pictures of results: `python -m experiments.plots --result=FILE.json [--out=PICTURE]`.

FILE is `results.json` of `experiments.offline`, or `table.json` of `vpt_jax.sweep` or `vpt_jax.condense`. The ending of
PICTURE (png, svg, pdf) says what is written; by default a png beside FILE.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

if __name__ == '__main__':  # also as `python experiments/plots.py`
    sys.path.insert(0, str(Path(__file__).parents[1]))

from vpt_jax import cli
from vpt_jax.checkpoints import atomic
from vpt_jax.errors import UsageError, unknown

FORMATS = ('png', 'svg', 'pdf')


def comparison(by_method: dict[str, list[dict]]) -> Any:
    """A panel a set, a line a method, from the worst mean over the sets to the best: test accuracy and deviation.

    Args:
      by_method: what `sweep` returned for each method, all for the same sets.

    Returns:
      A matplotlib figure.
    """
    accuracies = {
        method: [100 * np.array(row['test_accuracies']) for row in rows] for method, rows in by_method.items()
    }
    order = sorted(accuracies, key=lambda method: np.mean([a.mean() for a in accuracies[method]]))
    tasks = next(iter(by_method.values()))
    places = range(len(order))
    panels = _panels(len(tasks), height=1.2 + 0.25 * len(order), sharey=True)
    for i, (panel, task) in enumerate(zip(panels, tasks, strict=True)):
        found = [accuracies[method][i] for method in order]
        panel.errorbar([a.mean() for a in found], places, xerr=[a.std() for a in found], fmt='o', capsize=2)
        if 'linear' in order:
            panel.axvline(accuracies['linear'][i].mean(), linestyle=':', color='gray')
        panel.set(title=f'{task["task"]} ({task["classes"]} classes)', xlabel='test accuracy, %')
        panel.grid(axis='y', alpha=0.3)
    panels[0].set_yticks(places, order)
    return panels[0].figure


def tasks(table: dict) -> Any:
    """A bar a task of a sweep, with the deviation over seeds, and a mark for every published number."""
    rows = table['tasks']
    (panel,) = _panels(1, width=2 + 0.45 * len(rows), height=4)
    places = np.arange(len(rows))
    deviations = [row['test_deviation'] for row in rows]
    panel.bar(places, [row['test_accuracy'] for row in rows], yerr=deviations, capsize=2, label='here', alpha=0.6)
    for name, column in table['published'].items():
        known = [(at, column['tasks'][row['task']]) for at, row in zip(places, rows, strict=True)
                 if row['task'] in column['tasks']]  # fmt: skip
        if known:
            panel.plot(*zip(*known, strict=True), '_', markersize=14, label=name)
    panel.set_xticks(places, [row['task'] for row in rows], rotation=90)
    panel.set(title=table['title'], ylabel='test accuracy, %')
    panel.legend(fontsize='small')
    return panel.figure


def condensation(record: dict) -> Any:
    """Accuracy and operations by the share of the prompts that was kept, all of them included."""
    whole, *rest = record['rows']
    rows = sorted([whole, *rest], key=lambda row: row['keep'])
    untuned = [row for row in rows if row['accuracy_untuned'] is not None]
    accuracy, cost = _panels(2, height=3.5)
    share = [100 * row['keep'] for row in rows]
    accuracy.plot(share, [100 * row['accuracy'] for row in rows], 'o-', label='tuned')
    accuracy.plot(
        [100 * row['keep'] for row in untuned],
        [100 * row['accuracy_untuned'] for row in untuned],
        'o:',
        label='untuned',
    )
    accuracy.axhline(100 * whole['accuracy'], linestyle=':', color='gray')
    accuracy.set(xlabel='prompts kept, %', ylabel=f'{whole["split"]} accuracy, %')
    accuracy.legend(fontsize='small')
    cost.plot(share, [row['gflops'] for row in rows], 'o-')
    cost.set(xlabel='prompts kept, %', ylabel='GFLOP an image')
    return cost.figure


def _panels(count: int, *, height: float, width: float = 3.2, sharey: bool = False) -> list:
    """Axes side by side in a new figure, each so many inches wide."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install -e '.[plots]'") from error
    figure = Figure((width * count + 1, height), layout='constrained')
    return list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def kind_of(content: Any) -> Callable[[Any], Any] | None:
    """The function above that draws what was read from a result's file; None if it is no result."""
    if not isinstance(content, dict) or not content:
        return None
    if {'tasks', 'published'} <= content.keys():
        return tasks
    if {'rows', 'score'} <= content.keys():
        return condensation
    rows = list(content.values())
    whole = all(isinstance(r, list) and r and all('test_accuracies' in row for row in r) for r in rows)
    return comparison if whole else None


def main(result: str, out: str | None) -> None:
    """Draws a file of results; the flags' help says what the arguments are."""
    path = Path(result).expanduser()
    target = Path(out).expanduser() if out else path.with_suffix('.png')
    if target.suffix[1:] not in FORMATS:
        raise unknown('format of a picture', target.suffix[1:], FORMATS)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f'--result={result} cannot be read: {error}') from error
    draw = kind_of(content)
    if draw is None:
        raise UsageError(
            f'--result={result} is no result: give results.json of experiments.offline, or table.json of vpt_jax.sweep '
            'or vpt_jax.condense'
        )
    figure = draw(content)
    with atomic.replacing(target) as file:
        figure.savefig(file, format=target.suffix[1:], dpi=110)
    print(f'drawn: {target}')


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, [
        flags.DEFINE_string('result', None, 'a file of results', required=True),
        flags.DEFINE_string('out', None, 'the picture; by default FILE.png'),
    ])  # fmt: skip
