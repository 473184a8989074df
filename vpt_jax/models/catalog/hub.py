"""Weights that come from PyTorch: timm's and Google's on the Hugging Face hub, and files that only exist as pickles.

timm (and the projects whose weights it carries) runs exact GELU with epsilon 1e-6; Hugging Face's ViT has 1e-12; CLIP
has quick GELU and 1e-5. Pickled files are never opened here: their rows say what to download and how to convert it.
"""

from collections.abc import Iterator
from typing import Any

from vpt_jax.models import bit, clip_resnet, convnext, resnet, swin
from vpt_jax.models.catalog.google import vit
from vpt_jax.models.catalog.row import NONCOMMERCIAL, Row
from vpt_jax.models.pixels import CLIP, HALF, IMAGENET

_APACHE, _MIT, _BSD = 'Apache-2.0', 'MIT', 'BSD-3-Clause'
_META = 'https://dl.fbaipublicfiles.com'

#: How timm and torchvision run a ViT, and resample its positions.
_TIMM = {'activation': 'gelu', 'ln_eps': 1e-6, 'posemb_rule': 'cubic_antialias', 'pool': 'tok'}
#: Other rules of resampling: DINO's, and plain bicubic (MAE, Hugging Face).
_DINO = {**_TIMM, 'posemb_rule': 'cubic_offset'}
_CUBIC = {**_TIMM, 'posemb_rule': 'cubic'}
_CLIP = {**_TIMM, 'activation': 'quick_gelu', 'ln_eps': 1e-5}

_PAPERS = {'mae': '2111.06377', 'moco': '2104.02057', 'dino': '2104.14294', 'dinov2': '2304.07193', 'reg': '2309.16588',
           'clip': '2103.00020', 'deit': '2012.12877', 'beit2': '2208.06366', 'swin': '2103.14030',
           'convnext': '2201.03545', 'siglip': '2303.15343', 'siglip2': '2502.14786', 'sam': '2106.01548'}  # fmt: skip


def rows() -> Iterator[tuple[str, Row]]:
    """All of them, by name."""
    yield from _supervised()
    yield from _self_supervised()
    yield from _contrastive()
    yield from _hierarchical()
    yield from _residual()


def _hf(repo: str, file: str = 'model.safetensors') -> str:
    return f'hf:{repo}:{file}'


def _paper(key: str) -> str:
    return f'(arXiv {_PAPERS[key]})'


def _supervised() -> Iterator[tuple[str, Row]]:
    yield 'vit_b16_in21k_hf', Row(
        _hf('google/vit-base-patch16-224-in21k'), 'vit', vit('B', 16),
        {**_CUBIC, 'ln_eps': 1e-12}, HALF, _APACHE,
        'ViT-B/16, ImageNet-21k, as Hugging Face runs it', 330)  # fmt: skip
    for name, repo, words, mib in (
        ('in21k', 'orig_in21k', 'ImageNet-21k', 327),
        ('augreg_in21k', 'augreg_in21k', 'AugReg, ImageNet-21k', 391),
        ('sam_in1k', 'sam_in1k', f'ImageNet with SAM {_paper("sam")}', 330),
    ):
        yield f'vit_b16_{name}_timm', Row(
            _hf(f'timm/vit_base_patch16_224.{repo}'), 'vit', vit('B', 16), _TIMM, HALF, _APACHE,
            f'ViT-B/16, {words}, as timm runs it', mib)  # fmt: skip
    yield 'deit_b16_distilled', Row(
        _hf('timm/deit_base_distilled_patch16_224.fb_in1k'), 'vit', vit('B', 16, dist_token=True, posemb_prefix=2),
        _TIMM, IMAGENET, _APACHE, f'DeiT-B/16, distilled {_paper("deit")}, ImageNet', 333)  # fmt: skip
    for patch, start, mib in ((16, 'c867db91', 330), (32, 'd86f8d99', 337)):
        yield f'vit_b{patch}_tv', Row(
            f'https://download.pytorch.org/models/vit_b_{patch}-{start}.pth', 'vit', vit('B', patch), _TIMM, IMAGENET,
            _BSD, f"ViT-B/{patch}, ImageNet, torchvision's", mib, known=f'sha256:{start}')  # fmt: skip


