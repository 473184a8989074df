"""VPT's data pipelines: VTAB's label transforms and images, FGVC's evaluation images."""

import re
from collections.abc import Callable

import numpy as np

from tests.parity.case import Case, Report, Unsupported
from vpt_jax.data.benchmarks import labels
from vpt_jax.data.preprocess import IMAGENET, Preprocess, legacy_bilinear, normalise

# Pixels on the [0, 1] scale; normalising divides by about a quarter.
ATOL_PIXELS, ATOL_NORMALISED, ATOL_MOMENTS = 1e-6, 5e-6, 1e-5


def claims(case: Case) -> bool:
    """Cases whose arrays are annotations with labels, or images before and after."""
    names = list(case.meta.get('arrays', case.arrays))
    return bool(names) and any(
        name.startswith(('vtab_image/', 'clevr_', 'kitti/', 'dsprites_')) or name.endswith('out_uint8_before_normalise')
        for name in names
    )


def run(case: Case, report: Report) -> None:
    """Compares every output."""
    statistics = tuple(tuple(map(float, case.arrays.get(k, v))) for k, v in zip(('mean', 'std'), IMAGENET, strict=True))
    report.compare('statistics', 'mean, std', statistics, np.array(IMAGENET), 1e-6)
    for group in sorted({name.rpartition('/')[0] for name in case.arrays} - {''}):
        _reader(group)(case.group(group), group, report)


def _reader(group: str) -> Callable:
    readers = {
        'clevr_dist': _labels('in_min_depth', lambda depth: labels.clevr_distance(np.array([depth]))),
        'clevr_count': _labels('in_num_objects', labels.clevr_count),
        'kitti': _kitti,
    }
    if group.startswith('dsprites_'):
        return _dsprites
    if re.fullmatch(r'vtab_image/.+', group):
        return _vtab_image
    if re.fullmatch(r'\d+|fgvc_image/.+', group):
        return _fgvc_image
    if group not in readers:
        raise Unsupported(f'arrays {group}/...')
    return readers[group]


def _labels(name: str, label: Callable) -> Callable:
    def run(arrays: dict, group: str, report: Report) -> None:
        report.compare('labels', f'{group}/label', [label(value) for value in arrays[name]], arrays['label'])

    return run


def _kitti(arrays: dict, group: str, report: Report) -> None:
    rows = zip(arrays['in_type_padded_-1'], arrays['in_z_padded_nan'], strict=True)
    ours = [labels.kitti_distance(types[types >= 0], depths[types >= 0]) for types, depths in rows]
    report.compare('labels', f'{group}/label', ours, arrays['label'])


def _dsprites(arrays: dict, group: str, report: Report) -> None:
    # Every value of the attribute occurs, so the largest tells how many there are.
    original = {'dsprites_orientation': 40, 'dsprites_x_position': 32}.get(group) or int(arrays['in'].max()) + 1
    ours = [labels.dsprites(value, original) for value in arrays['in']]
    report.compare('labels', f'{group}/label', ours, arrays['label'])


def _vtab_image(arrays: dict, group: str, report: Report) -> None:
    image, theirs = arrays['in_uint8'], arrays['out_01']
    preprocess = Preprocess(len(theirs), 'vtab')
    exact = legacy_bilinear(image, preprocess.size) / 255
    report.compare('pixels', f'{group}/out_01', exact, theirs, ATOL_PIXELS)
    normalised = normalise(exact, preprocess.mean, preprocess.std)
    report.compare('normalised', f'{group}/out_normalised', normalised, arrays['out_normalised'], ATOL_NORMALISED)
    # What training reads is rounded to whole grey levels: half a level, and no more.
    report.compare('rounded', f'{group}/out_01', preprocess.decode(image) / 255, theirs, 0.5 / 255 + ATOL_PIXELS)


def _fgvc_image(arrays: dict, group: str, report: Report) -> None:
    theirs = arrays['out_uint8_before_normalise']
    preprocess = Preprocess(len(theirs), 'fgvc', 'fgvc')
    view = preprocess.eval_view(preprocess.decode(arrays['in_uint8']))
    report.compare('crop', f'{group}/out_uint8_before_normalise', view, theirs)
    normalised = np.asarray(normalise(view, preprocess.mean, preprocess.std))
    moments = [normalised.mean(dtype=np.float64), normalised.std(dtype=np.float64)]
    for name, expected in arrays.items():
        corner = re.fullmatch(r'out_normalised_corner(\d+)x(\d+)', name)
        if corner:
            ours = normalised[: int(corner[1]), : int(corner[2])]
            report.compare('normalised', f'{group}/{name}', ours, expected, ATOL_NORMALISED)
        elif name == 'out_normalised':
            report.compare('normalised', f'{group}/{name}', normalised, expected, ATOL_NORMALISED)
        elif name == 'out_mean_std':
            report.compare('moments', f'{group}/{name}', moments, expected, ATOL_MOMENTS)
        elif name not in ('in_uint8', 'out_uint8_before_normalise'):
            raise Unsupported(f'array {group}/{name}')
