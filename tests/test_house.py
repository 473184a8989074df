"""The rules of the house that a linter does not know: file sizes, the arrows between rooms, no unpickling."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ('vpt_jax', 'configs', 'experiments', 'tests') for p in (ROOT / folder).rglob('*.py'))
PACKAGE = [p for p in FILES if p.is_relative_to(ROOT / 'vpt_jax')]

#: What each room may import of the package, besides `errors`.
ARROWS = {
    'data': set(),
    'checkpoints': set(),
    'models': {'checkpoints'},
    'methods': {'models'},
    'training': {'data', 'checkpoints', 'models', 'methods'},
    'bench': {'data', 'checkpoints', 'models', 'methods', 'training', 'cli'},
    'assets': set(),
}


def imported(path):
    """Dotted names under `vpt_jax` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'vpt_jax':
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split('.')[0] == 'vpt_jax')


def module_of(name, known):
    """The module that a dotted name is, or is in."""
    while name not in known and '.' in name:
        name = name.rsplit('.', 1)[0]
    return name


def test_files_are_short():
    assert not [str(p) for p in FILES if len(p.read_text().splitlines()) > 400]


def test_a_method_can_be_read_in_one_sitting():
    methods = {p for p in (ROOT / 'vpt_jax' / 'methods').glob('*.py') if p.name != 'base.py'}  # that is the mechanism
    assert not [p.name for p in methods if len(p.read_text().splitlines()) >= 200]


@pytest.mark.parametrize('room', ARROWS)
def test_arrows_between_rooms_point_one_way(room):
    for path in (ROOT / 'vpt_jax' / room).rglob('*.py'):
        for name in imported(path):
            target = name.split('.')[1] if '.' in name else ''
            assert target in ARROWS[room] | {room, 'errors'}, f'{path.relative_to(ROOT)} imports {name}'


def test_no_import_cycle():
    names = {'.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): p for p in PACKAGE}
    graph = {name: {module_of(i, names) for i in imported(path)} - {name} for name, path in names.items()}
    # A package imports its own modules, and they may name the package's other modules through it.
    graph = {n: {m for m in found if not (n + '.').startswith(m + '.')} for n, found in graph.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(names)


def test_nothing_unpickles():
    bad = re.compile(r'\bpickle\b(?!s)|allow_pickle=True|torch\.load')
    found = [str(p.relative_to(ROOT)) for p in PACKAGE for line in p.read_text().splitlines()
             if bad.search(line) and not line.strip().startswith(('#', '"', "'")) and 'import' in line]  # fmt: skip
    assert not found


def test_every_config_builds_its_method():
    from vpt_jax import methods
    from vpt_jax.training import config as configs

    for path in sorted((ROOT / 'configs').glob('*.py')):
        scope: dict = {}
        exec(compile(path.read_text(), path, 'exec'), scope)
        for arg in (None, 'dataset=folder:x,backbone=vit_b16_in21k'):
            config = scope['get_config'](arg)
            assert isinstance(configs.build_method(config.method), methods.Method), path
            configs.recipe(config)