def _self_supervised() -> Iterator[tuple[str, Row]]:
    for variant, patch, size, mib in (('B', 16, 'base', 327), ('L', 16, 'large', 1157), ('H', 14, 'huge', 2406)):
        shared: dict[str, Any] = {
            'source': _hf(f'timm/vit_{size}_patch{patch}_224.mae'), 'family': 'vit', 'network': vit(variant, patch),
            'pixels': IMAGENET, 'license': NONCOMMERCIAL, 'mib': mib, 'twins': (f'mae_pretrain_vit_{size}',),
        }  # fmt: skip
        title = f'MAE {variant}/{patch} {_paper("mae")}, ImageNet'
        name = f'mae_{variant.lower()}{patch}'
        yield name, Row(**shared, conventions=_CUBIC, note=f'{title}; features are the normalised CLS')
        mean = {**_CUBIC, 'pool': 'gap', 'final_norm': False}
        yield f'{name}_vpt', Row(
            **shared, conventions={**mean, 'fc_norm': 'new'},
            note=f'{title}, as VPT runs it: the mean of the patches under a norm that was never trained',
        )  # fmt: skip
        yield f'{name}_spt', Row(
            **shared, conventions={**mean, 'fc_norm': 'norm'},
            note=f'{title}, as SPT runs it: the mean of the patches under the pretrained norm',
        )  # fmt: skip
    for variant, file, known, mib in (('B', 'vit-b-300ep', 'md5:8f39ce', 327), ('S', 'vit-s-300ep', '', 83)):
        # The small one has 12 heads too, which no name or shape tells.
        yield f'mocov3_{variant.lower()}16', Row(
            f'{_META}/moco-v3/{file}/linear-{file}.pth.tar', 'vit', vit(variant, 16, heads=12),
            {**_TIMM, 'heads': 12}, IMAGENET, NONCOMMERCIAL,
            f'MoCo v3 {variant}/16 {_paper("moco")}, ImageNet', mib, known=known)  # fmt: skip
    for variant, patch, size, mib in (('S', 16, 'small', 83), ('B', 16, 'base', 327), ('S', 8, 'small', 83),
                                      ('B', 8, 'base', 327)):  # fmt: skip
        yield f'dino_{variant.lower()}{patch}', Row(
            _hf(f'timm/vit_{size}_patch{patch}_224.dino'), 'vit', vit(variant, patch), _DINO, IMAGENET, _APACHE,
            f'DINO {variant}/{patch} {_paper("dino")}, ImageNet', mib,
            twins=(f'dino_{"deit" if variant == "S" else "vit"}{size}{patch}_pretrain',))  # fmt: skip
    yield 'dino_s16_full', Row(
        f'{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain_full_checkpoint.pth', 'vit', vit('S', 16),
        _DINO, IMAGENET, _APACHE,
        f'DINO S/16 {_paper("dino")}, ImageNet: the teacher of the training checkpoint')  # fmt: skip
    for variant, size, mib in (('S', 'small', 84), ('B', 'base', 330), ('L', 'large', 1161)):
        for registers in (0, 4):
            end, rule = ('_reg4', _TIMM) if registers else ('', _DINO)
            # Made for 518 pixels, and used at 224.
            yield f'dinov2_{variant.lower()}14{end.rstrip("4")}', Row(
                _hf(f'timm/vit_{size}_patch14{end}_dinov2.lvd142m'), 'vit',
                vit(variant, 14, 518, layer_scale=True, registers=registers,
                    posemb_prefix=0 if registers else 1),
                rule, IMAGENET, _APACHE,
                f'DINOv2 {variant}/14 {_paper("dinov2")}' + (f' with registers {_paper("reg")}' if registers else '')
                + ', LVD-142M; made for 518 pixels', mib,
                twins=(f'dinov2_vit{variant.lower()}14{end}_pretrain',), resized={'image_size': 224})  # fmt: skip
    yield from _beit()


def _beit() -> Iterator[tuple[str, Row]]:
    for variant, size, mib in (('B', 'base', 391), ('L', 'large', 1243)):
        network = vit(variant, 16, posemb='none', layer_scale=True)
        title = f'BEiT v2 {variant}/16 {_paper("beit2")}'
        released = 'https://github.com/addf400/files/releases/download/BEiT-v2'
        yield f'beitv2_{variant.lower()}16', Row(
            f'{released}/beitv2_{size}_patch16_224_pt1k.pth', 'beit',
            {**network, 'relative': 'shared', 'final_norm': True, 'fc_norm': False, 'mask_token': True, 'vocab': 8192,
             'branch_from': 9 if variant == 'B' else 21, 'branch_depth': 2},
            {'activation': 'gelu', 'ln_eps': 1e-6, 'pool': 'gap'}, IMAGENET, _MIT,
            f'{title}, ImageNet, masked pretraining with its heads, as VPTM runs it')  # fmt: skip
        yield f'beitv2_{variant.lower()}16_in22k', Row(
            _hf(f'timm/beitv2_{size}_patch16_224.in1k_ft_in22k'), 'beit',
            {**network, 'relative': 'block', 'final_norm': False, 'fc_norm': True},
            {'activation': 'gelu', 'ln_eps': 1e-6, 'pool': 'gap'}, IMAGENET, _APACHE,
            f'{title}, ImageNet, fine-tuned on ImageNet-22k', mib)  # fmt: skip


