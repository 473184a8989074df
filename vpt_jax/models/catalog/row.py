"""A row of the table of backbones."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt_jax.checkpoints import fetch
from vpt_jax.models.pixels import Pixels

_PICKLES = ('.pth', '.pt', '.bin', '.tar')
_NAMELESS = ('model', 'pytorch_model', 'flax_model', 'open_clip_model')

#: How a row's weights come to this machine: with the package, downloaded, downloaded by hand and converted, by hand.
PACKAGE, DOWNLOAD, CONVERT, BY_HAND = 'package', 'download', 'convert', 'by hand'

NONCOMMERCIAL = 'CC-BY-NC-4.0'


@dataclasses.dataclass(frozen=True)
class Row:
    """Published weights, and how they must be run.

    Attributes:
      source: address of the file (`checkpoints.fetch`); '' for weights in the package; 'page:' and an address where
        terms have to be accepted before a download.
      family: key of `models.families.FAMILIES`.
      network: settings that names and shapes of the file tell; a file that tells others is not this one.
      conventions: settings that no file tells or that are a matter of choice.
      pixels: what the images must look like.
      license: of the weights.
      note: one line: what was trained on what.
      mib: size of the file in MiB (2^20 bytes) where it is known.
      scheme: of `checkpoints.schemes`; None to recognise it.
      tower: which network of a file with several; '' for files with one.
      file: name in the cache; by default the last part of `source`, for files of the hub with their repository.
      known: how the digest of the published file starts ('md5:d9715d'), '' if nobody said.
      twins: other published files with the same weights, without their suffixes.
      resized: settings that resample what the file holds, to other images or patches than it was saved for.
    """

    source: str
    family: str
    network: Mapping[str, Any]
    conventions: Mapping[str, Any]
    pixels: Pixels
    license: str
    note: str
    mib: float | None = None
    scheme: str | None = None
    tower: str = ''
    file: str = ''
    known: str = ''
    twins: tuple[str, ...] = ()
    resized: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.file and self.source:
            object.__setattr__(self, 'file', self._default_file())

    def _default_file(self) -> str:
        if self.source.startswith('hf:'):
            return str(fetch.cached(self.source).relative_to(fetch.cache_folder()))
        last = self.source.rsplit('/', 1)[-1]
        return f'{stem(last)}.safetensors' if last.endswith(_PICKLES) else last

    @property
    def how(self) -> str:
        """How the weights come to this machine: `PACKAGE`, `DOWNLOAD`, `CONVERT` or `BY_HAND`."""
        if not self.source:
            return PACKAGE
        if self.source.startswith('page:'):
            return BY_HAND
        return CONVERT if self.source.endswith(_PICKLES) else DOWNLOAD

    @property
    def path(self) -> Path:
        """Where in the cache the file lies, or should."""
        return fetch.cache_folder() / self.file

    @property
    def url(self) -> str:
        """Address for a browser; '' for weights in the package."""
        return fetch.url(self.source.removeprefix('page:')) if self.source else ''

    @property
    def noncommercial(self) -> bool:
        """Whether the licence forbids commercial use."""
        return '-NC' in self.license

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the network, as it is run."""
        return {**self.network, **self.conventions, **self.resized}

    def is_at(self, address: str) -> bool:
        """Whether this is the row's file, or a repository of the hub with the row's file in it."""
        if self.source.startswith('hf:') and address.startswith('hf:'):
            (repo, file), (given, wanted) = fetch.hub_parts(self.source), fetch.hub_parts(address)
            return repo == given and (wanted or fetch.HUB_FILES[0]) == file
        return bool(self.source) and not address.startswith('hf:') and fetch.url(address) == self.url

    def is_named(self, path: str | Path) -> bool:
        """Whether a path ends in a name by which the published file is known, whatever its suffix or container."""
        last, names = stem(Path(path).name), {stem(self.source.rsplit('/', 1)[-1]), *self.twins}
        if self.source.startswith('hf:'):
            # 'model' says nothing; the folder of a clone does.
            names = {fetch.hub_parts(self.source)[0].split('/')[1], *self.twins}
            last = last if last not in _NAMELESS else Path(path).absolute().parent.name
        elif self.how == BY_HAND:
            names = {stem(self.file)}
        return bool(self.source) and last in names


def stem(name: str) -> str:
    """A weight file's name without its suffixes."""
    return re.sub(r'(\.(pth|pt|bin|tar|npz|safetensors|msgpack|json))+$', '', name)
