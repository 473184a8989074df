"""Adapts a frozen backbone to a dataset: `python -m vpt_jax.train --config=configs/vapt.py [--workdir DIR]`."""

from vpt_jax import cli
from vpt_jax.training import config as configs
from vpt_jax.training.probe import linear_probe


def main(config, workdir: str) -> None:
    """Trains, evaluates, and prints the accuracy beside a linear probe's on the same split."""
    result, dataset, preprocess = configs.run(config, workdir)
    metrics = result.metrics
    probe, whole = None, preprocess.size == result.backbone.model.image_size
    if config.train.linear_probe and config.method.name != 'linear' and whole:
        probe = linear_probe(
            result.backbone, dataset, preprocess, seed=config.seed, precision=metrics['precision'],
            shard_backbone=config.train.shard_backbone,
        )  # fmt: skip
        result.add('linear_probe', probe)
    print(f'\n{config.method.name} on {dataset.name}, {result.backbone.name}; everything is in {result.folder}')
    share = f'{metrics["percent_of_backbone"]:.2f}% of the backbone'
    print(f'trained parameters {metrics["trained_parameters"]:,} ({share})')
    if metrics['train_images_per_second']:
        rate, compiled = metrics['train_images_per_second'], metrics['compile_seconds']
        print(f'trained at {rate:.0f} images/s after {compiled:.1f} s of compilation')
    if metrics['test_accuracy'] is None:
        print('no test split: nothing to report an accuracy on')
        return
    top1, per_class = 100 * metrics['test_accuracy'], 100 * metrics['test_mean_class_accuracy']
    beside = f'; linear probe {100 * probe["test_accuracy"]:.2f}%' if probe else ''
    print(f'test accuracy {top1:.2f}% (mean per class {per_class:.2f}%){beside}')


if __name__ == '__main__':
    cli.run_with_config(main, __doc__, processes=True)