def _contrastive() -> Iterator[tuple[str, Row]]:
    for variant, patch, size, width, mib in (('B', 32, 'base', 512, 335), ('B', 16, 'base', 512, 329),
                                             ('L', 14, 'large', 768, 1160)):  # fmt: skip
        name, repo = f'clip_vit_{variant.lower()}{patch}', f'timm/vit_{size}_patch{patch}_clip_224.openai'
        network = vit(variant, patch, patch_bias=False, pre_norm=True)
        title = f'CLIP ViT-{variant}/{patch} {_paper("clip")}'
        yield name, Row(
            _hf(repo, 'open_clip_model.safetensors'), 'vit', {**network, 'projection': width}, _CLIP, CLIP, _MIT,
            f'{title}; features are the joint embedding', twins=(f'clip-vit-{size}-patch{patch}',))  # fmt: skip
        yield f'{name}_timm', Row(
            _hf(repo), 'vit', network, _CLIP, CLIP, _APACHE, f'{title}; features before the projection',
            mib)  # fmt: skip
    for size in ('RN50', 'RN101'):
        yield f'clip_{size.lower()}', Row(
            _hf(f'timm/resnet{size[2:]}_clip.openai', 'open_clip_model.safetensors'), 'clip_resnet',
            clip_resnet.VARIANTS[size], {}, CLIP, _MIT,
            f'CLIP {size} {_paper("clip")}; features are the joint embedding')  # fmt: skip
    network = vit('B', 16, cls_token=False, posemb_prefix=0, pool='map')
    tanh = {**_TIMM, 'activation': 'gelu_tanh', 'pool': 'map'}
    yield 'siglip_b16_224_hf', Row(
        _hf('google/siglip-base-patch16-224'), 'vit', network, {**tanh, 'posemb_rule': 'cubic'}, HALF, _APACHE,
        f'SigLIP B/16 {_paper("siglip")}, both towers', 775)  # fmt: skip
    for name, release in (('siglip', 'webli'), ('siglip2', 'v2_webli')):
        yield f'{name}_b16_224_timm', Row(
            _hf(f'timm/vit_base_patch16_siglip_224.{release}'), 'vit', network, tanh, HALF, _APACHE,
            f'{"SigLIP" if name == "siglip" else "SigLIP 2"} B/16 {_paper(name)}, the image tower', 354)  # fmt: skip


def _hierarchical() -> Iterator[tuple[str, Row]]:
    for variant, size, mib in (('B', 'base', 416), ('L', 'large', 872)):
        network = {**swin.VARIANTS[variant], 'patch_size': 4, 'mlp_ratio': 4.0, 'image_size': 224}
        yield f'swin_{variant.lower()}_in22k', Row(
            _hf(f'timm/swin_{size}_patch4_window7_224.ms_in22k'), 'swin', network,
            {'activation': 'gelu', 'ln_eps': 1e-5}, IMAGENET, _MIT,
            f'Swin-{variant} {_paper("swin")}, ImageNet-22k', mib,
            twins=(f'swin_{size}_patch4_window7_224_22k',))  # fmt: skip
    for variant, size, mib in (('B', 'base', 419), ('L', 'large', 877)):
        yield f'convnext_{variant.lower()}_22k', Row(
            _hf(f'timm/convnext_{size}.fb_in22k'), 'convnext', {**convnext.VARIANTS[variant], 'layer_scale': True},
            {'activation': 'gelu', 'ln_eps': 1e-6, 'image_size': 224}, IMAGENET, _APACHE,
            f'ConvNeXt-{variant} {_paper("convnext")}, ImageNet-22k', mib,
            twins=(f'convnext_{size}_22k_224',))  # fmt: skip


def _residual() -> Iterator[tuple[str, Row]]:
    for name, repo, variant, license, words, mib in (
        ('resnet18_tv', 'resnet18.tv_in1k', 'resnet18', _BSD, "ImageNet, torchvision's first weights", 45),
        ('resnet50_tv', 'resnet50.tv_in1k', 'resnet50', _BSD, "ImageNet, torchvision's first weights", 98),
        ('resnet50_tv2', 'resnet50.tv2_in1k', 'resnet50', _BSD, "ImageNet, torchvision's second weights", 98),
        ('resnet101_tv', 'resnet101.tv_in1k', 'resnet101', _BSD, "ImageNet, torchvision's first weights", 170),
        ('resnet101_tv2', 'resnet101.tv2_in1k', 'resnet101', _BSD, "ImageNet, torchvision's second weights", 170),
        ('resnext101_32x8d_wsl', 'resnext101_32x8d.fb_wsl_ig1b_ft_in1k', 'resnext101_32x8d', NONCOMMERCIAL,
         'a billion hashtags (arXiv 1805.00932), fine-tuned on ImageNet', 339),
    ):  # fmt: skip
        title = variant.replace('resnet', 'ResNet-').replace('resnext', 'ResNeXt-')
        yield name, Row(
            _hf(f'timm/{repo}'), 'resnet', {'stem_width': 64, **resnet.VARIANTS[variant]}, {'image_size': 224},
            IMAGENET, license, f'{title}, {words}', mib)  # fmt: skip
    yield 'bit_m_r50x1_timm', Row(
        _hf('timm/resnetv2_50x1_bit.goog_in21k'), 'bit', {**bit.VARIANTS['R50x1'], 'preact': True},
        {'pool_padding': 'zero'}, HALF, _APACHE, 'BiT-M R50x1 (arXiv 1912.11370), ImageNet-21k', 260)  # fmt: skip
