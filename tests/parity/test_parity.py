"""The cases of the published implementations, and that the runner would notice if they did not agree."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.parity.__main__ import main
from tests.parity.case import Report
from tests.parity.runner import pairs, run_case, run_folder

CASES = Path(__file__).parent / 'cases'
# Compiling a case is what takes the time. Of these another one stays that runs the same code with other settings.
SLOW = re.compile(r'vptabl_(?!pad|reverse).*|vapt_[ceg]|vpt_(deep|shallow)_c|.*_lneps_a|cvpt_[de]|vptm_[eg]'
                  r'|pc_a|made_.*|mlp3_a|train_(adamwzero|sgdbias)_a|beit2_(mimcls|relpos)_a|pgn_(vit|dino)_a|pgn_inversion_d'
                  r'|timm_(resnext_b|swin_a)|vp_random_patch_a|ap_vit_c|torchvision_vit_a|spt_shallow_c')  # fmt: skip


@pytest.fixture(scope='module')
def outcomes():
    names = [path.stem for path in pairs(CASES) if not SLOW.fullmatch(path.stem)]
    return {outcome.name: outcome for outcome in run_folder(CASES, names)}


@pytest.mark.parametrize('name', [path.stem for path in pairs(CASES) if not SLOW.fullmatch(path.stem)])
def test_agrees_with_the_published_implementation(outcomes, name):
    assert outcomes[name].status == 'ok', outcomes[name].text


@pytest.mark.slow
@pytest.mark.parametrize('name', [path.stem for path in pairs(CASES) if SLOW.fullmatch(path.stem)])
def test_agrees_too(name):
    outcome = run_case(CASES / f'{name}.npz')
    assert outcome.status == 'ok', outcome.text


@pytest.fixture
def changed(tmp_path):
    """Writes a changed copy of a case: arrays by name (None removes one), and parts of the json."""

    def write(name, source='linear_a', arrays=None, meta=None, config=None):
        with np.load(CASES / f'{source}.npz') as file:
            held = {key: file[key] for key in file.files} | (arrays or {})
        described = json.loads((CASES / f'{source}.json').read_text()) | (meta or {})
        described['config'] = described.get('config', {}) | (config or {})
        np.savez(tmp_path / f'{name}.npz', **{key: a for key, a in held.items() if a is not None})
        (tmp_path / f'{name}.json').write_text(json.dumps(described))
        return tmp_path / f'{name}.npz'

    return write


def _stored(key, source='linear_a'):
    with np.load(CASES / f'{source}.npz') as file:
        return file[key]


def test_perturbed_numbers_fail_and_exit_1(changed, capsys):
    gradient = _stored('grad/head.last_layer.weight').copy()
    gradient[0, 0] += 1e-3
    path = changed('gradient', arrays={'grad/head.last_layer.weight': gradient})
    changed('logits', arrays={'out/logits': _stored('out/logits') + 1e-3})
    changed('schedule', 'sched_a')
    assert main([str(path.parent)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('gradient  FAIL  grad/head.last_layer.weight error 1.0e-03 tolerance atol 2e-05')
    assert lines[1].startswith('logits  FAIL  out/logits error 1.0e-03')
    assert lines[2].startswith('schedule  ok  lr_factor')
    assert lines[3] == '1 ok, 2 FAIL, 0 unsupported'


def test_perturbed_training_fails(changed):
    name = 'out/final/head.last_layer.bias'
    outcome = run_case(changed('x', 'train_sgd_a', arrays={name: _stored(name, 'train_sgd_a') + 1e-3}))
    assert outcome.status == 'FAIL' and outcome.text.startswith(f'FAIL  {name} error 1.0e-03')


def test_every_gradient_is_looked_at(changed):
    extra = changed('extra', arrays={'grad/enc.transformer.surprise': np.zeros(3), 'grad/head.last_layer.bias': None})
    outcome = run_case(extra)
    assert outcome.status == 'FAIL'
    assert 'grad/enc.transformer.surprise has no counterpart' in outcome.text
    assert 'our linear/last_layer/bias is trained, but the case has no gradient of head.last_layer.bias' in outcome.text


def test_a_weight_without_a_place_fails(changed):
    outcome = run_case(changed('x', arrays={'method/enc.transformer.surprise': np.zeros(3)}))
    assert outcome.status == 'FAIL' and 'enc.transformer.surprise is a weight of the case' in outcome.text


@pytest.mark.parametrize(
    ('reason', 'change'),
    [
        ("method 'hypothetical'", {'meta': {'method': 'hypothetical'}, 'config': {'transfer_type': 'hypothetical'}}),
        ("method 'side'", {'meta': {'method': 'side'}, 'config': {'transfer_type': 'side'}}),
        ("backbone 'resnet'", {'config': {'backbone': 'resnet'}}),
        ('option PROMPT.NOVEL', {'source': 'vpt_deep_a', 'config': {'options': {'MODEL.PROMPT.NOVEL': 1}}}),
        ('option ADAPTER.STYLE=Oth', {'source': 'adapter_a', 'config': {'options': {'MODEL.ADAPTER.STYLE': 'Oth'}}}),
        ('option PROMPT.DEEP=True with LOCATION pad',
         {'source': 'vpt_deep_a', 'config': {'options': {'MODEL.PROMPT.LOCATION': 'pad', 'MODEL.PROMPT.DEEP': True}}}),
        ("optimizer 'lion'", {'source': 'train_sgd_a', 'config': {'optimizer': 'lion'}}),
    ],
)  # fmt: skip
def test_unknown_things_are_unsupported(changed, capsys, reason, change):
    path = changed('x', **change)
    assert main([str(path.parent)]) == 0
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith('x  unsupported: ') and reason in line
    assert summary == '0 ok, 0 FAIL, 1 unsupported'


def test_a_case_that_breaks_does_not_take_the_others_down(changed, tmp_path, capsys):
    changed('missing', arrays={'in/images': None})
    changed('schedule', 'sched_a')
    (tmp_path / 'damaged.npz').write_bytes(b'PK nonsense')
    (tmp_path / 'damaged.json').write_text('{}')
    (tmp_path / 'alone.npz').write_bytes(b'')
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert 'missing  FAIL  KeyError' in out and 'damaged  FAIL' in out and 'schedule  ok' in out and 'alone' not in out


def test_nothing_to_run_is_an_error(tmp_path, capsys):
    (tmp_path / 'note.txt').write_text('')
    assert main([str(tmp_path)]) == 2
    assert 'holds no cases' in capsys.readouterr().err
    assert main([str(tmp_path / 'absent')]) == 2
    assert 'there is no folder' in capsys.readouterr().err


def test_nan_is_out_of_tolerance():
    report = Report()
    report.compare('x', 'x', np.array([np.nan]), np.array([0.0]), atol=1.0)
    assert report.failures
    report = Report()
    report.compare('x', 'x', np.array([0.0]), np.array([[0.0]]), atol=1.0)
    assert report.failures == ['x has shape [1], expected [1, 1]']
