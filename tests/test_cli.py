"""The command-line programs: train, evaluate, predict, and what they answer to mistakes."""

import json
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.commands import Commands, write_task
from tests.training.conftest import arrays

SMALL = ('--config.method.num_tokens=2', '--config.train.epochs=6', '--config.train.warmup_epochs=1',
         '--config.train.batch_size=8', '--config.optim.lr=4')  # fmt: skip


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('cli')


@pytest.fixture(scope='module')
def command(place):
    with Commands() as commands:
        yield commands


@pytest.fixture(scope='module')
def task(place):
    """The `backbone=...` and `dataset=...` of a config."""
    backbone, dataset = write_task(place)
    return {'backbone': backbone, 'dataset': f'npz:{dataset}'}


@pytest.fixture(scope='module')
def pictures(place):
    """A folder of images in class folders, a.png to d.png the classes of the task, and one that is no image."""
    made = arrays((40, 0, 0))
    for i, (image, label) in enumerate(zip(made['images'], made['labels'], strict=True)):
        folder = place / 'pictures' / f'class_{label}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f'{i:02d}.png')
    return place / 'pictures'


@pytest.fixture
def broken(pictures):
    """The same with one file more, which is not an image."""
    path = pictures / 'class_2' / 'broken.png'
    path.write_bytes(b'not an image')
    yield path
    path.unlink()


def config(task, **other):
    values = {**task, **other}
    return '--config=configs/vapt.py:' + ','.join(f'{k}={v}' for k, v in values.items())


@pytest.fixture(scope='module')
def trained(command, task, place):
    """(the run's folder, what training printed)."""
    done = command('train', config(task), *SMALL, f'--workdir={place / "run"}')
    assert done.returncode == 0, done.stderr
    return place / 'run', done.stdout


