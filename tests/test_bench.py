import importlib.util
import json

import pytest

from vpt_jax.bench import __main__ as bench
from vpt_jax.bench import flops, measure
from vpt_jax.errors import UsageError
from vpt_jax.methods import AP, VPT, Full, Linear, Stack
from vpt_jax.models.vit import VARIANTS, ViT
from vpt_jax.models.zoo import load_backbone

FLAGS = {'methods': ['vpt_deep'], 'backbone': 'random:Ti/16@32', 'batch': ['2'], 'precision': ['float32'],
         'against': '', 'torch_compile': False, 'repeats': 1, 'warmup': 1, 'json': ''}  # fmt: skip


def test_formula_of_vit_b16():
    model = ViT(**VARIANTS['B'], patch_size=16)
    deep = Stack(VPT(num_tokens=10, deep=True), Linear())
    assert 2 * flops.forward_flops(model, 10) == pytest.approx(74e9, rel=0.01)  # 207 tokens, twice the forward pass
    # Of the last block only queries, output and MLP of CLS, a token of 207, are needed.
    assert flops.train_flops(model, deep, 10) == pytest.approx(74e9 * (1 - 10 / 12 / 12), rel=0.01)
    assert flops.train_flops(model, Linear()) == 0
    late = Stack(AP(at=(8,)), Linear())
    assert flops.train_flops(model, late) == pytest.approx(2 / 12 * (3 + 2 / 12) * flops.forward_flops(model), rel=0.03)
    assert flops.train_flops(model, Full()) == pytest.approx(3 * flops.forward_flops(model, read=1))


def test_rows_and_table(tmp_path, capsys, monkeypatch):
    tiny = load_backbone('random:Ti/16@32', depth=2, width=32, heads=2, mlp_dim=64)
    monkeypatch.setattr(bench.zoo, 'load_backbone', lambda name: tiny)
    monkeypatch.setattr(measure, 'matmul_rate', lambda precision: 1e11)
    bench.main(**{**FLAGS, 'json': str(tmp_path / 'rows.json')})
    (row,) = json.loads((tmp_path / 'rows.json').read_text())
    assert row['method'] == 'vpt_deep' and row['batch'] == 2 and row['train_ratio'] is None
    for name in ('train_images_per_second', 'eval_images_per_second', 'peak_memory_bytes', 'compile_seconds', 'mfu'):
        assert row[name] > 0
    # XLA counts elementwise work too; products dominate even here.
    assert 0.8 < row['mfu_xla'] / row['mfu'] < 1.6
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:4] == ['method', 'cached', 'batch', 'precision'] and shown[2].split()[0] == 'vpt_deep'


@pytest.mark.skipif(importlib.util.find_spec('torch') is None, reason='needs PyTorch, an extra')
def test_torch_side_computes_the_same():
    from vpt_jax.bench import torch_side

    tiny = load_backbone('random:Ti/16@32', depth=2, width=32, heads=2, mlp_dim=64)
    for method in torch_side.Measured.METHODS:
        ours = measure.Measured(tiny, method, 2, 'float32')
        torch_side.Measured(tiny, ours, method, 'float32', False).train()  # refuses other logits than ours


@pytest.mark.parametrize(('flag', 'value', 'message'), [
    ('methods', ['vapd'], "unknown benchmark 'vapd': did you mean 'vapt'"),
    ('batch', ['0'], '--batch takes whole numbers >= 1'),
    ('precision', ['float8'], "unknown precision 'float8'"),
    ('against', 'tensorflow', 'unknown implementation'),
])  # fmt: skip
def test_mistakes(flag, value, message):
    with pytest.raises(UsageError, match=message):
        bench.main(**{**FLAGS, flag: value})
