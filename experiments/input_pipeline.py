"""How fast training batches come: decoded once, against decoding every epoch by `tf.data`.

    python -m experiments.input_pipeline [--images=1000] [--size=224] [--epochs=5]

Writes that many JPEG files of 500 x 375 pixels into a temporary folder and prints images per second of

    decoded once    `data.load`, then `data.Batches` through `data.Prefetch`; the decoding itself is reported apart
    tf.data         list of files, map (read, decode, resize as VTAB-1k does), batch, prefetch, all AUTOTUNE

The second needs TensorFlow (extra `prepare`) and is left out without it. No accelerator takes part.
"""

import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from vpt_jax import cli, data

IMAGES = flags.DEFINE_integer('images', 1000, 'how many files', lower_bound=1)
SIZE = flags.DEFINE_integer('size', 224, 'pixels of the network input', lower_bound=1)
EPOCHS = flags.DEFINE_integer('epochs', 5, 'passes that are timed', lower_bound=1)
BATCH = flags.DEFINE_integer('batch_size', 64, 'examples of a batch', lower_bound=1)


def write_images(root: Path, count: int) -> None:
    """Smooth noise in two classes, as large on disk as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        path = root / 'train' / str(i % 2) / f'{i:05d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    (root / 'test').symlink_to(root / 'train')


def decoded_once(root: Path) -> tuple[float, float]:
    """Images per second of the decoding, and of the batches after it."""
    began = time.perf_counter()
    preprocess = data.Preprocess(SIZE.value, 'vtab', 'flip')
    dataset = data.load(f'folder:{root}', preprocess)
    decoding = (len(dataset.train) + len(dataset.test)) / (time.perf_counter() - began)
    batches = data.Batches(dataset.train, preprocess, BATCH.value)
    steps = EPOCHS.value * batches.steps_per_epoch
    began = time.perf_counter()
    with data.Prefetch(batches.batch, range(steps)) as ahead:
        for _ in ahead:
            pass
    return decoding, steps * BATCH.value / (time.perf_counter() - began)


def tf_data(root: Path) -> float:
    """Images per second of a plain tf.data pipeline."""
    import tensorflow as tf

    paths = sorted(map(str, (root / 'train').glob('*/*.jpg')))

    def read(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return tf.compat.v1.image.resize(image, [SIZE.value, SIZE.value]) / 255.0

    def pipeline():
        made = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths))
        made = made.map(read, num_parallel_calls=tf.data.AUTOTUNE).map(tf.image.random_flip_left_right)
        return made.repeat(EPOCHS.value).batch(BATCH.value).prefetch(tf.data.AUTOTUNE)

    for _ in pipeline().take(2):
        pass
    began, count = time.perf_counter(), 0
    for batch in pipeline().as_numpy_iterator():
        count += len(batch)
    return count / (time.perf_counter() - began)


def main() -> None:
    """Prints the figures."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, IMAGES.value)
        decoding, batches = decoded_once(root)
        print(f'decoded once: {batches:.0f} images/s (and {decoding:.0f} images/s while decoding)')
        if importlib.util.find_spec('tensorflow'):
            print(f'tf.data: {tf_data(root):.0f} images/s')
        else:
            print('tf.data: TensorFlow is not installed')


if __name__ == '__main__':
    app.run(lambda argv: cli.guarded(main)())
