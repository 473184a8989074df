"""Every bias of the backbone (BitFit, VPT's tinytl-bias; arXiv 2106.10199); base-finetune protocol of VPT."""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg, optimizer='adamw_vpt', base_lr=0.005, weight_decay=0.01, warmup_epochs=5, batch_size=384,
        digits={'batch_size': 16},
    )  # fmt: skip
    config.method = c.method('bias')
    return config
