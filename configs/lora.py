"""LoRA: low-rank updates of the queries and values of every block (arXiv 2106.09685); base-finetune protocol of VPT.

ConvNets have neither: --config.method.targets=all updates every kernel behind the first layer.
"""

from vpt_jax.training import config as c


def get_config(arg=None):
    config = c.default(
        arg, optimizer='adamw', base_lr=0.005, weight_decay=0.01, warmup_epochs=5, batch_size=384,
        digits={'batch_size': 16, 'base_lr': 0.05},
    )  # fmt: skip
    config.method = c.method('lora')
    return config
