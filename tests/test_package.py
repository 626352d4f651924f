"""The installed package: its packages, files and dependencies are each declared once."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
SETUPTOOLS = PROJECT['tool']['setuptools']


def requirements(name: str) -> list[str]:
    lines = [line.partition('#')[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_every_package_is_installed():
    """pyproject.toml lists each folder of byol_jax/, and the recipes."""
    files = [path for path in (ROOT / 'byol_jax').rglob('*') if path.is_file()]
    folders = {path.parent for path in files if path.parent.name != '__pycache__'}
    names = {'.'.join(path.relative_to(ROOT).parts) for path in folders}
    assert set(SETUPTOOLS['packages']) == names | {'byol_jax.configs'}
    assert SETUPTOOLS['package-dir'] == {'byol_jax.configs': 'configs'}


def test_every_file_is_installed():
    """Files that are not code, such as templates, match a pattern in pyproject.toml."""
    patterns = SETUPTOOLS['package-data']['byol_jax']
    for path in (ROOT / 'byol_jax').rglob('*'):
        if path.is_file() and path.suffix not in ('.py', '.pyc'):
            name = str(path.relative_to(ROOT / 'byol_jax'))
            assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize('path', sorted(ROOT.glob('requirements*.txt')), ids=lambda p: p.name)
def test_requirements(path):
    """Each is declared once, with a lower bound; the extra jax[cuda13] has JAX's version."""
    for line in requirements(path.name):
        if not line.startswith('-r') and line != 'jax[cuda13]':
            assert '>=' in line, line
    names = [
        re.split(r'[\[<>=]', line)[0].lower()
        for other in ROOT.glob('requirements*.txt')
        for line in requirements(other.name)
        if not line.startswith('-r') and line != 'jax[cuda13]'
    ]
    assert len(names) == len(set(names))


def test_without_the_extra():
    """If only encoders can be loaded, the command line says what to install."""
    code = (
        "import sys; sys.modules['ml_collections'] = None\n"
        'import byol_jax\nfrom byol_jax.__main__ import run\nrun()'
    )
    done = run('-c', code)
    assert done.returncode == 1
    assert 'ml_collections is not installed' in done.stderr
    assert "pip install 'byol_jax[train]'" in done.stderr


@pytest.mark.parametrize('arguments', [('-m', 'byol_jax'), ('main.py',)], ids=' '.join)
def test_ways_to_start(arguments):
    """`python -m byol_jax` and main.py are the same program, with all its flags in --help."""
    done = run(*arguments, '--help')
    for flag in ('--config:', '--mode:', '--workdir:', '--process_index:'):
        assert flag in done.stdout


def test_command_is_shown_as_typed(monkeypatch):
    """command.txt and the report have the command without the folders that Python adds."""
    from byol_jax.app import main

    monkeypatch.setattr(sys, 'argv', ['/x/bin/byol-jax', '--config=div2k'])
    monkeypatch.setattr(sys, 'orig_argv', ['/x/bin/python', '/x/bin/byol-jax', '--config=div2k'])
    assert main._command() == 'byol-jax --config=div2k'
    monkeypatch.setattr(sys, 'argv', ['main.py', '--config=div2k'])
    monkeypatch.setattr(sys, 'orig_argv', ['/x/bin/python', 'main.py', '--config=div2k'])
    assert main._command() == 'python main.py --config=div2k'
