"""The comparison on local sets."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.offline import comparison, find_sets, main
from tests.commands import write_task
from tests.training.conftest import arrays
from vpt_jax.errors import UsageError


@pytest.fixture
def sets(tmp_path):
    """A folder of an .npz file, a folder of image folders, and other things."""
    root = tmp_path / 'sets'
    made = arrays((24, 8, 12), classes=2)
    (root / 'notes').mkdir(parents=True)
    (root / 'readme.txt').write_text('')
    np.savez(root / 'patterns.npz', **made)
    for i, (image, label, split) in enumerate(zip(made['images'], made['labels'], made['split'], strict=True)):
        path = root / 'photos' / ('train', 'val', 'test')[split] / str(label) / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def test_sets_are_found(sets):
    found = {'patterns': f'npz:{sets}/patterns.npz', 'photos': f'folder:{sets}/photos'}
    assert find_sets(str(sets), []) == found
    assert list(find_sets(str(sets), ['digits', 'photos'])) == ['digits', 'photos']
    assert find_sets(None, []) == {'digits': 'digits'}
    with pytest.raises(UsageError, match="unknown set 'photo': did you mean 'photos'"):
        find_sets(str(sets), ['photo'])
    with pytest.raises(UsageError, match='is no folder'):
        find_sets(str(sets / 'readme.txt'), [])
    with pytest.raises(UsageError, match=r'neither \.npz files nor image folders'):
        find_sets(str(sets / 'notes'), [])


def test_the_table():
    def rows(*accuracies):
        return [{'task': f'set{i}', 'classes': 3, 'test_accuracies': a} for i, a in enumerate(accuracies)]

    text = comparison({'linear': rows([0.5, 0.7], [0.9]), 'vapt': rows([0.8, 0.8], [1.0])})
    assert '| set0 | 3 | 60.00 ± 10.00 | 80.00 ± 0.00 |' in text and '| **mean** | | 75.00 | 90.00 |' in text


def test_one_call_runs_everything_and_a_second_one_nothing(sets, tmp_path, capsys):
    backbone, _ = write_task(tmp_path)
    arguments = {'data': str(sets), 'sets': [], 'methods': ['linear'], 'seeds': '2', 'backbone': str(backbone),
                 'workdir': str(tmp_path / 'run'), 'epochs': None}  # fmt: skip
    main(**arguments)
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert [row['task'] for row in results['linear']] == ['patterns', 'photos']
    assert [row['settings_tried'] for row in results['linear']] == [40, 40]
    # The same images either way.
    assert results['linear'][0]['test_accuracies'] == results['linear'][1]['test_accuracies']
    assert 'photos final 2/2' in capsys.readouterr().out
    main(**arguments)
    assert 'photos final' not in capsys.readouterr().out
    assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == results
    with pytest.raises(UsageError, match="unknown method 'linaer': did you mean 'linear'"):
        main(**arguments | {'methods': ['linaer']})
