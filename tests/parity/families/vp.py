"""VP's pixel prompts of both families, the mappings of labels, and whole training loops with a mapping every epoch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import adapted, ported
from tests.parity.case import Case, Report, Unsupported
from tests.parity.prompted import quick_compile
from tests.parity.torch_names import image
from vpt_jax.checkpoints.source import ArraySource
from vpt_jax.methods import VP, CLIPHead, Context, LabelMapping, Stack, forward
from vpt_jax.methods.base import features
from vpt_jax.methods.vp import frame_mask
from vpt_jax.models.pixels import IMAGENET
from vpt_jax.training import optimizer as optimizers
from vpt_jax.training import schedule

_KINDS = {'padding': 'pad', 'fixed_patch': 'fixed_patch', 'random_patch': 'random_patch', 'expansive': 'expansive',
          'additive': 'additive'}  # fmt: skip
_PIXELS = (IMAGENET.mean, IMAGENET.std)
# Adam divides a gradient by its own size, so a loop amplifies rounding.
_LOOP_RTOL, _LOOP_ATOL = 1e-3, 2e-2


def claims(case: Case) -> bool:
    """Cases of both repositories."""
    return str(case.meta.get('what', '')).startswith(('VP ', 'ILM-VP ', 'frequency label mapping'))


def run(case: Case, report: Report) -> None:
    """Compares every array."""
    if 'in/source_logits' in case.arrays:
        done = _compare_mapping(case, report)
    elif 'out/mappings' in case.arrays:
        done = _compare_loop(case, report)
    else:
        done = _compare_prompt(case, report)
    adapted.check_complete(case, report, done)


def _method(case: Case) -> VP:
    config = case.config
    kind = config.get('method') or config.get('kind') or 'expansive'
    if kind not in _KINDS:
        raise Unsupported(f'kind of prompt {kind!r}')
    if kind != 'expansive':
        return VP(kind=_KINDS[kind], size=config.get('prompt_size', config.get('pad')))
    mask = case.arrays.get('in/mask')
    rows = () if mask is None or not mask.any() else tuple(''.join(str(int(v)) for v in row) for row in mask)
    if mask is not None and not np.isin(mask, (0, 1)).all():
        raise Unsupported('a mask of other numbers than 0 and 1')
    return VP(kind='expansive', inner=config['inner'], mask=rows)


def _chw(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.transpose(1, 2, 0)


def _resnet(case: Case):
    """The network with the case's classifier behind it."""
    weights = case.group('backbone') | {f'fc.{leaf}': case.arrays[f'head/{leaf}'] for leaf in ('weight', 'bias')}
    source = ArraySource(weights, case.name)
    return ported.build(case, source=source, image_size=case.config['res'], classes=case.config['ncls'])


def _unit(images: np.ndarray) -> np.ndarray:
    return ((images - np.array(IMAGENET.mean)) / np.array(IMAGENET.std)).astype(np.float32)


def _compare_prompt(case: Case, report: Report) -> set[str]:
    """A prompt on either network: the prompted images, scores, gradients, gradient descent."""
    method, config = _method(case), case.config
    if config['bb'] == 'clip':
        (model, params), head = ported.build(case, heads=config['heads']), CLIPHead()
        texts = case.arrays['head/text_features']
        texts = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        held, targets = {'texts': texts, 'scale': case.arrays['head/logit_scale']}, config['ncls']
    else:
        (model, params), head = _resnet(case), LabelMapping(mapping='first')
        held, targets = {}, config['ntarget']
    mapping = case.arrays.get('in/mapping', np.arange(targets))
    Stack(method, head if isinstance(head, LabelMapping) else dataclasses.replace(head, texts='given')).check(model)
    state = {head.name: {**held, 'mapping': mapping.astype(np.int32)[:, None]}}
    if 'in/location_xy' in case.arrays:
        state['vp'] = {'location': case.arrays['in/location_xy'].astype(np.int32)}
    if 'method/program' in case.arrays:
        names = {'vp/program': (['method/program'], _chw)}
    else:
        parts = ('patch',) if 'method/patch' in case.arrays else ('up', 'down', 'left', 'right')
        names = {f'vp/{p}': ([f'method/{p}' if p == 'patch' else f'method/pad_{p}'], image) for p in parts}
    prompts = {name.removeprefix('vp/'): layout(case.arrays[theirs[0]], ()) for name, (theirs, layout) in names.items()}
    prompted = adapted.adapt(model, (method, head), params, {'vp': prompts, head.name: {}}, state, pixels=_PIXELS)
    if method.kind == 'expansive':
        case = dataclasses.replace(case, arrays=case.arrays | {'in/images': _unit(case.arrays['in/images'])})
    done = adapted.compare(case, report, prompted, names, rate=case.meta['sgd_lr'])
    adapted.check_count(report, prompted, case.meta['n_trainable'])
    outputs = _outputs(case, method, prompted, config['res'])
    for name in ('prompted_images', 'prompt_canvas', 'full_mask', 'source_logits'):
        if f'out/{name}' in case.arrays:
            ported.close(report, f'out/{name}', outputs[name](), case.arrays[f'out/{name}'], 'input')
            done.add(f'out/{name}')
    return done


