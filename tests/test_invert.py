"""`python -m vpt_jax.invert`: what it writes is enough to get the prompted network's scores from a plain one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vpt_jax as vj
from tests.commands import Commands
from tests.methods.conftest import OPTIONS, Tiny
from vpt_jax import invert, methods
from vpt_jax.checkpoints import prompt_file
from vpt_jax.errors import UsageError
from vpt_jax.methods import IIP, PGN, VPT, Linear, Stack, forward
from vpt_jax.models import canvas
from vpt_jax.training.inference import predict
from vpt_jax.training.loop import default_preprocess

SMALL = {'depth': 1, 'width': 32, 'mlp_dim': 32, 'heads': 2}
CLASSES = ['ant', 'bee', 'cat']
#: What the flags are by default.
DEFAULTS = {'backbone': None, 'positions': 'none', 'rounds': 0, 'least_squares': False, 'batch_size': 2}


def save(folder, member, patch=8, size=1.0):
    """A prompt file of prompts that are not special."""
    backbone = vj.load_backbone(f'random:Ti/{patch}@16', **SMALL)
    method = Stack(member, Linear())
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), backbone.model, backbone.params, len(CLASSES)))
    meta = {'method': methods.describe(method), 'backbone': backbone.describe(), 'class_names': CLASSES,
            'preprocess': default_preprocess(backbone).to_dict()}  # fmt: skip
    prompts = Tiny.drawn(shapes, 0.3)
    prompts[member.name] = jax.tree.map(lambda a: size * a, prompts[member.name])
    return prompt_file.save(folder, prompts, method.init_state(backbone.model), meta)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp('run'), PGN(num_tokens=2, library=3, channels=4, groups=2))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Two folders with an image `a.png` in each, another image, and a file that is none."""
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for name, size in (('one/a.png', (16, 16)), ('two/a.png', (20, 30)), ('two/b.png', (16, 16))):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(root / name)
    (root / 'two/broken.png').write_bytes(b'not an image')
    return root


def inverted(prompt, pictures, out, **changes):
    code = invert.main(str(pictures), prompt=str(prompt), out=str(out), **{**DEFAULTS, **changes})
    return code, json.loads((out / 'inversion.json').read_text())


def test_the_files_alone_give_the_scores_of_the_prompted_network(run, pictures, tmp_path, capsys):
    code, record = inverted(run, pictures, tmp_path, positions='index')
    assert code == 0
    printed = capsys.readouterr()
    assert 'broken.png: not an image' in printed.err
    assert printed.out.startswith(
        'patches of 8 x 8 x 3 = 192 numbers, tokens of width 32, rank 32: every prompt can be'
    )
    assert 'same class for 3 of 3 images' in printed.out
    assert [row['name'] for row in record['images']] == ['a', 'a-2', 'b']
    assert record['exact'] and record['positions'] == [3, 4]
    trained = vj.load_trained(run)
    model = trained.backbone.model
    grown, params = canvas.deployed(
        model, trained.backbone.params, canvas.table(model, trained.backbone.params)[[3, 4]]
    )
    assert (grown.window_rows, grown.window_columns) == (record['window_rows'], record['window_columns']) == (3, 2)
    canvases = np.stack([np.load(tmp_path / f'{row["name"]}.npz')['canvas'] for row in record['images']])
    assert canvases.dtype == np.float32 and canvases.shape == (3, 24, 16, 3)
    normalised = (canvases - np.asarray(record['mean'], np.float32)) / np.asarray(record['std'], np.float32)
    head = jax.tree.map(jnp.asarray, trained.file.prompts['linear'])
    with jax.default_matmul_precision('highest'):
        logits = jax.jit(lambda x: forward(grown, Linear(), params, head, x)[0], **OPTIONS)(normalised)
    expected = predict(trained, [Image.open(row['path']) for row in record['images']], batch_size=3)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-5)
    # The prompts are the images' own, and all of it is in the preview.
    patches = np.load(tmp_path / 'a.npz')['patches']
    assert np.abs(patches - np.load(tmp_path / 'b.npz')['patches']).max() > 1e-3
    preview = np.asarray(Image.open(tmp_path / 'a.png'))
    np.testing.assert_array_equal(preview[:16], np.asarray(Image.open(pictures / 'one/a.png')))
    np.testing.assert_array_equal(preview[16:, 8:], np.rint(np.clip(patches[1], 0, 1) * 255))


def test_what_pixels_lose_is_told(pictures, tmp_path):
    run = save(tmp_path / 'run', IIP(num_tokens=2), size=15.0)
    _, plain = inverted(run, pictures, tmp_path / 'plain')
    _, moved = inverted(run, pictures, tmp_path / 'moved', rounds=300)
    assert plain['positions'] == 'zeros'
    for before, after in zip(plain['images'], moved['images'], strict=True):
        for row in (before, after):
            assert row['residual'] < 1e-9 and row['difference_exact'] < 1e-5 < row['difference_rounded']
        assert before['outside'] > 0.01 and after['difference_clipped'] < before['difference_clipped'] / 2


def test_a_network_with_too_few_pixels_is_refused_unless_asked(pictures, tmp_path):
    prompt = save(tmp_path / 'run', IIP(num_tokens=3), patch=2)
    with pytest.raises(
        UsageError, match=r'a patch of 2 x 2 x 3 = 12 numbers cannot make every token of width 32.*--least'
    ):
        inverted(prompt, pictures, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    code, record = inverted(prompt, pictures, tmp_path / 'out', least_squares=True)
    assert code == 0 and not record['exact'] and record['rank'] == 12
    assert all(row['residual'] > 0.1 and row['difference_exact'] > 1e-3 for row in record['images'])
    # 3 patches beside a grid of 8 x 8: one long row, and for the eye a last row that is filled up.
    assert (record['window_rows'], record['window_columns']) == (1, 67)
    assert Image.open(tmp_path / 'out' / 'b.png').size == (16, 18)


def test_mistakes_are_answered_with_a_sentence(run, pictures, tmp_path):
    for changes, message in (
        ({'positions': 'some'}, "unknown positions of inverted prompts 'some'"),
        ({'rounds': -1}, '--rounds must be >= 0, got -1'),
        ({'batch_size': 0}, '--batch_size must be >= 1, got 0'),
    ):
        with pytest.raises(UsageError, match=message):
            inverted(run, pictures, tmp_path, **changes)
    deep = save(tmp_path / 'deep', VPT(num_tokens=2, deep=True))
    with pytest.raises(UsageError, match="'vpt' does something else"):
        inverted(deep, pictures, tmp_path)
    (tmp_path / 'only').mkdir()
    (tmp_path / 'only/broken.jpg').write_bytes(b'no')
    code = invert.main(str(tmp_path / 'only'), prompt=str(run), out=str(tmp_path / 'none'), **DEFAULTS)
    assert code == 2


def test_it_is_a_program(run, pictures, tmp_path):
    with Commands() as command:
        done = command('invert', f'--prompt={run}', f'--out={tmp_path / "out"}', pictures / 'one', '--batch_size=1')
        assert done.returncode == 0, done.stderr
        assert f'everything is in {tmp_path / "out"}' in done.stdout
        assert (tmp_path / 'out' / 'a.npz').exists()
        done = command('invert', f'--prompt={run}', pictures / 'one')
        assert done.returncode == 2 and '--out' in done.stderr and 'Traceback' not in done.stderr
