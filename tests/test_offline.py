"""The comparison on local sets."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.offline import CONDENSED, METHODS, PUBLISHED_LINEAR, comparison, config_of, find_sets, main
from tests.commands import write_task
from tests.training.conftest import arrays
from vpt_jax.errors import UsageError
from vpt_jax.models.zoo import load_backbone
from vpt_jax.training import config as configs
from vpt_jax.training.sweep import search_space


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
        return [{'task': f'set{i}', 'classes': 3, 'test_accuracies': a, 'trained_parameters': 1234,
                 'chosen': {'optim.lr': 2.0**-i}}
                for i, a in enumerate(accuracies)]  # fmt: skip

    text = comparison({'linear': rows([0.5, 0.7], [0.9]), 'vapt': rows([0.8, 0.8], [1.0])})
    assert '| method | trained | set0 (3) | set1 (3) | mean | rates |' in text
    assert '| linear | 1,234 | 60.00 ± 10.00 | 90.00 ± 0.00 | 75.00 | 1, 0.5 |' in text
    assert '| vapt | 1,234 | 80.00 ± 0.00 | 100.00 ± 0.00 | 90.00 | 1, 0.5 |' in text


@pytest.mark.parametrize('method', METHODS)
def test_every_method_has_a_config_of_the_protocol(method):
    config = config_of(method, 'tiny_vit64', 4)
    configs.whole_method(config).check(load_backbone('tiny_vit64').model)
    assert method == PUBLISHED_LINEAR or (config.train.epochs, config.optim.name) == (4, 'adamw')
    assert len(search_space(config)) == (40 if method == PUBLISHED_LINEAR else 4)


def test_one_call_runs_everything_and_a_second_one_nothing(sets, tmp_path, capsys):
    backbone, _ = write_task(tmp_path)
    arguments = {'data': str(sets), 'sets': [], 'methods': [PUBLISHED_LINEAR], 'seeds': '2', 'backbone': str(backbone),
                 'workdir': str(tmp_path / 'run'), 'epochs': None}  # fmt: skip
    main(**arguments)
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert [row['task'] for row in results[PUBLISHED_LINEAR]] == ['patterns', 'photos']
    assert [row['settings_tried'] for row in results[PUBLISHED_LINEAR]] == [40, 40]
    # The same images either way.
    assert results[PUBLISHED_LINEAR][0]['test_accuracies'] == results[PUBLISHED_LINEAR][1]['test_accuracies']
    assert 'photos final 2/2' in capsys.readouterr().out
    main(**arguments)
    assert 'photos final' not in capsys.readouterr().out
    assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == results
    with pytest.raises(UsageError, match="unknown method 'linaer': did you mean 'linear'"):
        main(**arguments | {'methods': ['linaer']})


def test_condensed_prompts_are_those_of_vpt_and_fewer(sets, tmp_path, capsys):
    backbone, _ = write_task(tmp_path)
    (method, share), *_ = CONDENSED.items()
    main(str(sets), ['patterns'], ['vpt_deep', method], '1', str(backbone), str(tmp_path / 'run'), 2)
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    (whole,), (fewer,) = results['vpt_deep'], results[method]
    model = load_backbone(str(backbone)).model
    prompts = 5 * model.depth
    assert whole['trained_parameters'] - fewer['trained_parameters'] == (prompts - round(share * prompts)) * model.width
    assert len(fewer['test_accuracies']) == 1
    assert f'| {method} |' in capsys.readouterr().out
    # The search is scored on val: 8 images there, 12 in test.
    trials = (tmp_path / 'run' / method / 'patterns' / 'trials' / 'search').glob('*.json')
    assert all(float(8 * json.loads(path.read_text())['accuracy']).is_integer() for path in trials)
