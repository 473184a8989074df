"""Visual prompting for frozen vision models in JAX and Flax."""

from vpt_jax import data, methods
from vpt_jax.errors import UsageError
from vpt_jax.models.zoo import Backbone, backbones, load_backbone
from vpt_jax.training.compiled import keep_compiled
from vpt_jax.training.inference import Trained, load_trained
from vpt_jax.training.loop import DivergedError, Result, fit
from vpt_jax.training.probe import linear_probe
from vpt_jax.training.recipe import Recipe
from vpt_jax.training.stopping import StoppedError
from vpt_jax.version import __version__

__all__ = ['Backbone', 'DivergedError', 'Recipe', 'Result', 'StoppedError', 'Trained', 'UsageError', '__version__',
           'backbones', 'data', 'fit', 'keep_compiled', 'linear_probe', 'load_backbone', 'load_trained',
           'methods']  # fmt: skip
