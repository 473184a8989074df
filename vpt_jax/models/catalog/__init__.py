"""The table of published backbones: what their files are, where they lie, and how they must be run.

Weights do not tell their conventions (activation, epsilon, pooling, input), so each row holds them. The rows are
generated from small tables, one module a world: Google's JAX releases, and what comes from PyTorch.
"""

import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from vpt_jax.errors import UsageError, unknown
from vpt_jax.models.catalog import google, hub
from vpt_jax.models.catalog.row import BY_HAND, CONVERT, DOWNLOAD, NONCOMMERCIAL, PACKAGE, Row
from vpt_jax.models.pixels import HALF

__all__ = ['BY_HAND', 'CONVERT', 'DOWNLOAD', 'NONCOMMERCIAL', 'PACKAGE', 'Row', 'of_address', 'of_file', 'rows',
           'unknown_name']  # fmt: skip


@cache
def rows() -> Mapping[str, Row]:
    """Every published backbone by name, in a sensible order."""
    network = google.vit('Ti', 16, 64, depth=6)
    tiny = Row('', 'vit', network, {'activation': 'gelu_tanh'}, HALF, 'Apache-2.0',
               'small ViT for 64-pixel images, in the package', 5.4)  # fmt: skip
    table = {'tiny_vit64': tiny}
    for name, row in (*google.rows(), *hub.rows()):
        if name in table:
            raise ValueError(f'two rows of the table of backbones are called {name}')
        table[name] = row
    return types.MappingProxyType(table)


def unknown_name(name: str) -> UsageError:
    """The error for a name that no row has: the nearest ones, or where to find them."""
    error = unknown('backbone', name, rows())
    if 'did you mean' in str(error):
        return error
    return UsageError(f'unknown backbone {name!r}: python -m vpt_jax.zoo lists them; a path or an address does too')


def of_file(path: str | Path) -> tuple[str, Row] | None:
    """The row whose published file is called like this one; of two conventions, the first."""
    return next((item for item in rows().items() if item[1].is_named(path)), None)


def of_address(address: str) -> tuple[str, Row] | None:
    """The row of a published address ('gs://...', 'hf:owner/name'); of two conventions, the first."""
    return next((item for item in rows().items() if item[1].is_at(address)), None)
