"""Google's releases: vision_transformer, AugReg, SAM, big_vision, SigLIP, FlexiViT, LiT, CLIPPO, PaliGemma, BiT.

All are `.npz` files in public buckets. Their home runs them with tanh GELU on pixels in [-1, 1]; VPT (arXiv 2203.12119)
and the work after it ran the ImageNet-21k ViTs with exact GELU on ImageNet-normalised pixels. Those have two names.
"""

from collections.abc import Iterator
from typing import Any

from vpt_jax.models import bit
from vpt_jax.models.catalog.row import Row
from vpt_jax.models.pixels import HALF, IMAGENET
from vpt_jax.models.vit import VARIANTS

_APACHE = 'Apache-2.0'
#: Files without a word about their licence, of a repository that has one.
_REPOSITORY = 'Apache-2.0 (of the repository)'

_TANH = {'activation': 'gelu_tanh'}
_EXACT = {'activation': 'gelu'}

# variant, patch, MiB
_IN21K = (('B', 16, 394), ('B', 32, 400), ('L', 16, 1246), ('L', 32, 1255), ('H', 14, 2519), ('R50+B', 16, 440))
# variant, patch, image size, MiB
_IN1K = (('B', 16, 384, 331), ('B', 16, 224, 330), ('B', 32, 384, 337), ('L', 16, 384, 1162), ('L', 16, 224, 1161),
         ('L', 32, 384, 1170))  # fmt: skip
# The recommended ones of google-research/vision_transformer's README.
_AUGREG = (
    ('Ti', 16, 'aug_none-wd_0.03-do_0.0-sd_0.0', 37),
    ('S', 32, 'aug_none-wd_0.1-do_0.0-sd_0.0', 118),
    ('S', 16, 'aug_light1-wd_0.03-do_0.0-sd_0.0', 115),
    ('B', 32, 'aug_light1-wd_0.1-do_0.0-sd_0.0', 398),
    ('B', 16, 'aug_medium1-wd_0.1-do_0.0-sd_0.0', 391),
    ('L', 16, 'aug_strong1-wd_0.1-do_0.0-sd_0.0', 1243),
    ('R+Ti', 16, 'aug_none-wd_0.03-do_0.0-sd_0.0', 40),
    ('R26+S', 32, 'aug_light1-wd_0.1-do_0.0-sd_0.0', 170),
    ('R50+L', 32, 'aug_medium1-wd_0.1-do_0.1-sd_0.1', 1337),
)
_SHARPNESS = (('sam', 'B', 16, ''), ('sam', 'B', 32, ''), ('gsam', 'S', 16, '-gap-norep'),
              ('gsam', 'S', 32, '-gap-norep'), ('gsam', 'B', 16, '-gap-norep'),
              ('gsam', 'B', 32, '-gap-norep'))  # fmt: skip
_DEIT3 = {'S': ('small', 84, 85), 'B': ('base', 330, 331), 'L': ('large', 1161, 1162)}
# variant, patch, image size, training step, MiB
_SIGLIP = (
    ('B', 16, 224, '63724782', 775), ('B', 16, 256, '60500360', 775), ('B', 16, 384, '68578854', 776),
    ('B', 16, 512, '68580893', 778), ('L', 16, 256, '60552751', 2488), ('L', 16, 384, '63634585', 2489),
    ('So400m', 14, 224, '57633886', 3347), ('So400m', 14, 384, '58765454', 3349),
)  # fmt: skip
_SIGLIP_I18N = (('B', 16, 256, '66117334'), ('So400m', 16, 256, '78061115'))
_SIGLIP2 = (
    ('B', 32, 256, 1438), ('B', 16, 224, 1431), ('B', 16, 256, 1431), ('B', 16, 384, 1432), ('B', 16, 512, 1434),
    ('L', 16, 256, 3363), ('L', 16, 384, 3364), ('L', 16, 512, 3366), ('So400m', 14, 224, 4332),
    ('So400m', 14, 384, 4334), ('So400m', 16, 256, 4332), ('So400m', 16, 384, 4334), ('So400m', 16, 512, 4336),
    ('g-opt', 16, 256, None), ('g-opt', 16, 384, None),
)  # fmt: skip
_FLEXIVIT = (*((v, 'i1k', ep) for v in 'SBL' for ep in ('', '600', '300', '90')),
             *(('B', 'i21k', ep) for ep in ('1000', '300', '90')))  # fmt: skip
