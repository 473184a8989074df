"""BEiT, masked and classifying, in unilm's and Hugging Face's names: tokens, logits, all gradients, full descent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from tests.parity import ported
from tests.parity.case import Case, Report, Unsupported
from tests.parity.prompted import quick_compile
from vpt_jax.checkpoints import scheme
from vpt_jax.checkpoints.ported import Weight
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.models import loading, relative
from vpt_jax.models.beit import BEiT

_MIM, _CLASSIFIER, _TABLES = 'VisionTransformerForMasked', 'modeling_finetune', 'relative position index tables'


def claims(case: Case) -> bool:
    """Cases on BEiT's networks and tables, without a method and without the tokenizer."""
    kind = str(case.meta.get('kind', ''))
    known = kind.startswith((_MIM, _CLASSIFIER, _TABLES, 'transformers Beit'))
    return known or str(case.meta.get('family', '')).startswith('BEiT')


def run(case: Case, report: Report) -> None:
    """Compares everything that the case holds."""
    kind = str(case.meta.get('kind', ''))
    if kind.startswith(_TABLES):
        _tables(case, report)
    elif kind.startswith(_MIM):
        _masked(case, report)
    elif kind.startswith('transformers'):
        _hub(case, report)
    else:
        _classifier(case, report)


def network(case: Case, *groups: str, **settings: Any) -> tuple[BEiT, dict, dict[str, Weight]]:
    """Our network with a case's weights, of several groups, and how each array came of them."""
    arrays = {name: array for group in groups for name, array in case.group(group).items()}
    config = case.config
    side = config.get('img_size', config.get('image_size'))
    rows, columns = (side, side) if isinstance(side, int) else side
    settings = {'window_rows': rows // config['patch_size'], 'window_columns': columns // config['patch_size'],
                'heads': config.get('num_heads', config.get('num_attention_heads')), **settings}  # fmt: skip
    part, plan = scheme.port(ArraySource(arrays, case.name, config=config), hints=settings)
    model, params = loading.build(part, plan, **settings)
    return model, params, plan.weights


def applied(model: BEiT, method: str | None = None) -> Callable:
    """A compiled function (params, ...) of the network."""
    function = jax.jit(
        lambda params, *args: model.apply({'params': params}, *args, method=method), compiler_options=quick_compile()
    )
    return lambda params, *args: function(params, *map(jnp.asarray, args))


def _tables(case: Case, report: Report) -> None:
    rules = {'table': 'geometric_cubic', 'timm_table': 'geometric_linear'}
    for name, theirs in case.group('out').items():
        kind, *sides = name.replace('timm_', '').split('_')
        if kind == 'index':
            rows, columns = map(int, sides[0].split('x'))
            report.compare('index', f'out/{name}', relative.token_index((rows, columns)), theirs, atol=0.5)
        elif kind == 'table':
            old, new = int(sides[0]), int(sides[-1])
            table = jnp.asarray(case.arrays[f'in/table_{old}'])
            rule = rules[name.removesuffix(f'_{old}_to_{new}')]
            ours = relative.resize_table(table, (old, old), (new, new), rule)
            ported.close(report, f'out/{name}', ours, theirs, 'table')
        else:
            raise Unsupported(f'array out/{name}')


def _masked(case: Case, report: Report) -> None:
    start = {'branch_from': case.config['early_layers']} if 'early_layers' in case.config else {}
    model, params, weights = network(case, 'backbone', 'head', **start)
    images, mask = case.arrays['in/images'], case.arrays['in/bool_masked_pos']
    labels = jnp.asarray(case.arrays['in/labels'])
    outputs, where = {}, np.nonzero(mask)
    for name, hidden in (('unmasked', np.zeros_like(mask)), ('masked', mask)):
        features = applied(model, 'masked_features')(params, images, hidden)
        logits = applied(model, 'masked_logits')(params, images, hidden)
        for branch, x, z in zip(('', '_cls_pt'), features, logits, strict=False):
            outputs |= {f'features_{name}{branch}': x, f'logits_{name}{branch}': z}
            outputs[f'logits_at_mask{branch}'] = z[where]
    outputs |= {'features': outputs['features_unmasked'], 'logits': outputs['logits_unmasked']}

    def loss(params):
        logits = model.apply({'params': params}, jnp.asarray(images), jnp.asarray(mask), method='masked_logits')
        return sum(optax.softmax_cross_entropy_with_integer_labels(z[where], labels).mean() for z in logits)

    descent(case, report, loss, params, weights, model)
    theirs = case.group('out')
    if np.abs(theirs['logits'] - theirs['logits_masked']).max() < 1e-7:  # which of the two 'logits' repeats
        outputs |= {'features': outputs['features_masked'], 'logits': outputs['logits_masked']}
    compare_outputs(case, report, outputs)