def _outputs(case: Case, method: VP, prompted, side: int) -> dict:
    """What a prompt makes of the images, by the names of the cases."""
    prompts, ctx = prompted.prompts['vp'], Context(state=prompted.state.get('vp'), pixels=_PIXELS)
    images = jnp.asarray(case.arrays['in/images'])
    inner = images.shape[1] if method.kind == 'expansive' else side - 2 * method.size
    return {
        'prompted_images': lambda: method.pixels(prompts, images, ctx),
        'prompt_canvas': lambda: method.canvas(prompts, side, ctx)[None],
        'full_mask': lambda: np.repeat(frame_mask(side, inner, method.mask), 3, axis=-1),
        'source_logits': lambda: prompted.value_and_grad()(prompted.trained, images, case.arrays['in/labels'])[0][1][1][
            'features'
        ],
    }


def _compare_mapping(case: Case, report: Report) -> set[str]:
    """Counts, and what the greedy assignment makes of them."""
    config, out = case.config, case.group('out')
    scores, labels = jnp.asarray(case.arrays['in/source_logits']), jnp.asarray(case.arrays['in/labels'])
    count = config['mapping_num']
    head = LabelMapping(mapping='frequency', per_class=count)
    state = {'mapping': jnp.zeros((config['target'], count), jnp.int32)}
    sums = head.observe({}, scores, labels, Context(state=state))
    state = head.conclude(0, state, jax.device_get(sums))
    mapping = np.asarray(state['mapping'])
    matrix = np.zeros((config['source'], config['target']), np.int32)
    matrix[mapping, np.arange(config['target'])[:, None]] = 1
    ours = {'dist_matrix': sums['counts'], 'mapping_matrix': matrix, 'mapping_sequence': mapping.reshape(-1),
            'mapped_logits': scores[:, mapping.reshape(-1)],
            'independent_argmax': sums['counts'].argmax(0)}  # fmt: skip
    if count == 1:
        logits = head.logits({}, scores, Context(state=state))
        ours['loss'] = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    for name, theirs in out.items():
        if name not in ours:
            raise Unsupported(f'array out/{name}')
        exact = theirs.dtype.kind == 'i'
        report.compare('mapping' if exact else name, f'out/{name}', ours[name], theirs, atol=0.0 if exact else 1e-6)
    return {f'out/{name}' for name in out}


def _compare_loop(case: Case, report: Report) -> set[str]:
    """Training with Adam and a mapping that is renewed before epochs, step by step."""
    config, out = case.config, case.group('out')
    model, params = _resnet(case)
    vp, head = _method(case), LabelMapping(mapping='iterative', every=config['interval'])
    method = Stack(vp, head)
    method.check(model)
    prompts = {'vp': {'program': jnp.asarray(_chw(case.arrays['method/program'], ()))}, head.name: {}}
    state = {head.name: {'mapping': jnp.zeros((config['ntarget'], 1), jnp.int32)}}
    images, labels = jnp.asarray(_unit(case.arrays['in/images'])), jnp.asarray(case.arrays['in/labels'])
    optimizer = optimizers.build('adamw', config['lr'], 0.0)
    opt_state = optimizer.init(prompts)

    @jax.jit
    def observe(prompts, state):
        found, ctx = features(model, method, params, prompts, images, state=state, pixels=_PIXELS)
        return method.observe(prompts, found, labels, ctx), found

    def loss(prompts, state, images, labels):
        logits, _ = forward(model, method, params, prompts, images, state=state, pixels=_PIXELS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step = jax.jit(jax.value_and_grad(loss), compiler_options=quick_compile())
    rates = schedule.rate('multistep', np.arange(config['epochs']), config['lr'], 0, config['epochs'], 1)
    losses, mappings, size = [], [], config['bs']
    for epoch in range(config['epochs']):
        if method.observes(epoch):
            state = method.conclude(epoch, state, jax.device_get(observe(prompts, state)[0]))
        mappings.append(np.asarray(state[head.name]['mapping'])[:, 0])
        opt_state = optimizers.with_learning_rate(opt_state, rates[epoch])
        for start in range(0, len(images), size):
            batch = slice(start, start + size)
            value, grads = step(prompts, state, images[batch], labels[batch])
            updates, opt_state = optimizer.update(grads, opt_state, prompts)
            prompts = optax.apply_updates(prompts, updates)
            losses.append(value)
    scores = observe(prompts, state)[1]
    logits = scores[:, mappings[-1]]
    report.compare('mapping', 'out/mappings', np.stack(mappings), out['mappings'])
    report.compare('rates', 'out/lr_per_epoch', rates, out['lr_per_epoch'], rtol=1e-5)
    report.compare('losses', 'out/losses', np.stack(losses), out['losses'], rtol=_LOOP_RTOL)
    loose = {'program_final': prompts['vp']['program'].transpose(2, 0, 1), 'source_logits_final': scores,
             'logits_final': logits, 'accuracy_final': (logits.argmax(-1) == labels).mean()}  # fmt: skip
    for name, ours in loose.items():
        report.compare('final', f'out/{name}', ours, out[name], atol=_LOOP_ATOL)
    return {f'out/{name}' for name in ('mappings', 'lr_per_epoch', 'losses', *loose)}
