"""The README's section for people who bring their own network, followed to the letter."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of one language below a heading."""
    section = (ROOT / 'README.md').read_text().split(f'\n## {heading}\n')[1].split('\n## ')[0]
    return [part.split('\n```')[0] for part in section.split(f'```{language}\n')[1:]]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The arguments of the section's main.py commands, with its my_net.py where Python finds it."""
    (tmp_path / 'my_net.py').write_text(blocks('Use your own model', 'python')[0])
    found = []
    for line in blocks('Use your own model', 'bash'):
        program, script, *arguments = shlex.split(line)
        assert (program, script) == ('.venv/bin/python', 'main.py')
        found.append(arguments)
    return found


def test_own_model_summary(commands, main_py, tmp_path):
    """The table of layers is what the README shows, line by line."""
    done = main_py(*commands[0], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    section = (ROOT / 'README.md').read_text().split('## Use your own model')[1]
    shown = [line.strip() for line in section.split('\n') if line.startswith('    ')]
    table = [line for line in shown if line.startswith(('layer ', 'conv', 'bn', 'drop', 'head'))]
    assert len(table) == 9
    for line in table:
        assert line in done.stdout.splitlines()


def test_own_model_config(tmp_path, main_py):
    """The config file of three own lines loads and says the same as the flags."""
    (tmp_path / 'my_net.py').write_text(blocks('Use your own model', 'python')[0])
    (tmp_path / 'my_config.py').write_text(blocks('Use your own model', 'python')[1])
    done = main_py(
        f'--config={tmp_path / "my_config.py"}',
        '--mode=summary',
        '--config.views.image_size=64',
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert 'conv1   Conv       32x32x64' in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_model_trains(commands, main_py, tmp_path):
    """The README's training command runs to its end, and its result loads and starts another."""
    own = [a for a in commands[1] if not a.startswith('--workdir')]
    short = ['--config.total_steps=8', '--config.warmup_steps=2', '--config.log.every_steps=4']
    done = main_py(*own, *short, f'--workdir={tmp_path / "a"}', PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    again = [*own, *short, f'--config.encoder.init_from={tmp_path / "a"}']
    again += ['--config.encoder.freeze_steps=4', f'--workdir={tmp_path / "b"}']
    done = main_py(*again, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 'as loaded' in done.stdout
