"""Lists the published backbones: `python -m vpt_jax.zoo [siglip mae_b16 ...]`.

Arguments are parts of names; without any, all are listed: name, size of the file, whether it is in the cache, licence,
and what it is. Any of the names goes where a backbone is asked for (`--backbone=NAME`, `vj.load_backbone('NAME')`).
"""

from absl import flags

from vpt_jax import cli
from vpt_jax.checkpoints import fetch
from vpt_jax.models import catalog
from vpt_jax.models.catalog import listing


def main(*parts: str, markdown: bool) -> None:
    """Prints the table; the flags' help says what the arguments are."""
    rows = catalog.rows()
    for part in parts:
        if not any(part in name for name in rows):
            raise catalog.unknown_name(part)
    chosen = {name: row for name, row in rows.items() if not parts or any(part in name for part in parts)}
    if markdown:
        print(listing.markdown(chosen))
    else:
        print(listing.text(chosen))
        print(f'\n{len(chosen)} backbones; the cache is {fetch.cache_folder()}')


def _flags() -> list[flags.FlagHolder]:
    return [flags.DEFINE_boolean('markdown', False, 'print the table of docs/backbones.md')]


if __name__ == '__main__':
    cli.run_with_flags(main, __doc__, _flags(), takes_arguments=True)
