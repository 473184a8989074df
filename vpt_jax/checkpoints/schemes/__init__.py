"""The schemes, in the order in which a file's names are tried; one module a source family."""

from vpt_jax.checkpoints.schemes import (
    beit,
    big_vision,
    bit,
    canonical,
    clip,
    clip_resnet,
    clip_text,
    convnext,
    hf_dinov2,
    hf_vit,
    siglip,
    swin,
    timm_vit,
    torch_resnet,
    torchvision_vit,
)

SCHEMES = (canonical, big_vision, convnext, swin, beit, torch_resnet, bit, clip_resnet, timm_vit, torchvision_vit,
           hf_vit, hf_dinov2, siglip, clip, clip_text)  # fmt: skip
