"""Plain ViTs of every dialect: tokens, features, logits, gradients, gradient descent on the head, other image sizes."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from tests.parity import ported
from tests.parity.case import Case, Report, Unsupported
from tests.parity.prompted import quick_compile
from vpt_jax.checkpoints import containers, scheme
from vpt_jax.checkpoints.schemes import timm_vit
from vpt_jax.checkpoints.source import ArraySource, Source
from vpt_jax.errors import UsageError
from vpt_jax.models import loading, patches
from vpt_jax.models.places import Context
from vpt_jax.models.vit import ViT

_VIT = re.compile(r'ViT|VisionTransformer|two_towers|PaliGemma|NaFlex|DeiT|DINO|CLIP|Hugging Face|MAE|Google npz')
_HEADS = ('heads', 'num_heads', 'num_attention_heads', 'vision_heads')
_POOLS = {'token': 'tok', 'gap': 'gap', 'unpooled': 'none', 'token_unpooled': 'none'}
# Of these the weights or the case's own text tower are the source, not the image tower.
_TEXT = {'text_features', 'text_embeds_l2', 'ztxt_normalised', 'temperature'}
_HEAD = {'logits', 'loss', 'losses_sgd', 'logits_cls', 'logits_dist', 'clip_logits_per_image'}


def claims(case: Case) -> bool:
    """Cases of such networks without a method, but for whole CLIPs and for containers."""
    about = ' '.join(str(case.meta.get(key, '')) for key in ('family', 'what', 'method'))
    names = list(case.meta.get('arrays', case.arrays))
    other = any(name.startswith(('method/', 'in/tokens')) for name in names) or 'tuning' in about
    other = other or 'options' in case.config or 'kind' in case.meta or ' form' in about or 'container' in about
    return not other and bool(_VIT.search(about)) and case.config.get('vit') is not False


def run(case: Case, report: Report) -> None:
    """Compares everything that the case holds."""
    if len(case.group('backbone')) < 3:  # no network
        (_compare_readers if 'in/images' in case.arrays else _compare_kernels)(case, report)
        return
    rate = case.config.get('sgd_lr', case.config.get('lr_sgd', case.meta.get('sgd_lr')))
    case = dataclasses.replace(case, meta={**case.meta, 'sgd_lr': rate})
    network = Network(case)
    variants = {name.split('/')[0] for name in case.group('out') if '/' in name}
    for variant in sorted(variants):
        _compare_variant(case, report, variant)
    _compare_outputs(case, report, network)
    if 'head/head_dist.weight' in case.arrays:
        _compare_distilled(case, report, network)
    elif _scores(case):
        _compare_scores(case, report, network)
    elif 'out/logits' in case.arrays:
        ported.compare_head(case, report, network.features)
    _compare_tables(case, report, network)
    for path in case.files:
        _compare_file(case, report, network, path)


class Network:
    """Our network with a case's weights.

    Attributes:
      model, params, weights: the module, its parameters, and how each came out of the file.
    """

    model: ViT

    def __init__(self, case: Case, source: Source | None = None, **settings: Any):
        config = {**case.config, **case.meta.get('hf_config', {})}
        source = source or ArraySource(case.group('backbone'), case.name, config=config)
        settings = {**settings_of(case), **settings}
        try:
            part, plan = scheme.port(source, hints=settings)
        except UsageError as error:
            if 'NaFlex' in str(error):
                raise Unsupported(str(error)) from error
            raise
        self.model, self.params = loading.build(part, plan, **settings)
        self.weights = plan.weights

    def features(self, images: jax.Array, params: Mapping | None = None, **settings: Any) -> jax.Array:
        """Features of images."""
        return self.model.clone(**settings).apply({'params': params or self.params}, images)

    def seen(self, images: np.ndarray) -> dict[str, jax.Array]:
        """What comes by on the way: `embedded`, `entered`, `blockNN`, `encoded`, and `features`."""

        def forward(params, images):
            ctx = Context()
            features = self.model.apply({'params': params}, images, _Seen(), None, ctx)
            return {**ctx.updates, 'features': features}

        return jax.jit(forward, compiler_options=quick_compile())(self.params, jnp.asarray(images))

    def part(self, name: str, images: np.ndarray) -> jax.Array:
        """The result of another function of the module."""
        return self.model.apply({'params': self.params}, jnp.asarray(images), method=name)


class _Seen(ported.Seen):
    def tokens(self, prompts, x, ctx: Context):
        ctx.updates['embedded'] = x
        return x

    def layer(self, prompts, block, x, i, ctx: Context):
        if i == 0:
            ctx.updates['entered'] = x
        return super().layer(prompts, block, x, i, ctx)


def settings_of(case: Case) -> dict[str, Any]:
    """What a case's weights do not tell."""
    config = {**case.config, **case.config.get('image', {}), **case.config.get('transformer', {})}
    found = {'heads': next((config[key] for key in _HEADS if key in config), None)}
    found['pool'] = config.get('pool_type') or _POOLS.get(config.get('classifier', ''))
    if size := config.get('rep_size') or config.get('representation_size'):
        found['pre_logits'] = config['width'] if size is True else size
    if config.get('posemb') == 'sincos2d':
        found |= {'posemb': 'sincos2d', 'image_size': case.arrays['in/images'].shape[1]}
    found['posemb_rule'] = _rule(case)
    if 'fc_norm.weight' in case.meta.get('missing_keys', ()):
        found['fc_norm'] = 'new'
    elif 'out/cls/features' in case.arrays:
        found['fc_norm'] = False
    return {name: value for name, value in found.items() if value is not None}


