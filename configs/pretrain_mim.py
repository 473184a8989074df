"""Masked pretraining of a small BEiT v2 on Tiny ImageNet (64 x 64), in two stages: tokenizer, then network.

--config=configs/pretrain_mim.py:stage=tokenizer
--config=configs/pretrain_mim.py:stage=beit,tokenizer=runs/tokenizer/tokenizer.npz

`backbone` is the tokenizer's teacher. The recipe is BEiT v2's (arXiv 2208.06366) scaled down; experiments/vptm.md says
what each stage is for, and that it has not been run at full length.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    where = c.parse_arg(arg, dataset='npz:tiny_imagenet_64.npz', backbone='tiny_vit64', stage='tokenizer', tokenizer='')
    first = where['stage'] == 'tokenizer'
    config = c.default(
        f'dataset={where["dataset"]},backbone={where["backbone"]}', epochs=20 if first else 100,
        warmup_epochs=2 if first else 5, batch_size=256, optimizer='adamw', base_lr=1e-4 if first else 1e-3,
        weight_decay=1e-4 if first else 0.05, per_step=True, eval_batch_size=500, log_every_steps=20,
        checkpoint_every_steps=200,
    )  # fmt: skip
    config.stage, config.tokenizer = where['stage'], where['tokenizer']
    config.image_size = 64
    config.network = {'width': 192, 'depth': 6, 'mlp_dim': 768, 'heads': 3, 'patch_size': 8}
    config.codes = {'count': 1024, 'width': 32, 'decoder_depth': 1, 'decay': 0.99}
    config.masking = {'share': 0.4, 'smallest': 4, 'branch_from': 4, 'layer_scale': 0.1}
    config.method = c.method('full', dropout=0.0)
    config.data.augment = 'pretrain'
    config.train.linear_probe = False
    return config