_CLIPPO = ('yfcc100m', 'yfcc100m_i21k_init', 'yfcc100m_i21k_init_25c4', 'yfcc100m_i21k_init_50c4',
           'yfcc100m_i21k_init_75c4', '100c4')  # fmt: skip
# size, MiB with ImageNet-21k's head, with ImageNet's
_BIT = (('R50x1', 260, 97), ('R50x3', 1318, 829), ('R101x1', 333, 170), ('R101x3', 1969, 1480), ('R152x2', 1227, 902),
        ('R152x4', 4224, 3573))  # fmt: skip


def rows() -> Iterator[tuple[str, Row]]:
    """All of them, by name."""
    yield from _original()
    yield from _augreg()
    yield from _big_vision()
    yield from _siglip()
    yield from _towers()
    yield from _bit()


def vit(variant: str, patch: int, size: int | None = 224, **settings: Any) -> dict[str, Any]:
    """What a ViT's file tells; no image size where positions are not stored."""
    known = {**VARIANTS[variant], 'patch_size': patch, 'image_size': size, **settings}
    return {name: value for name, value in known.items() if value is not None}


def short(variant: str, patch: int) -> str:
    """'vit_b16', 'r50_vit_l32'."""
    stem, _, size = variant.rpartition('+')
    return '_'.join([*([stem] if stem else []), 'vit', f'{size}{patch}']).lower().replace('-', '_')


def _title(variant: str, patch: int) -> str:
    """'ViT-B/16', 'R50+ViT-L/32'."""
    stem, _, size = variant.rpartition('+')
    return f'{stem}+ViT-{size}/{patch}' if stem else f'ViT-{size}/{patch}'


def _original() -> Iterator[tuple[str, Row]]:
    for variant, patch, mib in _IN21K:
        name, title = f'{short(variant, patch)}_in21k', _title(variant, patch)
        file = f'{title.replace("/", "_")}.npz'
        shared = {
            'source': f'gs://vit_models/imagenet21k/{file}', 'family': 'vit', 'network': vit(variant, patch),
            'license': _APACHE, 'mib': mib, 'known': 'md5:d9715d' if file == 'ViT-B_16.npz' else '',
        }  # fmt: skip
        yield name, Row(**shared, conventions=_EXACT, pixels=IMAGENET, note=f'{title}, ImageNet-21k, as VPT runs it')
        yield (
            f'{name}_tanh',
            Row(**shared, conventions=_TANH, pixels=HALF, note=f'{title}, ImageNet-21k, as it was trained'),
        )
    for variant, patch, size, mib in _IN1K:
        end = '-224' if size == 224 else ''
        folder, file = 'imagenet21k+imagenet2012', f'ViT-{variant}_{patch}{end}.npz'
        yield f'{short(variant, patch)}_in21k_ft_in1k{end.replace("-", "_")}', Row(
            f'gs://vit_models/{folder}/{file}', 'vit', vit(variant, patch, size), _TANH, HALF, _APACHE,
            f'{_title(variant, patch)}, ImageNet-21k, fine-tuned on ImageNet', mib,
            file=f'{folder}/{file}')  # fmt: skip


def _augreg() -> Iterator[tuple[str, Row]]:
    for variant, patch, recipe, mib in _AUGREG:
        file = f'{variant.replace("+", "_")}_{patch}-i21k-300ep-lr_0.001-{recipe}.npz'
        # R+Ti/16 cuts patches of 8 from maps of a quarter of the size, whatever it is called.
        network = vit(variant, 32 if variant == 'R+Ti' else patch)
        yield f'{short(variant, patch)}_augreg_in21k', Row(
            f'gs://vit_models/augreg/{file}', 'vit', network, _TANH, HALF, _APACHE,
            f'{_title(variant, patch)}, AugReg (arXiv 2106.10270), ImageNet-21k', mib)  # fmt: skip
    for kind, variant, patch, end in _SHARPNESS:
        token = not end
        network = vit(variant, patch, cls_token=token, posemb_prefix=int(token))
        file, paper = f'ViT-{variant}_{patch}{end}.npz', '2106.01548' if kind == 'sam' else '2203.08065'
        yield f'{short(variant, patch)}_{kind}_in1k', Row(
            f'gs://vit_models/{kind}/{file}', 'vit', network, {**_TANH, 'pool': 'tok' if token else 'gap'}, HALF,
            _APACHE, f'{_title(variant, patch)}, ImageNet with {kind.upper()} (arXiv {paper})',
            file=f'{kind}/{file}')  # fmt: skip