def _rule(case: Case) -> str | None:
    """How Facebook's code resamples positions, which its files do not tell."""
    config = case.config
    if 'interpolate_offset' in config:
        rules = {(False, True): 'cubic_offset', (False, False): 'cubic', (True, False): 'cubic_antialias'}
        asked = (config['interpolate_antialias'], bool(config['interpolate_offset']))
        if asked not in rules:
            raise Unsupported('positions resampled with an offset and with antialiasing')
        return rules[asked]
    return 'cubic_offset' if str(case.meta.get('family', '')).startswith('DINO v1') else None


def _compare_outputs(case: Case, report: Report, network: Network) -> None:
    """Everything under out/ that is no score of a head, at the usual size and at another one."""
    large = None
    if 'in/images_hires' in case.arrays:
        # Fine-tuning at another size drops the layer before the head.
        own = {'pre_logits': 0} if case.group('head_hires') else {}
        large = Network(case, image_size=case.arrays['in/images_hires'].shape[1], **own)
    plain = _outputs(case, network, case.arrays['in/images'])
    hires = _outputs(case, large, case.arrays['in/images_hires'], '_hires') if large else {}
    for name, theirs in case.group('out').items():
        stem, at_hires = name.removesuffix('_hires'), name.endswith('_hires')
        outputs = hires if at_hires else plain
        if at_hires and stem in ('pos_embedding', 'pos_embed'):
            ported.close(report, f'out/{name}', large.params['pos_embedding'], theirs, 'pos_hires')
        elif (found := re.fullmatch(r'block_?(\d+)', stem)) and f'block{int(found[1]):02d}' in outputs:
            ported.close(report, f'out/{name}', outputs[f'block{int(found[1]):02d}'], theirs, 'blocks')
        elif stem in outputs:
            group = 'hires' if at_hires else 'tokens' if np.ndim(theirs) > 2 else name
            ported.close(report, f'out/{name}', _fitting(outputs[stem], theirs), theirs, group)
        elif stem not in _HEAD | _TEXT and '/' not in name:
            raise Unsupported(f'array out/{name}')


def _fitting(ours: Any, theirs: np.ndarray) -> Any:
    """One of several meanings of a name, by its shape."""
    return next((x for x in ours if x.shape == theirs.shape), ours[0]) if isinstance(ours, tuple) else ours


def _outputs(case: Case, network: Network, images: np.ndarray, suffix: str = '') -> dict[str, Any]:
    """By the names that cases use."""
    seen, model = network.seen(images), network.model
    tokens, prefix, features = seen['encoded'], model.prefix, seen['features']
    blocks = [seen[f'block{i:02d}'] for i in range(model.depth)]
    pooled = network.features(images, pre_logits=0, projection=0)
    unit = features / (jnp.linalg.norm(features, axis=-1, keepdims=True) + 1e-8)
    stem = network.part('patches', images)
    found = {
        **seen, 'features': (features, pooled), 'head_input': pooled, 'pooled': pooled, 'embed': features,
        'image_features': features, 'zimg_normalised': unit, 'image_embeds_l2': unit,
        'tokens': tokens, 'regs': tokens[:, prefix - model.registers : prefix], 'patchtokens': tokens[:, prefix:],
        'stem': stem, 'patch_embed': stem, 'with_posemb': seen['embedded'][:, prefix:],
        'tokens_before_ln_pre': seen['embedded'], 'tokens_after_ln_pre': seen['entered'], 'hidden0': seen['entered'],
        'hidden_states': jnp.stack([seen['entered'], *blocks]),
        **dict.fromkeys(('last_block', 'last_hidden_state', 'tokens_before_post_ln', 'hidden_last_before_layernorm'),
                        blocks[-1]),
    }  # fmt: skip
    if case.group(f'head{suffix}'):
        head = ported.head(case, f'head{suffix}') if 'head/text_features' not in case.arrays else None
    elif suffix and case.group('head'):
        head = ported.head(case)
    else:
        head = None
    if head and head[2].shape[0] == features.shape[-1]:
        logits = features @ head[2] + head[3]
        found |= dict.fromkeys(('logits_loop_model', 'logits_big_vision_load'), logits)
        found |= {'logits': logits} if suffix else {}
    if 'backbone/img/head/kernel' in case.arrays:  # PaliGemma maps every token into the language model
        found |= _mapped_tokens(case, network, images)
    if 'fc_norm.weight' in case.meta.get('missing_keys', ()):
        found['features_if_norm_were_used_on_the_mean'] = Network(case, fc_norm='norm').features(images)
    return found


