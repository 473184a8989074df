"""ILM-VP: a small image in a frame of learned pixels, for a frozen image classifier, no weight of which is trained.

The classes of the task are classes of the classifier, picked anew before every epoch (arXiv 2211.11635; FLM and RLM are
--config.head.mapping=frequency and random). Published: Adam at a rate of 0.01 for batches of 128, divided by ten after
half and 72 % of 200 epochs; images of 128 pixels, or 32 where they are so small (--config.method.inner=32), in a frame
of 224. The backbone must come with its classifier (backbone=resnet18_tv, resnet50_tv2); the embedded one does not.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg, head='label_mapping', optimizer='adamw', epochs=200, warmup_epochs=0, batch_size=128, base_lr=0.02,
        weight_decay=0.0, schedule='multistep', digits={'batch_size': 32, 'base_lr': 0.08},
    )  # fmt: skip
    config.method = c.method('vp', kind='expansive')
    return config