def _big_vision() -> Iterator[tuple[str, Row]]:
    for epochs in (90, 150, 300):
        # The file holds no positions: without the convention the network would have none.
        network = vit('S', 16, None, cls_token=False, posemb_prefix=0)
        yield f'vit_s16_i1k_{epochs}ep', Row(
            f'gs://big_vision/vit_s16_i1k_{epochs}ep.npz', 'vit', network,
            {**_TANH, 'pool': 'gap', 'posemb': 'sincos2d', 'image_size': 224}, HALF, _REPOSITORY,
            f'ViT-S/16, ImageNet, {epochs} epochs (arXiv 2205.01580)', 84)  # fmt: skip
    for variant, (title, *mib) in _DEIT3.items():
        for i, size in enumerate((224, 384)):
            for data in ('1k', '21k'):
                yield f'deit3_{variant.lower()}_{size}_{data}', Row(
                    f'gs://big_vision/zoo/deit3/bv_deit_3_{title}_{size}_{data}.npz', 'vit',
                    vit(variant, 16, size, posemb_prefix=0), _TANH, HALF, _REPOSITORY,
                    f'DeiT-3 {variant}/16 (arXiv 2204.07118), ImageNet-{data}, converted by big_vision',
                    mib[i])  # fmt: skip
    # Patch kernel and positions are of a size of their own, and resampled to whatever is asked for.
    flexible = {**_TANH, 'posemb_rule': 'linear_antialias'}
    for variant, data, epochs in _FLEXIVIT:
        end = f'_{epochs}ep' if epochs else ''
        yield f'flexivit_{variant.lower()}_{data}{end}', Row(
            f'gs://big_vision/flexivit/flexivit_{variant.lower()}_{data}{end}.npz', 'vit',
            {**VARIANTS[variant], 'posemb_prefix': 0}, flexible, HALF, _APACHE,
            f'FlexiViT-{variant} (arXiv 2212.08013), {"ImageNet" if data == "i1k" else "ImageNet-21k"}, '
            f'{epochs or 1200} epochs; any patch_size, here 16',
            resized={'patch_size': 16, 'image_size': 240})  # fmt: skip
    for patch in (16, 30):
        yield f'vit_b{patch}_i21k_300ep', Row(
            f'gs://big_vision/flexivit/vit_b{patch}_i21k_300ep.npz', 'vit', vit('B', patch, 240, posemb_prefix=0),
            _TANH, HALF, _APACHE,
            f'ViT-B/{patch}, ImageNet-21k, the baseline of FlexiViT (arXiv 2212.08013)')  # fmt: skip


def _siglip() -> Iterator[tuple[str, Row]]:
    def row(version: str, path: str, variant: str, patch: int, size: int, mib: float | None, words: str) -> Row:
        whole = size // patch * patch
        network = vit(variant, patch, whole, cls_token=False, posemb_prefix=0, pool='map')
        # So400m/14 takes images of 384 pixels, and drops what is left of 27 patches.
        conventions = _TANH if whole == size else {**_TANH, 'image_size': size}
        title = f'{version} {variant}/{patch}, {size} pixels, WebLI{words}'
        return Row(f'gs://big_vision/{path}.npz', 'vit', network, conventions, HALF, _APACHE, title, mib, tower='img')

    def name(variant: str, patch: int) -> str:
        # So400m comes with patches of 14 and of 16 pixels, the others with 16 unless they say 32.
        return f'{variant.lower().replace("-", "_")}{patch}'

    for variant, patch, size, step, mib in _SIGLIP:
        label = f'{variant.lower()}{"" if variant == "So400m" else patch}'
        path = f'siglip/webli_en_{label}_{size}_{step}'
        paper = ' (arXiv 2303.15343)'
        yield f'siglip_{name(variant, patch)}_{size}', row('SigLIP', path, variant, patch, size, mib, paper)
    for variant, patch, size, step in _SIGLIP_I18N:
        label = f'{variant.lower()}{"_" if variant == "So400m" else ""}{patch}'
        path = f'siglip/webli_i18n_{label}_{size}_{step}'
        words = ' in many languages (arXiv 2303.15343)'
        yield f'siglip_{name(variant, patch)}_{size}_i18n', row('SigLIP', path, variant, patch, size, None, words)
    for variant, patch, size, mib in _SIGLIP2:
        path = f'siglip2/siglip2_{variant.lower()}{patch}_{size}'
        paper = ' (arXiv 2502.14786)'
        yield f'siglip2_{name(variant, patch)}_{size}', row('SigLIP 2', path, variant, patch, size, mib, paper)