def _mapped_tokens(case: Case, network: Network, images: np.ndarray) -> dict[str, jax.Array]:
    kernel, bias = (case.arrays[f'backbone/img/head/{leaf}'] for leaf in ('kernel', 'bias'))
    half = {name: array.astype(np.float16) for name, array in case.group('backbone').items()}
    found = {'zimg': network.features(images, pool='none') @ kernel + bias}
    kernel, bias = (half[f'img/head/{leaf}'].astype(np.float32) for leaf in ('kernel', 'bias'))
    rounded = Network(case, ArraySource(half, case.name), pool='none')
    return {**found, 'zimg_from_f16_file': rounded.features(images) @ kernel + bias}


def _compare_variant(case: Case, report: Report, variant: str) -> None:
    """MAE's features, which people take in several ways; arrays lie under out/VARIANT and grad/VARIANT."""
    mean = {'pool': 'gap', 'final_norm': False}
    ways = {'cls': {'fc_norm': False}, 'gap': {'fc_norm': True, **mean}, 'gap_norm': {'fc_norm': 'norm', **mean}}
    images = case.arrays['in/images']
    if variant.startswith('WRONG'):
        for settings in ways.values():
            ours = Network(case, **settings).features(images)
            if np.abs(ours - case.arrays[f'out/{variant}/features']).max() < 1e-3:
                report.fail(f'out/{variant} agrees with {settings}')
        return
    if variant not in ways:
        raise Unsupported(f'features {variant!r}')
    network = Network(case, **ways[variant])
    ported.close(report, f'out/{variant}/features', network.features(images), case.arrays[f'out/{variant}/features'])
    under = re.compile(f'(out|grad)/{variant}/')
    arrays = {under.sub(r'\1/', n): a for n, a in case.arrays.items() if under.match(n) or n[:3] in ('in/', 'hea')}
    ported.compare_head(dataclasses.replace(case, arrays=arrays), report, network.features)


def _compare_distilled(case: Case, report: Report, network: Network) -> None:
    """DeiT's two heads, on CLS and on the distillation token, whose logits are averaged."""
    heads, labels, out = case.group('head'), jnp.asarray(case.arrays['in/labels']), case.group('out')

    def loss(heads, images):
        tokens = network.features(images, pool='none')
        each = [tokens[:, i] @ heads[f'{name}.weight'].T + heads[f'{name}.bias']
                for i, name in enumerate(('head', 'head_dist'))]  # fmt: skip
        logits = sum(each) / 2
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, *each)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=quick_compile())
    (value, logits), (grads, pixels) = step(heads, jnp.asarray(case.arrays['in/images']))
    ours = {'loss': value, **dict(zip(('logits', 'logits_cls', 'logits_dist'), logits, strict=True))}
    for name in out.keys() & ours.keys():
        ported.close(report, f'out/{name}', ours[name], out[name])
    for name, theirs in case.group('grad').items():
        ported.close(report, f'grad/{name}', pixels if name == 'in_images' else grads[name], theirs, 'grad')