def refused(done, *parts):
    """Exit code 2 and one sentence on stderr that has all parts."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith('error: '), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert 'Traceback' not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def test_train_prints_the_accuracy_beside_the_linear_probe(trained):
    folder, printed = trained
    found = re.search(r'\ntest accuracy ([\d.]+)% \(mean per class [\d.]+%\)[,;] linear probe ([\d.]+)%\n', printed)
    assert found, printed
    assert float(found[1]) > 50  # chance is 25 %
    result = json.loads((folder / 'result.json').read_text())
    assert float(found[1]) == pytest.approx(100 * result['test_accuracy'], abs=0.01)
    assert float(found[2]) == pytest.approx(100 * result['linear_probe']['test_accuracy'], abs=0.01)
    assert 'trained parameters' in printed
    assert 'step 18/18' in printed


def test_evaluate_repeats_the_accuracy_of_training(command, trained, task, place):
    folder, _ = trained
    done = command('evaluate', f'--prompt={folder}', f'--dataset={task["dataset"]}', f'--backbone={task["backbone"]}',
                   '--batch_size=8', f'--json={place / "scores.json"}')  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / 'result.json').read_text())
    scores = json.loads((place / 'scores.json').read_text())
    assert scores['accuracy'] == result['test_accuracy']
    assert scores['mean_class_accuracy'] == result['test_mean_class_accuracy']
    first, heads, *rows = done.stdout.splitlines()
    assert re.fullmatch(r'accuracy [\d.]+% \(mean per class [\d.]+%\) on 12 examples, \d+ images/s', first)
    assert heads.split() == ['class', 'accuracy', 'correct', 'examples']
    shares = [float(row.split()[1].rstrip('%')) for row in rows]
    assert len(rows) == 4
    assert shares == sorted(shares)


def test_evaluate_on_a_folder_names_and_leaves_out_what_cannot_be_read(command, trained, task, pictures, broken):
    folder, _ = trained
    flags = [f'--prompt={folder}', f'--dataset=folder:{pictures}', f'--backbone={task["backbone"]}', '--split=all']
    refused(command('evaluate', *flags), 'broken.png', 'on_bad_image')
    done = command('evaluate', *flags, '--on_bad_image=skip', '--batch_size=8')
    assert done.returncode == 0, done.stderr
    assert f'left out, unreadable: {broken}' in done.stdout
    assert 'on 40 examples' in done.stdout


def test_evaluate_refuses_another_backbone_and_other_classes(command, trained, task, place):
    folder, _ = trained
    flags = [f'--prompt={folder}', f'--dataset={task["dataset"]}']
    other = task['backbone'].with_name('other.npz')
    refused(command('evaluate', *flags, f'--backbone={other}'), 'trained on tiny.npz', 'not on other.npz')
    refused(command('evaluate', *flags), 'tiny.npz', '--backbone=PATH')
    flags[1:] = ['--dataset=digits', f'--backbone={task["backbone"]}']
    refused(command('evaluate', *flags), 'the prompt knows 4 classes and digits has 10')
    flags[1] = f'--dataset={task["dataset"]}'
    refused(command('evaluate', *flags, '--split=tset'), "'test'")
    refused(command('evaluate', f'--prompt={place / "nothing"}', '--dataset=digits'), 'there is no prompt')


def test_predict_files_folders_and_stdin(command, trained, task, pictures, place):
    folder, _ = trained
    first, second = sorted(pictures.rglob('*.png'))[:2]
    flags = [f'--prompt={folder}', f'--backbone={task["backbone"]}', '--batch_size=8']
    done = command(
        'predict', *flags, first, pictures, '-', '--top=2', f'--json={place / "named.json"}', stdin=f'{second}\n\n'
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split('\t') for line in done.stdout.splitlines()]
    paths = [str(first), *map(str, sorted(pictures.rglob('*.png'))), str(second)]
    assert [line[0] for line in lines] == paths
    assert all(len(line) == 3 for line in lines)
    for line in lines:
        values = [float(part.split()[1]) for part in line[1:]]
        assert 1 >= values[0] >= values[1] >= 0
    right = np.mean([line[1].split()[0] == line[0].split('class_')[1][0] for line in lines])
    assert right > 0.5  # chance is 0.25
    written = json.loads((place / 'named.json').read_text())
    assert [row['path'] for row in written['images']] == paths
    assert written['images'][0]['top'][0]['class'] == lines[0][1].split()[0]


def test_predict_goes_on_after_unreadable_images(command, trained, task, pictures, broken):
    folder, _ = trained
    flags = [f'--prompt={folder}', f'--backbone={task["backbone"]}', '--batch_size=8']
    done = command('predict', *flags, pictures, 'missing.jpg')
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 40
    assert f'cannot read {broken}: not an image, or damaged' in done.stderr
    assert 'cannot read missing.jpg: no such file' in done.stderr
    assert '2 of 42 images could not be read' in done.stderr
    assert command('predict', *flags, '--strict', broken.parent).returncode == 1
    assert command('predict', *flags, broken).returncode == 2
    refused(command('predict', *flags), 'no image to look at')
    refused(command('predict', *flags, '--top=0', broken), '--top must be >= 1')


def test_train_stops_at_or_skips_an_unreadable_image(command, task, pictures, broken, place):
    arguments = [config(task, dataset=f'folder:{pictures}'), *SMALL, '--config.train.linear_probe=False']
    refused(command('train', *arguments, f'--workdir={place / "stop"}'), str(broken), 'not an image')
    done = command('train', *arguments, '--config.data.on_bad_image=skip', f'--workdir={place / "skip"}')
    assert done.returncode == 0, done.stderr
    assert json.loads((place / 'skip' / 'result.json').read_text())['unreadable_images'] == 1


@pytest.mark.parametrize(
    ('arguments', 'parts'),
    [
        (['--config.optim.lrr=1'], ['unknown field --config.optim.lrr', 'did you mean --config.optim.lr?']),
        (['--config.lr=1'], ['--config.lr', '--config.optim.lr']),
        (['--config.zzzz=1'], ['--config.zzzz', '--config has ', 'checkpoint, data, dataset']),
        (['--config.optim.lr.x=1'], ['--config.optim.lr is a value']),
        (['--config.optim.lr=fast'], ['--config.optim.lr=fast', 'float']),
        (['--wrkdir=x'], ["unknown flag '--wrkdir'", '--workdir']),
        (['stray'], ["unexpected argument 'stray'"]),
        (['--config.method.num_tokens=0'], ['num_tokens', 'got 0']),
        (['--config.method.name=vaqt'], ["unknown method 'vaqt'", "'vapt'"]),
        (['--config.dataset=digit'], ["unknown dataset 'digit'", "'digits'"]),
        (['--config.backbone=vit_b16_in21'], ["unknown backbone 'vit_b16_in21'", "'vit_b16_in21k'"]),
        (['--config.train.epochs=0'], ['--config.train.epochs', 'got 0']),
        (['--config.optim.lr=nan'], ['--config.optim.lr', 'got nan']),
    ],
)
def test_train_answers_a_mistake_with_one_sentence(command, task, tmp_path, arguments, parts):
    refused(command('train', config(task), *arguments, f'--workdir={tmp_path}'), *parts)


@pytest.mark.parametrize(
    ('program', 'arguments', 'parts'),
    [
        ('train', ['--config=configs/vapt.py:datset=digits'], ["unknown config argument 'datset'", "'dataset'"]),
        ('train', ['--config=configs/vapt.py:dataset'], ['name=value', "'dataset'"]),
        ('train', ['--config=configs/vpat.py'], ["unknown config file 'configs/vpat.py'", "'configs/vapt.py'"]),
        ('train', ['--config=nowhere/vapt.py'], ['nowhere/vapt.py']),
        ('train', [], ['--config is missing']),
        ('evaluate', ['--dataset=digits'], ['--prompt is missing']),
        ('evaluate', ['--prompt=x', '--dataset=digits', '--batch_size=many'], ['--batch_size=many']),
        ('evaluate', ['--prompt=x', '--dataset=digits', '--slpit=test'], ["unknown flag '--slpit'", "'--split'"]),
        ('predict', ['x.png'], ['--prompt is missing']),
    ],
)  # fmt: skip
def test_a_bad_or_missing_flag_is_answered_with_one_sentence(command, program, arguments, parts):
    refused(command(program, *arguments), *parts)


KEPT = """
import resource, threading
import numpy as np
from vpt_jax import cli

cli._keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**22)  # 32 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=lambda: print(faults(), faults()))
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='asks glibc')
def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run([sys.executable, '-c', KEPT], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second < 5 <= first
