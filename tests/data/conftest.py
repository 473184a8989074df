"""Small images and files that the data room's tests share."""

import pathlib

import numpy as np
import pytest
from PIL import Image

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
# A folder beside the repository that some machines have: more test data than a repository should carry.
SHARED = pathlib.Path(__file__).parents[2].parent / 'shared' / 'data'


@pytest.fixture
def reference():
    """Reads a file of arrays made by a published implementation."""

    def read(name):
        with np.load(FIXTURES / f'{name}.npz', allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return read


@pytest.fixture
def shared_data():
    if not SHARED.is_dir():
        pytest.skip(f'no folder {SHARED}')
    return SHARED


@pytest.fixture
def picture():
    """A smooth colour image that survives JPEG: uint8 [height, width, 3]."""

    def make(height=20, width=30, seed=0):
        phase = np.random.default_rng(seed).uniform(0, 6, 3)
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(y / 7 + x / 5 + shift) for shift in phase]
        return np.rint(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)

    return make


@pytest.fixture
def folder(tmp_path, picture):
    """Writes an image tree: `folder({'train/cat': 3, 'train/dog': 2})` gives its root."""

    def make(counts, suffix='.png'):
        for number, (place, count) in enumerate(counts.items()):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(picture(seed=100 * number + i)).save(tmp_path / place / f'{i:03d}{suffix}')
        return tmp_path

    return make