def _scores(case: Case) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Features of texts, the logarithm of the scale, and what the scores are called, if a case compares with texts."""
    arrays = case.arrays
    if 'head/text_features' in arrays:
        return arrays['head/text_features'], arrays['head/logit_scale'], 'logits'
    if 'out/text_features' in arrays:
        return arrays['out/text_features'], arrays['backbone/logit_scale'], 'logits'
    if 'out/text_embeds_l2' in arrays:
        return arrays['out/text_embeds_l2'], arrays['backbone/logit_scale'], 'clip_logits_per_image'
    return None


def _compare_scores(case: Case, report: Report, network: Network) -> None:
    """Cosines between images and texts, and their gradients; a linear head beside them too."""
    text, scale, name = _scores(case)
    out, images = case.group('out'), jnp.asarray(case.arrays['in/images'])

    def scores(params, text, scale, images):
        image = network.features(images, params)
        image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
        return jnp.exp(scale) * image @ text.T

    def loss(*args):
        logits = scores(*args)
        labels = jnp.asarray(case.arrays['in/labels'])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    args = (network.params, text, scale, images)
    if name != 'logits':
        ported.close(report, f'out/{name}', scores(*args), out[name])
        ported.compare_head(case, report, network.features)
        return
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True), compiler_options=quick_compile())
    (value, logits), grads = step(*args)
    ported.close(report, 'out/logits', logits, out['logits'])
    ported.close(report, 'out/loss', value, out['loss'])
    known = {'head/text_features': grads[1], 'head/logit_scale': grads[2], 'in/images': grads[3], 'in_images': grads[3]}
    for path, theirs in case.group('grad').items():
        if path in known:
            ported.close(report, f'grad/{path}', known[path], theirs, 'grad')
            continue
        gradient = flatten_dict(grads[0], sep='/')
        for ours, part in _by_our_names(network, path.removeprefix('backbone/'), theirs).items():
            ported.close(report, f'grad/{path}', gradient[ours], part, 'grad')


def _by_our_names(network: Network, name: str, theirs: np.ndarray) -> dict[str, np.ndarray]:
    """The gradient of a member of the file as gradients of our arrays; layouts only move entries about."""
    found = {ours: weight.layout(theirs) for ours, weight in network.weights.items() if weight.names == (name,)}
    if not found:
        raise Unsupported(f'gradient of {name}')
    return found


def _compare_tables(case: Case, report: Report, network: Network) -> None:
    """The fixed position tables of MAE and MoCo v3, and positions resampled to other grids."""
    width, patch = network.model.width, network.model.patch_size
    for name, theirs in case.group('expect').items():
        if name != 'pos_embed_sincos':
            raise Unsupported(f'array expect/{name}')
        first = 'column' if 'MAE' in str(case.meta.get('method')) else 'row'
        ours = timm_vit.sincos(network.model.grid(network.model.image_size)[0], width, first)
        report.compare('sincos', f'expect/{name}', ours, theirs, atol=1e-6)
        report.compare('sincos', 'pos_embed', ours, np.asarray(network.params['pos_embedding']), atol=1e-6)
    for name, theirs in case.group('interp').items():
        side = int(re.fullmatch(r'pos_embed_grid(\d+)', name)[1])
        ours = Network(case, image_size=side * patch).params['pos_embedding']
        ported.close(report, f'interp/{name}', ours, theirs, 'interp')
    if decoys := case.group('ignored'):
        whole = Network(case, ArraySource({**case.group('backbone'), **decoys}, case.name))
        if any(name in decoys for weight in whole.weights.values() for name in weight.names):
            report.fail('what should be ignored is read')


def _compare_file(case: Case, report: Report, network: Network, path) -> None:
    """A weight file must hold the very weights of the case; one in half precision has been rounded."""
    if path.suffix in ('.json', '.pth') or '.f16.' in path.name:
        return
    with containers.opened(path) as file:
        held = Network(case, file).params
    for (place, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(held), jax.tree.leaves(network.params), strict=True
    ):
        report.compare('file', f'{path.name}{jax.tree_util.keystr(place)}', ours, np.asarray(theirs), atol=1e-6)


def _compare_kernels(case: Case, report: Report) -> None:
    """FlexiViT's patch kernels of other sizes: one kernel goes in, others come out, their sizes in their shapes."""
    kernels = [a for n, a in case.arrays.items() if a.ndim == 4 and not n.startswith('out/') and 'image' not in n]
    if len(kernels) != 1:
        raise Unsupported('images are not among its arrays')
    for name, theirs in case.group('out').items():
        if theirs.ndim != 4 or theirs.shape[2:] != kernels[0].shape[2:]:
            raise Unsupported(f'array out/{name}')
        ported.close(report, f'out/{name}', patches.resample(kernels[0], theirs.shape[0]), theirs, 'kernel')


def _compare_readers(case: Case, report: Report) -> None:
    """VPT's and timm's readings of a Google npz: exact GELU, and each its own way to resample positions."""
    if not case.files:
        raise Unsupported('its weight file is not beside it')
    rules = {'vpt_torch': 'corner', 'timm': 'linear'}
    for name, theirs in case.group('out').items():
        reader = next((r for r in rules if r in name), None)
        if reader is None:
            raise Unsupported(f'array out/{name}')
        images = case.arrays['in/images_hires' if name.endswith('_hires') else 'in/images']
        settings = {'activation': 'gelu', 'posemb_rule': rules[reader], 'image_size': images.shape[1]}
        with containers.opened(case.files[0]) as file:
            network = Network(case, file, **settings)
        ours = network.params['pos_embedding'] if name.startswith('pos_embed') else network.features(images)
        ported.close(report, f'out/{name}', ours, theirs, 'pos_hires' if name.startswith('pos_embed') else 'features')
