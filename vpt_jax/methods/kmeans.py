"""K-means that gives the same centers on every machine, for prompts that start as centers of tokens (`SPT`).

Shapes: M points, P centers, D width.
"""

import numpy as np


def lloyd(points: np.ndarray, centers: np.ndarray, max_steps: int = 300) -> tuple[np.ndarray, np.ndarray, int]:
    """Lloyd's k-means in float64 from given centers, until no point changes its center.

    A center that loses all its points moves to the point that is farthest from its own center, as in scikit-learn.

    Args:
      points: [M, D]; centers: [P, D]; max_steps: updates of the centers at most.

    Returns:
      (centers float64 [P, D], the center of every point [M], number of steps, the last of which changes nothing).
    """
    points, centers = np.asarray(points, np.float64), np.array(centers, np.float64)
    squares, labels = np.square(points).sum(1), None
    for step in range(1, max_steps + 1):
        distances = squares[:, None] - 2 * points @ centers.T + np.square(centers).sum(1)
        before, labels = labels, distances.argmin(1)
        if before is not None and (before == labels).all():
            return centers, labels, step
        counts = np.bincount(labels, minlength=len(centers))
        filled = counts > 0
        centers[filled] = (np.eye(len(centers))[labels].T @ points)[filled] / counts[filled, None]
        if not filled.all():
            far = np.argsort(-distances.min(1), kind='stable')
            centers[~filled] = points[far[: (~filled).sum()]]
    return centers, labels, max_steps
