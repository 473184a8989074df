"""Pretrains a small ViT from scratch: `python -m vpt_jax.pretrain --config=configs/pretrain.py:dataset=npz:FILE`.

This is how the embedded backbone was made. It is full fine-tuning of a randomly initialised network by the same loop
as every other run, resumable like every other run; the result is written as a Google-format `.npz`.
"""

from pathlib import Path

import jax

from vpt_jax import cli
from vpt_jax.checkpoints import google_npz
from vpt_jax.models import zoo
from vpt_jax.training import config as configs


def main(config, workdir: str) -> None:
    """Trains, and writes `backbone.npz` (bfloat16) into the run's folder."""
    backbone = zoo.load_backbone(config.backbone, pixels=zoo.HALF, **config.model)
    result, _, _ = configs.run(config, workdir, backbone)
    path = Path(result.folder) / 'backbone.npz'
    google_npz.write(path, jax.device_get(result.prompts['full']), dtype='bfloat16')
    print(f'\ntop-1 on the test split {100 * result.metrics["test_accuracy"]:.2f}%')
    print(f'backbone written to {path} ({path.stat().st_size / 1e6:.1f} MB)')


if __name__ == '__main__':
    cli.run_with_config(main, __doc__)
