"""Supervised pretraining of the embedded backbone on Tiny ImageNet (64 x 64, 200 classes).

AdamW, cosine with warm-up per step, random resized crops, flips, colour jitter, mixup, label smoothing. What it
reached, and how long it took, is in vpt_jax/assets/README.md.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg or 'dataset=npz:tiny_imagenet_64.npz', epochs=100, warmup_epochs=5, batch_size=256, optimizer='adamw',
        base_lr=1e-3, weight_decay=0.05, per_step=True, label_smoothing=0.1, mixup=0.2, eval_batch_size=500,
        log_every_steps=20, checkpoint_every_steps=200,
    )  # fmt: skip
    config.backbone = 'random:Ti/16@64'
    config.model = {'depth': 6, 'activation': 'gelu_tanh'}
    config.method = c.method('full', dropout=0.0)
    config.data.augment = 'pretrain'
    config.train.linear_probe = False
    return config
