"""Plain ResNets of all kinds, and hybrid ViTs: features, maps, logits, gradients, gradient descent on the head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import ported
from tests.parity.case import Case, Report, Unsupported
from tests.parity.prompted import quick_compile
from vpt_jax.checkpoints import containers
from vpt_jax.models import posemb
from vpt_jax.models.places import Context

_KINDS = ('resnet v1', 'resnext', 'torchvision resnet', 'bit.py', 'bit_paper', 'original bit')
_HEAD = {'features', 'logits', 'loss', 'losses_sgd'}
# What enters the pooling, as the cases call it.
_MAPS = ('map', 'pre_logits_2d', 'encoded')


def claims(case: Case) -> bool:
    """Cases of such networks without a method: also CLIP's whose image tower is one, and ViTs behind one."""
    about = str(case.meta.get('family') or case.meta.get('what', '')).lower()
    named = any(kind in about for kind in _KINDS) and 'bb' not in case.config
    return 'method' not in case.meta and (named or _is_clip(case) or 'resnet' in case.config)


def _is_clip(case: Case) -> bool:
    return 'CLIP' in str(case.meta.get('family', '')) and case.config.get('vit') is False


def run(case: Case, report: Report) -> None:
    """Compares everything that the case holds."""
    if 'logits_zero_pad' in case.group('out'):
        _compare_paddings(case, report)
        return
    settings = {'image_size': case.arrays['in/images'].shape[1]}
    if 'bit_paper' in str(case.meta.get('family')):
        settings['pool_padding'] = 'inf'  # these numbers are big_vision's, whatever names the weights have
    model, params = ported.build(case, **settings)
    for path in case.files:
        _compare_file(path, params, report, settings)

    def features(images):
        return model.apply({'params': params}, images)

    if _is_clip(case):
        _compare_scores(case, report, features)
        return
    _compare_maps(case, report, model, params)
    if 'in/images_hires' in case.arrays:
        _compare_resampled(case, report, model, params)
    ported.compare_head(case, report, features)
    _compare_gradients(case, report, model, params)


class _Seen(ported.Seen):
    """Hands out the map that enters block 0 too."""

    def layer(self, prompts, block, x, i, ctx: Context):
        """The block, noted."""
        if i == 0:
            ctx.updates['stem'] = x
        return super().layer(prompts, block, x, i, ctx)


def _compare_maps(case: Case, report: Report, model, params) -> None:
    """The features, and the maps on the way as far as the case has them."""

    def forward(params, images):
        ctx = Context()
        return model.apply({'params': params}, images, _Seen(), None, ctx), ctx.updates

    run = jax.jit(forward, compiler_options=quick_compile())
    features, seen = run(params, jnp.asarray(case.arrays['in/images']))
    depths = getattr(model, 'depths', ())
    last = {f'layer{s + 1}': f'block{sum(depths[: s + 1]) - 1:02d}' for s in range(len(depths))}
    where = {'maxpool': 'stem', 'stem': 'stem', **dict.fromkeys(_MAPS, 'encoded'), **last}
    for name, theirs in case.group('out').items():
        if name == 'features':
            ported.close(report, f'out/{name}', features, theirs)
        elif name in where:
            ported.close(report, f'out/{name}', seen[where[name]], theirs, 'maps')
        elif name not in _HEAD and not name.endswith('_hires'):
            raise Unsupported(f'array out/{name}')


def _compare_resampled(case: Case, report: Report, model, params) -> None:
    """Positions and logits for images of another size."""
    images = jnp.asarray(case.arrays['in/images_hires'])
    head = case.group('head_hires')
    pos = posemb.resample(params['pos_embedding'], model.grid(images.shape[1]), model.posemb_prefix, model.posemb_rule)
    features, _ = ported.run(model, params, images)
    outputs = {'logits_hires': features @ head['kernel'] + head['bias'], 'pos_embedding_hires': pos}
    for name, theirs in case.group('out').items():
        if name.endswith('_hires'):
            ported.close(report, f'out/{name}', outputs[name], theirs, 'hires')