def _towers() -> Iterator[tuple[str, Row]]:
    for file in ('B16B', 'B16B_2', 'L16L', 'L16S', 'L16Ti'):
        yield f'lit_{file.lower()}', Row(
            f'gs://vit_models/lit/LiT-{file}.npz', 'vit', vit(file[0], 16), _TANH, HALF, _REPOSITORY,
            f'LiT {file} (arXiv 2111.07991): the image tower, an AugReg ViT-{file[0]}/16', tower='img')  # fmt: skip
    for data in _CLIPPO:
        yield f'clippo_b16_{data}', Row(
            f'gs://big_vision/clippo/clippo_b16_{data}.npz', 'vit',
            vit('B', 16, cls_token=False, posemb_prefix=0, pool='map'), _TANH, HALF, _REPOSITORY,
            f'CLIPPO B/16 (arXiv 2212.08045), {data}', tower='img')  # fmt: skip
    for generation, paper, language in (('', '2407.07726', ('',)), ('2', '2412.03555', ('3b', '10b', '28b'))):
        for model in language:
            for size in (224, 448, 896):
                label = '_'.join(filter(None, (model, str(size))))
                yield f'paligemma{generation}_{label}', Row(
                    f'page:https://www.kaggle.com/models/google/paligemma{"-" if generation else ""}{generation}',
                    'vit', vit('So400m', 14, size, cls_token=False, posemb_prefix=0), {**_TANH, 'pool': 'gap'}, HALF,
                    'Gemma terms', f'PaliGemma {generation}{" " if generation else ""}{model}{" " if model else ""}'
                    f'(arXiv {paper}), {size} pixels: the image tower; features are the mean of its tokens',
                    tower='img', file=f'pt_{label}{".bf16" if generation else ""}.npz')  # fmt: skip


def _bit() -> Iterator[tuple[str, Row]]:
    for kind, data in (('M', 'ImageNet-21k'), ('S', 'ImageNet')):
        for size, *mib in _BIT:
            yield f'bit_{kind.lower()}_{size.lower()}', Row(
                f'gs://bit_models/BiT-{kind}-{size}.npz', 'bit', {**bit.VARIANTS[size], 'preact': True},
                {'pool_padding': 'zero'}, HALF, _APACHE, f'BiT-{kind} {size} (arXiv 1912.11370), {data}',
                mib[kind == 'S'])  # fmt: skip
    for size, _, mib in _BIT:
        yield f'bit_m_{size.lower()}_in1k', Row(
            f'gs://bit_models/BiT-M-{size}-ILSVRC2012.npz', 'bit', {**bit.VARIANTS[size], 'preact': True},
            {'pool_padding': 'zero'}, HALF, _APACHE,
            f'BiT-M {size} (arXiv 1912.11370), ImageNet-21k, fine-tuned on ImageNet', mib)  # fmt: skip
    for file, size, mib in (('R50x1_160', 'R50x1', 97), ('R50x1_224', 'R50x1', 97), ('R152x2_T_224', 'R152x2', 902),
                            ('R152x2_T_384', 'R152x2', 902)):  # fmt: skip
        pixels = int(file.rsplit('_', 1)[-1])
        role = 'the teacher' if '_T_' in file else 'distilled'
        yield f'bit_{file.lower()}_distill', Row(
            f'gs://bit_models/distill/{file}.npz', 'bit', {**bit.VARIANTS[size], 'preact': True},
            {'pool_padding': 'inf', 'image_size': pixels}, HALF, _APACHE,
            f'BiT {size}, {role} (arXiv 2106.05237), ImageNet', mib, file=f'distill/{file}.npz')  # fmt: skip
