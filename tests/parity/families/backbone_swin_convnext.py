"""Plain Swins and ConvNeXts, in both namings of each: maps, features, logits, gradients, descent on the head."""

from tests.parity import ported
from tests.parity.case import Case, Report, Unsupported

_KINDS = ('swin', 'convnext')
_OF_THE_HEAD = {'features', 'logits', 'loss', 'losses_sgd'}


def claims(case: Case) -> bool:
    """Cases of these networks without a method."""
    family = str(case.meta.get('family', '')).lower()
    return 'method' not in case.meta and any(kind in family for kind in _KINDS)


def run(case: Case, report: Report) -> None:
    """Compares everything that the case holds."""
    model, params = ported.build(case, image_size=case.arrays['in/images'].shape[1])
    features, seen = ported.run(model, params, case.arrays['in/images'])
    maps = seen | {'tokens': seen['encoded'], 'map': seen['encoded']}  # two names for what enters the readout
    out = case.group('out')
    if unknown := sorted(out.keys() - maps.keys() - _OF_THE_HEAD):
        raise Unsupported(f'array out/{unknown[0]}')
    ported.close(report, 'out/features', features, out['features'])
    for name in sorted(out.keys() & maps.keys()):
        ported.close(report, f'out/{name}', maps[name], out[name])
    ported.compare_head(case, report, lambda images: model.apply({'params': params}, images))
