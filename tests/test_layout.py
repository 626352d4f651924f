"""The layers of the package: what may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / 'byol_jax'

# From the top down: a part imports only itself and those after it.
ORDER = (
    '__main__',
    'app',
    'evaluation',
    'interop',
    'training',
    'methods',
    'input',
    'models',
    'views',
    'sources',
    'settings',
    'names',
    'values',
    'files',
    'cores',
    'errors',
    'lazy',
)
FILES = sorted(PACKAGE.rglob('*.py'))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path: Path) -> list[str]:
    """The dotted names of all modules that a file imports anywhere."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return names


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    """A part of the package never imports one above it."""
    if path == PACKAGE / '__init__.py':
        return
    assert part(path) in ORDER, f'{path}: give its part a place in ORDER'
    for name in imports(path):
        names = name.split('.')
        if names[0] == 'byol_jax' and names[1] in ORDER:
            assert ORDER.index(names[1]) >= ORDER.index(part(path)), f'{path} imports {name}'


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_tensorflow_stays_in_the_input(path):
    """Only sources/ and input/ import TensorFlow: encoders load without it."""
    if part(path) not in ('sources', 'input'):
        assert not [n for n in imports(path) if n.split('.')[0].startswith('tensorflow')]


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_application_prints(path):
    """Below app/, nothing prints, reads flags or ends the process."""
    if part(path) in ('app', '__main__'):
        return
    calls = [
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    assert not [
        call for call in calls if isinstance(call, ast.Name) and call.id in ('print', 'exit')
    ]
    assert not [name for name in imports(path) if name.split('.')[0] in ('absl', 'ml_collections')]


def test_orbax_stays_in_checkpoint():
    """Only app/checkpoints.py imports Orbax."""
    users = [path for path in FILES if any(n.startswith('orbax') for n in imports(path))]
    assert users == [PACKAGE / 'app' / 'checkpoints.py']


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path):
    """A file has one concept, so it is short."""
    assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize('folder', ['byol_jax', 'configs', 'examples', 'benchmarks'])
def test_only_one_file_counts_cores(folder):
    """cores.py counts those that the process may use; `os` tells how many the machine has."""
    for path in (ROOT / folder).rglob('*.py'):
        if path != PACKAGE / 'cores.py':
            assert 'cpu_count' not in path.read_text(), path


def test_every_config_key_has_a_comment():
    """Each key in configs/default.py has a comment beside it."""
    for line in (ROOT / 'configs' / 'default.py').read_text().splitlines():
        code = line.strip()
        sets_key = '=' in code and code.split('.')[0] in (
            'config',
            'data',
            'views',
            'view',
            'encoder',
            'optimizer',
            'checkpoint',
            'log',
            'evaluate',
        )
        section = 'ConfigDict()' in code
        default_of_placeholder = code.endswith(
            ('_epochs = 300.0', '_epochs = 10.0', '_epochs = 1.0')
        )
        if sets_key and not section and not default_of_placeholder and '.lock()' not in code:
            assert '  # ' in line or 'view1' in code or 'view2' in code, line


def test_no_test_file_imports_from_another():
    """What several test files share is in separate modules in tests/."""
    for path in (ROOT / 'tests').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or '').startswith('test_'), f'{path}: {node.module}'
