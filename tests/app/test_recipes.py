"""Recipes: found by path and by name, in a checkout and where the package is installed."""

from __future__ import annotations

import shutil
import sys

import pytest
from conftest import ROOT

from byol_jax.app import recipes
from byol_jax.errors import UserError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installation as in site-packages: recipes inside the package, and no package `configs`."""
    package = tmp_path / 'site' / 'byol_jax'
    shutil.copytree(ROOT / 'configs', package / 'configs')
    monkeypatch.setattr(recipes, '__file__', str(package / 'app' / 'recipes.py'))
    for name in [name for name in sys.modules if name.partition('.')[0] == 'configs']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p not in ('', str(ROOT))])
    monkeypatch.chdir(tmp_path)
    return package / 'configs'


def test_a_name_is_a_file(monkeypatch, tmp_path):
    """A name means the package's recipe in any folder; a file in ./configs takes precedence."""
    monkeypatch.chdir(tmp_path)
    assert recipes.find_recipe('div2k:sample') == f'{ROOT}/configs/div2k.py:sample'
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'div2k.py').write_text('')
    assert recipes.find_recipe('div2k:sample') == 'configs/div2k.py:sample'
    assert recipes.find_recipe('configs/div2k.py') == 'configs/div2k.py'


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('div2l', "there is no file or recipe 'div2l'. Did you mean 'div2k'?"),
        (
            'configs/div2l.py',
            "there is no file 'configs/div2l.py'. Did you mean 'configs/div2k.py'?",
        ),
        ('elsewhere/div2k.py:sample', "no file 'elsewhere/div2k.py'. Did you mean 'div2k'?"),
        ('div2k:smaple', "'lr_hr', 'sample' or nothing. Did you mean 'sample'?"),
    ],
)
def test_a_near_miss(monkeypatch, name, words):
    """For a wrong name or argument, the nearest right one is suggested."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        recipes.load_recipe(name)
    assert words in str(error.value)


def test_installed(installed):
    """When installed, recipes import each other, and sys.modules keeps no package `configs`."""
    assert 'imagenet_vit' in recipes.recipe_names()
    for name in recipes.recipe_names():
        recipes.load_recipe(name)
    assert recipes.load_recipe('div2k:sample').name == 'div2k_sample'
    assert recipes.find_recipe('div2k') == str(installed / 'div2k.py')
    assert 'configs' not in sys.modules


def test_own_configs_and_ours(installed, tmp_path, monkeypatch):
    """A user's config in ./configs imports its neighbours there and the package's recipes."""
    own = tmp_path / 'configs'
    own.mkdir()
    (own / 'words.py').write_text("NAME = 'mine'\n")
    (own / 'mine.py').write_text(
        'from configs import folder, words\n\n'
        'def get_config():\n'
        '    config = folder.get_config().unlock()\n'
        '    config.name = words.NAME\n'
        '    return config.lock()\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert recipes.load_recipe('mine').name == 'mine'
    assert list(sys.modules['configs'].__path__) == [str(own)]


def test_a_module_called_configs(installed, tmp_path, monkeypatch):
    """An imported configs.py of somebody else is set aside while a recipe runs, then restored."""
    (tmp_path / 'configs.py').write_text('THEIRS = True\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert recipes.load_recipe('folder').name == 'folder'
    assert sys.modules['configs'].THEIRS
