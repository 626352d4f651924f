"""The documentation's commands and code for own networks run as they are written."""

from __future__ import annotations

import re
import runpy
import shlex

import griffe
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from byol_jax.evaluation.subject import FeatureSet, Subject
from byol_jax.interop.encoder import make_encoder
from byol_jax.models.registry import build_encoder
from byol_jax.models.tap import TappedEncoder

PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
PAGES += sorted((ROOT / 'docs').rglob('*.md'))


def section(page: str, heading: str) -> str:
    """The text below a heading of a page in docs/."""
    return (ROOT / 'docs' / page).read_text().split(f'\n## {heading}\n')[1].split('\n## ')[0]


def blocks(page: str, heading: str, language: str) -> list[str]:
    """The code blocks of one language below a heading."""
    parts = section(page, heading).split(f'```{language}\n')[1:]
    return [part.split('\n```')[0] for part in parts]


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(page):
    """Every link to a file of the repository is valid."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        path = link.partition('#')[0]
        assert not path or '://' in path or (page.parent / path).exists(), link


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The arguments of the section's main.py commands, with its my_net.py on Python's path."""
    (tmp_path / 'my_net.py').write_text(blocks('models.md', 'Use your own model', 'python')[0])
    found = []
    for line in blocks('models.md', 'Use your own model', 'bash'):
        program, script, *arguments = shlex.split(line)
        assert (program, script) == ('python', 'main.py')
        found.append(arguments)
    return found


def test_own_model_summary(commands, main_py, tmp_path):
    """The table of layers is that of the page, line by line."""
    done = main_py(*commands[0], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = section('models.md', 'Use your own model').split('\n')
    shown = [line.strip() for line in lines if line.startswith('    ')]
    table = [line for line in shown if line.startswith(('layer ', 'conv', 'bn', 'drop', 'head'))]
    assert len(table) == 9
    for line in table:
        assert line in done.stdout.splitlines()


def test_own_model_config(tmp_path, main_py):
    """The config file of three lines loads and gives the same as the flags."""
    (tmp_path / 'my_net.py').write_text(blocks('models.md', 'Use your own model', 'python')[0])
    (tmp_path / 'my_config.py').write_text(blocks('models.md', 'Use your own model', 'python')[1])
    done = main_py(
        f'--config={tmp_path / "my_config.py"}',
        '--mode=summary',
        '--config.views.image_size=64',
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert 'conv1   Conv       32x32x64' in done.stdout


def test_fine_tuning(tmp_path):
    """The fine-tuning code runs as it is and learns to tell two kinds of pictures apart."""
    network = build_encoder('resnet', {'stage_sizes': (1,), 'width': 0.125})
    variables = TappedEncoder(network, 'avgpool').init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    encoder = make_encoder(
        name='resnet',
        kwargs={'stage_sizes': (1,), 'width': 0.125},
        hidden_layer='avgpool',
        variables=variables,
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        step=0,
    )
    names = {'encoder': encoder}
    exec(blocks('encoder.md', 'Fine-tune', 'python')[0], names)
    labels = np.arange(16) % 2
    noise = np.random.default_rng(0).integers(0, 200, (16, 16, 16, 3))
    images = (noise + 40 * labels[:, None, None, None]).astype(np.uint8)
    carry, losses = (names['params'], names['state'], names['moments']), []
    for step in range(150):
        *carry, loss = names['train_step'](*carry, images, labels, jax.random.key(step))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(10))
    assert losses[-1] < 0.3 * losses[0]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), carry[1], names['state'])
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_model_trains(commands, main_py, tmp_path):
    """The page's training command runs, and its result loads and starts another run."""
    own = [a for a in commands[1] if not a.startswith('--workdir')]
    short = ['--config.total_steps=8', '--config.warmup_steps=2', '--config.log.every_steps=4']
    done = main_py(*own, *short, f'--workdir={tmp_path / "a"}', PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    again = [*own, *short, f'--config.encoder.init_from={tmp_path / "a"}']
    again += ['--config.encoder.freeze_steps=4', f'--workdir={tmp_path / "b"}']
    done = main_py(*again, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 'as loaded' in done.stdout


def test_docstrings_parse(caplog):
    """Sections of docstrings parse as Google's, with one argument a line, each a parameter."""
    package = griffe.load('byol_jax', search_paths=[ROOT], docstring_parser='google')
    waiting = [package]
    while waiting:
        found = waiting.pop()
        if found.docstring:
            found.docstring.parse('google')
        waiting += [member for member in found.members.values() if not member.is_alias]
    wrong = [record.getMessage() for record in caplog.records if record.name == 'griffe']
    assert not wrong, '\n'.join(wrong)


def test_drawing_is_true():
    """docs/images/house.svg shows the actual imports."""
    house = runpy.run_path(str(ROOT / 'docs' / 'site' / 'house.py'))
    same = house['DRAWING'].read_text() == house['draw']()
    assert same, 'imports have changed: run python docs/site/house.py'


def test_own_protocol():
    """The page's protocol runs as it is, on features that tell the labels."""
    names = {}
    exec(blocks('evaluation.md', 'Protocols', 'python')[0], names)
    labels = np.arange(40) % 4
    pictures = FeatureSet(np.eye(4, 8, dtype=np.float32)[labels], labels)
    found = names['class_means'](Subject(pictures, pictures))
    assert found.metrics['class_means'].value == 1


def test_evaluation_from_python(capsys):
    """The page's code runs as it is; with such features the numbers are well above chance."""
    (block,) = blocks('evaluation.md', 'From Python', 'python')
    exec(compile(block, 'evaluation.md', 'exec'), {})
    knn, probe, rest = capsys.readouterr().out.splitlines()
    nmi, rank = map(float, rest.split())
    assert float(knn) > 0.9
    assert float(probe) > 0.9
    assert nmi > 0.7
    assert 1 < rank < 16
