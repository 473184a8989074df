"""VPT, VAPT and VPT's baselines on Google ViTs and ConvNets: features, gradients, five steps of gradient descent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from tests.parity.case import Case, Report, Unsupported
from tests.parity.options import known_transfer_type, transfer_type
from tests.parity.prompted import Prompted, in_vits_names, prepare, references

ATOL, GRAD_RTOL, LOSSES_RTOL = 2e-5, 1e-4, 1e-3
_CONVNETS, _VITS = ('resnet', 'convnext'), (None, 'mae', 'moco')


def claims(case: Case) -> bool:
    """Cases that name a transfer type of VPT and VPT's options; on a ConvNet, a location of prompts instead."""
    plain = 'options' in case.config and 'optimizer' not in case.config and case.config.get('backbone') in _VITS
    convnet = case.config.get('backbone') in _CONVNETS and 'location' in case.config
    return (plain or convnet) and known_transfer_type(transfer_type(case))


def run(case: Case, report: Report) -> None:
    """Compares everything that the case holds."""
    case = in_vits_names(case)
    prompted = prepare(case)
    step = prompted.value_and_grad()
    images, labels = jnp.asarray(case.arrays['in/images']), jnp.asarray(case.arrays['in/labels'])
    (loss, (logits, seen)), grads = step(prompted.trained, images, labels)
    outputs = {'features': lambda: seen['features'], 'logits': lambda: logits, 'loss': lambda: loss,
               'padded_input': lambda: seen['input'], 'adaptive_prompts': lambda: _adaptive_prompts(seen),
               'losses_sgd': lambda: _descend(case, prompted, step, images, labels)}  # fmt: skip
    for name, theirs in case.group('out').items():
        if name not in outputs:
            raise Unsupported(f'array out/{name}')
        tolerance = {'rtol': LOSSES_RTOL} if name == 'losses_sgd' else {'atol': ATOL}
        report.compare(name, f'out/{name}', outputs[name](), theirs, **tolerance)
    _compare_gradients(case, prompted, grads, report)
    _compare_trainables(case, prompted, report)


def _adaptive_prompts(seen: dict) -> np.ndarray:
    """[J, B, P, D] of the adaptive blocks, in order."""
    blocks = {int(name.split('_')[1]): a for name, a in seen['vapt'].items() if name.startswith('adaptive_')}
    return np.stack([blocks[j] for j in sorted(blocks)])


def _descend(case: Case, prompted: Prompted, step: Any, images: jax.Array, labels: jax.Array) -> np.ndarray:
    """The loss before each step of plain gradient descent."""
    rate, trained, losses = case.meta['sgd_lr'], prompted.trained, []
    for _ in case.arrays['out/losses_sgd']:
        (loss, _), grads = step(trained, images, labels)
        losses.append(loss)
        trained = jax.tree.map(lambda p, g: p - rate * g, trained, grads)
    return np.stack(losses)


def _compare_gradients(case: Case, prompted: Prompted, grads: dict, report: Report) -> None:
    theirs, google = case.group('grad'), case.group('grad_google')
    absent = set(case.meta.get('unused_trainable', ()))
    left = {f'grad/{n}' for n, a in theirs.items() if a.size} | {f'grad_google/{n}' for n in google}
    flat = flatten_dict(grads)
    for path, (layout, names, stacked, google_name) in references(prompted, set(theirs) | absent).items():
        ours = np.asarray(flat[path])
        if google_name in google:
            report.compare('grads', f'grad_google/{google_name}', ours, google[google_name], ATOL, GRAD_RTOL)
            left.discard(f'grad_google/{google_name}')
            continue
        for part, name in zip(ours if stacked else [ours], names, strict=True):
            if name in theirs:
                expected = layout(theirs[name], part.shape)
                left.discard(f'grad/{name}')
            elif name in absent:
                expected = np.zeros(part.shape)
            else:
                report.fail(f'our {"/".join(path)} is trained, but the case has no gradient of {name}')
                continue
            report.compare('grads', f'grad/{name}', part, expected, ATOL, GRAD_RTOL)
    for name in sorted(left):
        report.fail(f'{name} has no counterpart among our gradients')


def _compare_trainables(case: Case, prompted: Prompted, report: Report) -> None:
    """The same parameters must be trained, and none of the case's weights may be left over."""
    known_unused = set(case.meta.get('unused_trainable', ()))
    for name in sorted(set(prompted.unused) - known_unused):
        report.fail(f'{name} is a weight of the case that our method has no place for')
    if 'trainable' in case.meta:
        theirs = set(case.meta['trainable'])
        ours = {name for _, names, *_ in references(prompted, theirs).values() for name in names}
        empty = {name for name, a in case.group('method').items() if not a.size}
        for name in sorted(ours ^ (theirs - (known_unused - ours) - empty)):
            report.fail(f'{name} is trained by {"us" if name in ours else "the reference"} only')
    if 'n_trainable' in case.meta:
        count = sum(leaf.size for leaf in jax.tree.leaves(prompted.trained))
        count += sum(a.size for name, a in prompted.unused.items() if name in known_unused)
        if count != case.meta['n_trainable']:
            report.fail(f'{count} parameters are trained, expected {case.meta["n_trainable"]}')
