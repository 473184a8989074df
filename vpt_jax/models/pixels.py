"""What a backbone's input must look like; one convention a source of weights."""

import dataclasses
from typing import Any

import numpy as np

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What a backbone's input must look like.

    Attributes:
      mean, std: subtracted from, and divided into, the channels of images in [0, 1].
      resize: how images get their size, a name that `data.Preprocess` knows: 'vtab', 'bicubic' or 'fgvc'.
    """

    mean: Triple
    std: Triple
    resize: str

    def normalise(self, images: Any) -> Any:
        """Images in [0, 1], channels last, as the backbone takes them; numpy or jax."""
        return (images - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


#: ImageNet's mean and standard deviation, resized as VPT's VTAB-1k protocol does.
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 'vtab')
#: Pixels in [-1, 1], as Google's ViTs were trained.
HALF = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 'bicubic')
#: CLIP's mean and standard deviation (arXiv 2103.00020).
CLIP = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 'bicubic')

PIXELS = {'imagenet': IMAGENET, 'half': HALF, 'clip': CLIP}
