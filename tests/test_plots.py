"""Pictures of results: what is in them, and files that are no results."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.plots import comparison, condensation, kind_of, main, tasks
from vpt_jax.errors import UsageError
from vpt_jax.training.sweep_table import Published, write_tables


def rows(*accuracies):
    """What `sweep` returns of two sets."""
    return [
        {'task': f'set{i}', 'group': 'sets', 'classes': 3, 'chosen': {'optim.lr': 0.5}, 'settings_tried': 1,
         'val_accuracy': 0.5, 'seeds': [0, 1], 'test_accuracies': a, 'trained_parameters': 12,
         'backbone_parameters': 99, 'data_source': 'npz'}
        for i, a in enumerate(accuracies)
    ]  # fmt: skip


CONDENSED = {'score': 'taylor_token', 'rows': [
    {'keep': keep, 'accuracy': accuracy, 'accuracy_untuned': untuned, 'gflops': gflops, 'split': 'test'}
    for keep, accuracy, untuned, gflops in ((1.0, 0.9, None, 3.0), (0.5, 0.8, 0.6, 2.0), (0.25, 0.7, 0.4, 1.5))
]}  # fmt: skip


def test_methods_stand_from_the_worst_to_the_best():
    results = {'vapt': rows([0.8, 0.9], [1.0, 1.0]), 'linear': rows([0.5, 0.7], [0.9, 0.9])}
    left, right = comparison(results).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ['linear', 'vapt']
    assert [p.get_title() for p in (left, right)] == ['set0 (3 classes)', 'set1 (3 classes)']
    points, *_ = left.containers[0]
    np.testing.assert_allclose(points.get_xdata(orig=False), [60, 85])
    (whiskers,) = left.containers[0][2]
    np.testing.assert_allclose([segment[:, 0] for segment in whiskers.get_segments()], [[50, 70], [80, 90]])
    np.testing.assert_allclose(left.lines[-1].get_xdata(), 60)  # the yardstick


def test_a_sweep_stands_beside_published_numbers(tmp_path):
    published = Published('VPT', 'ViT-B/16', {'set1': 77.0}, {}, None, 'a paper', '')
    write_tables(tmp_path, rows([0.5, 0.7], [0.9, 0.9]), 'a sweep', [published])
    (panel,) = tasks(json.loads((tmp_path / 'table.json').read_text())).axes
    np.testing.assert_allclose([bar.get_height() for bar in panel.patches], [60, 90])
    (mark,) = (line for line in panel.lines if line.get_label() == 'VPT, ViT-B/16 (published)')
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1], [77.0])
    assert panel.get_title() == 'a sweep'


def test_condensation_has_all_prompts_too():
    accuracy, cost = condensation(CONDENSED).axes
    tuned, untuned, _ = accuracy.lines
    np.testing.assert_allclose(tuned.get_xydata(), [[25, 70], [50, 80], [100, 90]])
    np.testing.assert_allclose(untuned.get_xydata(), [[25, 40], [50, 60]])
    np.testing.assert_allclose(cost.lines[0].get_ydata(), [1.5, 2, 3])


def test_files_become_pictures(tmp_path):
    path = tmp_path / 'table.json'
    path.write_text(json.dumps(CONDENSED))
    main(str(path), None)
    with Image.open(tmp_path / 'table.png') as image:
        assert image.size[0] > image.size[1] > 300
    main(str(path), str(tmp_path / 'sub' / 'table.svg'))
    assert '<svg' in (tmp_path / 'sub' / 'table.svg').read_text()


def test_what_is_no_result_is_refused(tmp_path, monkeypatch):
    path = tmp_path / 'table.json'
    for content, message in (
        ('{', 'cannot be read'),
        ('[1]', 'is no result'),
        ('{"linear": [{"task": 1}]}', 'is no result'),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            main(str(path), None)
    with pytest.raises(UsageError, match='cannot be read'):
        main(str(tmp_path / 'none.json'), None)
    with pytest.raises(UsageError, match="unknown format of a picture 'gif'"):
        main(str(path), 'table.gif')
    assert kind_of({}) is None
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(UsageError, match='pictures need matplotlib: pip install'):
        condensation(CONDENSED)