def _classifier(case: Case, report: Report) -> None:
    model, params, weights = network(case, 'backbone')
    images, labels = case.arrays['in/images'], jnp.asarray(case.arrays['in/labels'])
    tokens = applied(model.clone(pool='none'))(params, images)
    outputs = {'features': applied(model)(params, images), 'patch_features': tokens[:, 1:], 'all_features': tokens,
               'all_tokens': tokens}  # fmt: skip
    kernel, bias = (jnp.asarray(case.arrays[f'head/head.{leaf}']) for leaf in ('weight', 'bias'))
    outputs['logits'] = outputs['features'] @ kernel.T + bias
    if 'grad/cls_token' not in case.arrays:
        ported.compare_head(case, report, lambda images: model.apply({'params': params}, images))
        compare_outputs(case, report, outputs, but=('loss', 'losses_sgd'))
        return

    def loss(trained):
        features = model.apply({'params': trained['network']}, jnp.asarray(images))
        logits = features @ trained['head.weight'].T + trained['head.bias']
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    trained = {'network': params, 'head.weight': kernel, 'head.bias': bias}
    descent(case, report, loss, trained, weights, model)
    compare_outputs(case, report, outputs)


def _hub(case: Case, report: Report) -> None:
    model, params, _ = network(case, 'backbone')
    images = case.arrays['in/images']
    bare = model.clone(pool='none', fc_norm=False)
    outputs = {'features': applied(model)(params, images), 'last_hidden_state': applied(bare)(params, images)}
    ported.compare_head(case, report, lambda images: model.apply({'params': params}, images))
    masked, weights, _ = network(case, 'mim')
    mask = case.arrays['in/bool_masked_pos']
    for name, hidden in (('unmasked', np.zeros_like(mask)), ('masked', mask)):
        (outputs[f'mim_logits_{name}'],) = applied(masked, 'masked_logits')(weights, images, hidden)
    at_mask = outputs['mim_logits_masked'][np.nonzero(mask)]
    losses = optax.softmax_cross_entropy_with_integer_labels(at_mask, jnp.asarray(case.arrays['in/mim_labels']))
    compare_outputs(case, report, outputs | {'mim_loss': losses.mean()}, but=('logits', 'loss', 'losses_sgd'))


def compare_outputs(case: Case, report: Report, ours: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    """Compares everything under `out/` that was not compared elsewhere."""
    for name, theirs in case.group('out').items():
        if name in but or name in report.errors:
            continue
        if name not in ours:
            raise Unsupported(f'array out/{name}')
        ported.close(report, f'out/{name}', ours[name], theirs)


def descent(case: Case, report: Report, loss: Callable, trained: dict, weights: dict[str, Weight], model: BEiT) -> None:
    """Compares loss, the gradient of every weight, and plain gradient descent on all of them.

    Args:
      case: the case, with a gradient for all of its weights.
      report: where differences go.
      loss: of `trained`.
      trained: the network's parameters; or those under 'network', and arrays under the case's names.
      weights: how the network's arrays come of the case's.
      model: the network.
    """
    step = jax.jit(jax.value_and_grad(loss), compiler_options=quick_compile())
    value, grads = step(trained)
    ported.close(report, 'out/loss', value, case.arrays['out/loss'])
    theirs, left = case.group('grad'), set(case.group('grad'))
    ours = flatten_dict(model.canonical(grads.get('network', grads)), sep='/')
    expected = {name: weight.layout(*(theirs[n] for n in weight.names)) for name, weight in weights.items()}
    left -= {n for weight in weights.values() for n in weight.names}
    for name in grads.keys() & left if 'network' in grads else ():
        ours[name], expected[name] = grads[name], theirs[name]
        left.discard(name)
    for name, array in expected.items():
        ported.close(report, f'grad/{name}', ours[name], array, 'grads')
    for name in sorted(left):
        report.fail(f'grad/{name} has no counterpart among our gradients')
    losses = []
    for _ in case.arrays['out/losses_sgd']:
        value, grads = step(trained)
        losses.append(value)
        trained = jax.tree.map(lambda p, g: p - case.meta['sgd_lr'] * g, trained, grads)
    report.compare('losses_sgd', 'out/losses_sgd', losses, case.arrays['out/losses_sgd'], rtol=ported.LOSSES_RTOL)
