"""Tables: the numbers in them, and the published ones beside."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from vpt_jax.data.benchmarks import BENCHMARKS
from vpt_jax.errors import UsageError
from vpt_jax.models.zoo import backbones
from vpt_jax.training.sweep_table import means, read_published, summary, write_tables

PUBLISHED = Path(__file__).parents[2] / 'experiments' / 'published'


def result(task, group, accuracies, chosen=None):
    return {
        'task': task, 'group': group, 'classes': 10, 'chosen': chosen or {'optim.lr': 2.5, 'optim.weight_decay': 0.001},
        'settings_tried': 40, 'val_accuracy': 0.9, 'seeds': [42, 44][: len(accuracies)], 'test_accuracies': accuracies,
        'trained_parameters': 1000, 'backbone_parameters': 50000, 'examples': {}, 'data_source': 'TFDS',
        'preprocess': {},
    }  # fmt: skip


VTAB = BENCHMARKS['vtab'].tasks


def test_the_published_rows_have_the_published_means():
    """Means as printed in the papers, recomputed from the rows: tasks and groups are in the right order."""
    printed = {'vpt_deep': (78.48, 82.43, 54.98, 69.43), 'full': (75.88, 83.36, 47.64, 65.57),
               'linear': (68.93, 77.16, 26.84, None), 'vpt_shallow': (76.81, 79.66, 46.98, None),
               'bias': (73.30, 78.25, 44.09, None)}  # fmt: skip
    for config, (natural, specialized, structured, over_tasks) in printed.items():
        entry = next(e for e in read_published(PUBLISHED, 'vtab', config) if e.tasks)
        assert list(entry.tasks) == list(VTAB)
        by_group, of_groups, of_tasks = means(entry.tasks, VTAB)
        assert [by_group[g] for g in ('Natural', 'Specialized', 'Structured')] == pytest.approx(
            [natural, specialized, structured], abs=0.025
        )
        assert of_groups == pytest.approx(np.mean([natural, specialized, structured]), abs=0.02)
        assert over_tasks is None or of_tasks == pytest.approx(over_tasks, abs=0.01)
    deep = next(e for e in read_published(PUBLISHED, 'fgvc', 'vpt_deep') if e.backbone == 'vit_b16_in21k')
    assert np.mean(list(deep.tasks.values())) == pytest.approx(deep.mean_of_tasks, abs=0.02)


def test_every_published_number_has_a_source_and_a_known_task():
    for path in sorted(PUBLISHED.glob('*.json')):
        content = json.loads(path.read_text())
        for entry in content['entries']:
            assert entry['source'] and entry['method'] and entry['backbone'] in backbones()
            assert set(entry['tasks']) <= set(BENCHMARKS[content['benchmark']].tasks)
            assert set(entry['groups']) <= set(VTAB.values())


def test_both_means():
    results = [result('vtab:cifar100', 'Natural', [0.8]), result('vtab:dtd', 'Natural', [0.6]),
               result('vtab:eurosat', 'Specialized', [0.9])]  # fmt: skip
    table = summary(results)
    assert table['means'] == pytest.approx({'Natural': 70, 'Specialized': 90, 'of groups': 80, 'of tasks': 230 / 3})
    assert summary(results[:2])['means'] == pytest.approx({'of tasks': 70})


def test_markdown_csv_and_json_agree(tmp_path):
    results = [result(task, group, [0.5, 0.6]) for task, group in VTAB.items()]
    beside = read_published(PUBLISHED, 'vtab', 'vapt')
    text = write_tables(tmp_path, results, 'VAPT on VTAB-1k', beside)
    assert text == (tmp_path / 'table.md').read_text()
    lines = text.splitlines()
    assert lines[0] == '# VAPT on VTAB-1k'
    assert lines[4].startswith('| vtab:cifar100 | 55.00 ± 5.00 |  |')
    assert lines[4].endswith('| 90.00 | 2.5 | 0.001 | 1,000 (2.00 %) |')
    structured = next(line for line in lines if line.startswith('| **Structured** |'))
    assert '| 55.00 | 59.34 |' in structured  # ours, and VAPT's own
    assert any('poster of VAPT' in line for line in lines)
    rows = list(csv.DictReader(io.StringIO((tmp_path / 'table.csv').read_text())))
    assert len(rows) == 19 + 5 and rows[0]['task'] == 'vtab:cifar100' and float(rows[0]['test_accuracy']) == 55
    table = json.loads((tmp_path / 'table.json').read_text())
    assert table['tasks'][0]['test_deviation'] == pytest.approx(5) and table['tasks'][0]['seeds'] == [42, 44]
    assert table['published']['VAPT, vit_b16_in21k (published)']['means']['of tasks'] == 72.91


def test_published_tasks_are_compared_on_the_tasks_that_were_run(tmp_path):
    results = [result('vtab:cifar100', 'Natural', [0.8]), result('vtab:caltech101', 'Natural', [0.9])]
    table = summary(results, read_published(PUBLISHED, 'vtab', 'vpt_deep'))
    column = table['published']['VPT-deep, vit_b16_in21k (published)']
    assert column['tasks'] == {'vtab:cifar100': 78.8, 'vtab:caltech101': 90.8}
    assert column['means'] == pytest.approx({'of tasks': 84.8})


def test_no_published_numbers(tmp_path):
    assert read_published(tmp_path, 'vtab', 'vapt') == [] == read_published(PUBLISHED, 'vtab', 'nothing')
    (tmp_path / 'vtab.json').write_text('{"entries": [{"method": 1}]}')
    with pytest.raises(UsageError, match='cannot read the published numbers'):
        read_published(tmp_path, 'vtab', 'vapt')
