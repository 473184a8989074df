"""The labels that VTAB-1k makes of annotations, as VPT's code does (KMnP/vpt, `src/data/vtab_datasets`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vpt_jax.errors import UsageError

#: Bounds of the classes, "strictly above".
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
#: Car, van and truck are KITTI's first three types.
_VEHICLES = 3
_NO_VEHICLE = 1000.0
_DSPRITES_CLASSES = 16


def _highest_below(bounds: tuple[float, ...], value: float) -> int:
    """Index of the largest bound strictly below a value, compared in float32 as the original does."""
    below = np.flatnonzero(np.asarray(bounds, np.float32) < np.float32(value))
    if not len(below):
        raise UsageError(f'a distance of {value} is below {bounds[0]}, the lowest that has a class')
    return int(below[-1])


def clevr_count(objects: int) -> int:
    """Number of objects, 3 to 10, as a class 0 to 7."""
    return int(objects) - 3


def clevr_distance(depths: np.ndarray) -> int:
    """Distance of the closest object as a class 0 to 5; depths [objects] are the third pixel coordinates."""
    return _highest_below(CLEVR_DISTANCES, np.min(depths))


def kitti_distance(types: np.ndarray, depths: np.ndarray) -> int:
    """Distance of the closest vehicle: 0 up to 8 m, 1 up to 20 m, 2 farther, 3 no vehicle.

    Args:
      types: int [objects].
      depths: [objects], the third coordinates of their locations in metres.
    """
    vehicles = np.asarray(depths)[np.asarray(types) < _VEHICLES]
    return _highest_below(KITTI_DISTANCES, np.min(vehicles, initial=_NO_VEHICLE))


def dsprites(value: int, original: int) -> int:
    """One of `original` values as one of 16 classes: floor(value / (original / 16)), in float32 as the original."""
    return int(np.float32(value) // np.float32(original / _DSPRITES_CLASSES))


def _depths(rows: Any) -> np.ndarray:
    """The third column of [objects, 3], which may come as a list of rows and may be empty."""
    return np.asarray(rows, np.float32).reshape(-1, 3)[:, 2]


def of_clevr_count(example: Mapping[str, Any]) -> int:
    """`clevr_count` of TFDS's example."""
    return clevr_count(len(example['objects']['size']))


def of_clevr_distance(example: Mapping[str, Any]) -> int:
    """`clevr_distance` of TFDS's example."""
    return clevr_distance(_depths(example['objects']['pixel_coords']))


def of_kitti(example: Mapping[str, Any]) -> int:
    """`kitti_distance` of TFDS's example."""
    objects = example['objects']
    return kitti_distance(np.asarray(objects['type'], np.int64), _depths(objects['location']))


def of_dsprites_x(example: Mapping[str, Any]) -> int:
    """`dsprites` of the x position."""
    return dsprites(example['label_x_position'], 32)


def of_dsprites_orientation(example: Mapping[str, Any]) -> int:
    """`dsprites` of the orientation."""
    return dsprites(example['label_orientation'], 40)