def _compare_gradients(case: Case, report: Report, model, params) -> None:
    """Gradients of the loss that `ported.compare_head` does not look at: of images and of the first kernel."""
    names = {'grad/in/images': None, 'grad/backbone/conv1.weight': 'conv1'}
    held = [name for name in case.arrays if name.startswith('grad/') and name in names]
    known = {f'grad/{n}' for n in (*ported.head(case)[:2], 'in_images')} | {
        f'grad/head/{n}' for n in ported.head(case)[:2]
    }
    if unknown := sorted(n for n in case.arrays if n.startswith('grad/') and n not in known | names.keys()):
        raise Unsupported(f'array {unknown[0]}')
    if not held:
        return
    _, _, kernel, bias = ported.head(case)
    labels = jnp.asarray(case.arrays['in/labels'])

    def loss(first, images):
        logits = model.apply({'params': {**params, 'conv1': first}}, images) @ kernel + bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=quick_compile())
    first, pixels = step(params['conv1'], jnp.asarray(case.arrays['in/images']))
    for name in held:
        theirs = case.arrays[name]
        ours, theirs = (first['kernel'], theirs.transpose(2, 3, 1, 0)) if names[name] else (pixels, theirs)
        ported.close(report, name, ours, theirs, 'grad')


def _compare_scores(case: Case, report: Report, features: Callable) -> None:
    """CLIP's image features, and its scores against the case's text features."""
    out, labels = case.group('out'), jnp.asarray(case.arrays['in/labels'])
    if unknown := sorted(out.keys() - _HEAD - {'text_features'}):
        raise Unsupported(f'array out/{unknown[0]}')
    text = out['text_features'] / np.linalg.norm(out['text_features'], axis=1, keepdims=True)
    scale = np.exp(case.arrays['backbone/logit_scale'])

    def loss(images):
        found = features(images)
        logits = scale * (found / jnp.linalg.norm(found, axis=1, keepdims=True)) @ text.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (found, logits)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick_compile())
    (value, (found, logits)), pixels = step(jnp.asarray(case.arrays['in/images']))
    for name, ours in (('features', found), ('logits', logits), ('loss', value)):
        ported.close(report, f'out/{name}', ours, out[name])
    ported.close(report, 'grad/in_images', pixels, case.arrays['grad/in_images'], 'grad')


def _compare_file(path, params, report: Report, settings: dict) -> None:
    """A weight file must hold the very weights of the case."""
    with containers.opened(path) as file:
        _, held = ported.build(Case(path.name, {}, {}), source=file, **settings)
    for (place, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(held), jax.tree.leaves(params), strict=True):
        report.compare('file', f'{path.name}{jax.tree_util.keystr(place)}', ours, np.asarray(theirs), atol=1e-12)


def _compare_paddings(case: Case, report: Report) -> None:
    """The original BiT's reading of a file, whose max-pooling pads zeros, and the same with minus infinity."""
    paths = case.files
    if not paths:
        raise Unsupported('its weight file is not beside it')
    out, images = case.group('out'), jnp.asarray(case.arrays['in/images'])
    for path in paths:
        for padding in ('zero', 'inf'):
            settings = {} if padding == 'zero' else {'pool_padding': padding}  # zeros are what such names mean
            with containers.opened(path) as file:
                model, params = ported.build(case, source=file, **settings)
                head = {name: file.read(f'resnet/head/conv2d/{name}') for name in ('kernel', 'bias')}
            seen = Context()
            features = model.apply({'params': params}, images, _Seen(), None, seen)
            logits = features @ head['kernel'][0, 0] + head['bias']
            ported.close(report, f'out/logits_{padding}_pad', logits, out[f'logits_{padding}_pad'], 'logits')
            if f'stem_{padding}_pad' in out:
                ported.close(
                    report, f'out/stem_{padding}_pad', seen.updates['stem'], out[f'stem_{padding}_pad'], 'maps'
                )
