"""One network in every container and spelling: each file must give the same weights, or be refused if it is evil."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tests.parity import ported
from tests.parity.case import Case, Report, Unsupported
from vpt_jax.checkpoints import containers, scheme
from vpt_jax.checkpoints.source import ArraySource, Source
from vpt_jax.errors import UsageError
from vpt_jax.models import loading

#: What an evil file sets if it is let to.
EVIL = 'VPTJAX_EVIL_RAN'
# Not the case's network: a test of the reader alone.
_OTHERS = ('strided_views.pth',)


def claims(case: Case) -> bool:
    """Cases of containers and of forms."""
    family = str(case.meta.get('family', ''))
    return 'files' in case.meta and 'method' not in case.meta and ('container' in family or ' form' in family)


def run(case: Case, report: Report) -> None:
    """Compares weights and outputs of every file."""
    heads = next((case.config[key] for key in ('num_heads', 'heads') if key in case.config), None)
    settings = {'heads': heads} if heads else {}
    reference = _loaded(ArraySource(case.group('backbone'), case.name), settings)
    _compare_outputs(case, report, 'backbone', *reference)
    paths = _files(case)
    if not paths:
        raise Unsupported('its weight files are not beside it')
    for path in paths:
        path, tower = containers.split_tower(path)
        name = Path(path).name
        try:
            with containers.opened(path, pickles=True) as file:
                if name in _OTHERS:
                    continue
                model, params = _loaded(file, {**settings, **({'tower': tower} if tower else {})})
        except UsageError as error:
            _check_refusal(report, name, str(error), case.meta['files'])
            continue
        if name.startswith(('evil_', 'bad_')):
            report.fail(f'{name} was read')
        elif not _same_weights(report, name, reference, (model, params)):
            _compare_outputs(case, report, name, model, params)
    if os.environ.get(EVIL):
        report.fail(f'an evil file ran: {EVIL} is set')


def _files(case: Case) -> list[str]:
    """The paths to load, towers included."""
    files = case.meta['files']
    folder = case.folder / case.name
    if folder.is_dir():
        return sorted(str(path) for path in folder.iterdir())
    if isinstance(files, Mapping):
        files = [note['load_path'] for note in files.values() if isinstance(note, Mapping) and 'load_path' in note]
    found = [str(case.folder / name) for name in files]
    return [path for path in found if Path(containers.split_tower(path)[0]).exists()]


def _loaded(source: Source, settings: Mapping[str, Any]) -> tuple[Any, dict]:
    part, plan = scheme.port(source, hints=settings)
    return loading.build(part, plan, **{name: value for name, value in settings.items() if name != 'tower'})


def _check_refusal(report: Report, name: str, message: str, files: Any) -> None:
    """A file may be refused if it is evil or damaged, if torch refuses it too, or if torch is not here."""
    said = files.get(name, '') if isinstance(files, Mapping) else ''
    refused = 'REFUSED' in str(said) or 'Error' in str(said)
    shard = name.startswith('model-0')  # half of a network
    without_torch = importlib.util.find_spec('torch') is None and 'vpt_jax[torch]' in message
    if not (refused or shard or without_torch):
        report.fail(f'{name} is refused: {message}')
    report.errors.setdefault('refused', 0.0)


def _same_weights(report: Report, name: str, reference: tuple[Any, dict], found: tuple[Any, dict]) -> bool:
    """Whether a file has the reference's weights, rounded to what it stores; False if it spells them differently."""
    theirs, ours = (flatten_dict(params, sep='/') for _, params in (reference, found))
    if reference[0] != found[0] or any(ours[key].shape != theirs[key].shape for key in theirs):
        return False
    kinds = {'bfloat16': jax.numpy.bfloat16, 'float16': np.float16}
    stored = next((kind for word, kind in kinds.items() if word in name), np.float32)
    for key, array in theirs.items():
        report.compare('weights', f'{name} {key}', ours[key], np.asarray(array).astype(stored).astype(np.float32),
                       atol=1e-12)  # fmt: skip
    return True


def _compare_outputs(case: Case, report: Report, name: str, model: Any, params: dict) -> None:
    features, seen = ported.run(model, params, case.arrays['in/images'])
    kernel, bias = (case.group('backbone')[key] for key in _head_of(case))
    kernel = kernel.T if 'head.weight' in case.group('backbone') else kernel
    outputs = {'features': features, 'encoded': seen['encoded'], 'tokens': seen['encoded'],
               'logits': np.asarray(features) @ kernel + bias}  # fmt: skip
    for key, theirs in case.group('out').items():
        if key not in outputs:
            raise Unsupported(f'array out/{key}')
        ported.close(report, f'out/{key}', outputs[key], theirs)
        if report.failures:
            report.fail(f'(file {name})')
            return


def _head_of(case: Case) -> tuple[str, str]:
    return ('head.weight', 'head.bias') if 'backbone/head.weight' in case.arrays else ('head/kernel', 'head/bias')
