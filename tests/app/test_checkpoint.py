"""Checkpoints: complete, verified, and never lost without a message."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from full_disk import no_room_beyond

from byol_jax.app.checkpoints import Checkpoints, digests
from byol_jax.errors import UserError
from byol_jax.training.online_probe import start_probe
from byol_jax.training.state import TrainState, init_state


@pytest.fixture
def state() -> TrainState:
    rng = np.random.default_rng(0)
    params = {
        part: {'kernel': jnp.array(rng.normal(size=(64, 64)), jnp.float32), 'bias': jnp.ones(3)}
        for part in ('encoder', 'projector', 'predictor')
    }
    stats = {part: {'batch_stats': {'mean': jnp.full(3, 0.5)}} for part in params}
    method = SimpleNamespace(target_parts=('encoder', 'projector'))
    return init_state(method, optax.sgd(0.1, momentum=0.9), params, stats)


def at(state: TrainState, step: int) -> TrainState:
    return state._replace(
        step=jnp.array(step, jnp.int32),
        online_params={
            **state.online_params,
            'encoder': {'kernel': jnp.full((64, 64), step * 1.0), 'bias': jnp.ones(3)},
        },
    )


def save(workdir: Path, state: TrainState, *steps: int, keep: int = 5) -> None:
    checkpoints = Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(step, at(state, step))
    checkpoints.close()


def restore(workdir: Path, state: TrainState) -> tuple[int, TrainState] | None:
    checkpoints = Checkpoints(workdir, keep=5)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


def payload(workdir: Path, step: int) -> Path:
    """The largest data file of a checkpoint's arrays."""
    files = [p for p in (workdir / 'checkpoints' / str(step) / 'state').rglob('*') if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_round_trip(tmp_path, state):
    """A restored state equals the saved one bit for bit, and is the newest."""
    save(tmp_path, state, 1, 2)
    step, loaded = restore(tmp_path, state)
    assert step == 2
    assert digests(loaded) == digests(at(state, 2))


def test_a_folder_whose_name_is_no_text(tmp_path, state):
    """A workdir may be called as its disk allows; Orbax gets there by a link, which is removed."""
    before = set(Path(tempfile.gettempdir()).glob('byol_jax-*'))
    workdir = tmp_path / os.fsdecode(b'caf\xe9')
    save(workdir, state, 1, 2)
    step, restored = restore(workdir, state)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 2))
    assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'1', '2'}
    gc.collect()
    assert set(Path(tempfile.gettempdir()).glob('byol_jax-*')) == before


def test_no_checkpoint_is_not_an_error(tmp_path, state):
    """A new workdir has nothing to restore."""
    assert restore(tmp_path, state) is None


def test_keeps_the_newest(tmp_path, state):
    """The newest `keep` checkpoints stay."""
    save(tmp_path, state, 1, 2, 3, 4, keep=2)
    assert Checkpoints(tmp_path, 2).steps() == [3, 4]


def test_one_flipped_bit_is_found(tmp_path, state, capsys):
    """A flipped bit in a data file is detected and named, and the run uses an older checkpoint."""
    save(tmp_path, state, 1, 2)
    flip_bit(payload(tmp_path, 2))
    step, loaded = restore(tmp_path, state)
    assert step == 1
    assert digests(loaded) == digests(at(state, 1))
    assert 'checkpoint 2 is damaged' in capsys.readouterr().out
    assert (tmp_path / 'checkpoints' / 'damaged-2').is_dir()


@pytest.mark.parametrize('victim', ['state', 'digests'])
def test_missing_files_are_found(tmp_path, state, victim):
    """A checkpoint with missing files is skipped for an older one."""
    save(tmp_path, state, 1, 2)
    for path in (tmp_path / 'checkpoints' / '2' / victim).rglob('*'):
        if path.is_file():
            path.unlink()
    assert restore(tmp_path, state)[0] == 1


def test_goes_on_after_damage(tmp_path, state):
    """The step of a damaged checkpoint can be saved again, and be damaged again."""
    for _ in range(2):
        save(tmp_path, state, 1) if not (tmp_path / 'checkpoints' / '1').exists() else None
        save(tmp_path, state, 2)
        flip_bit(payload(tmp_path, 2))
        assert restore(tmp_path, state)[0] == 1
    save(tmp_path, state, 2)
    assert restore(tmp_path, state)[0] == 2


def test_all_damaged_never_starts_from_scratch(tmp_path, state):
    """Without a good checkpoint the run stops and says what to do."""
    save(tmp_path, state, 1, 2)
    for step in (1, 2):
        flip_bit(payload(tmp_path, step))
    with pytest.raises(UserError, match='All checkpoints') as error:
        restore(tmp_path, state)
    assert '--workdir' in str(error.value)
    with pytest.raises(UserError, match='damaged'):
        restore(tmp_path, state)


def test_another_network_is_not_damage(tmp_path, state):
    """A checkpoint of another network is refused as such and left in place."""
    save(tmp_path, state, 1)
    other = state._replace(online_params={'encoder': {'kernel': jnp.ones((2, 2))}})
    with pytest.raises(UserError, match='belongs to another network'):
        restore(tmp_path, other)
    assert restore(tmp_path, state)[0] == 1


def with_probe(state: TrainState, labels: int) -> TrainState:
    probe = start_probe(5, labels)
    return state._replace(online_probe=probe._replace(bias=jnp.full(labels, 0.25)))


def test_the_online_probe_is_saved(tmp_path, state):
    """A probe and its optimizer are restored bit for bit; one flipped bit in them is damage."""
    state = with_probe(state, 4)
    save(tmp_path, state, 1, 2)
    assert digests(restore(tmp_path, state)[1]) == digests(at(state, 2))
    folder = tmp_path / 'checkpoints' / '2' / 'online_probe'
    flip_bit(max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size))
    assert restore(tmp_path, state)[0] == 1


@pytest.mark.parametrize('saved', [None, 3], ids=['none', 'of other labels'])
def test_the_online_probe_may_begin_anew(tmp_path, state, capsys, saved):
    """A checkpoint without a probe, or with one for other labels, is not another network: the
    probe begins again, with a message.
    """
    save(tmp_path, state if saved is None else with_probe(state, saved), 1)
    like = state._replace(online_probe=jax.device_get(start_probe(5, 4)))
    step, loaded = restore(tmp_path, like)
    assert step == 1
    assert digests(loaded) == digests(at(like, 1))
    assert 'online probe begins anew' in capsys.readouterr().out


def test_the_online_probe_may_be_left(tmp_path, state, capsys):
    """The networks are restored without the probe if it is not needed, as for an export."""
    save(tmp_path, with_probe(state, 4), 1)
    _, loaded = restore(tmp_path, state)
    assert loaded.online_probe is None
    assert digests(loaded) == digests(at(state, 1))
    assert capsys.readouterr().out == ''


def test_checkpoints_from_before_the_probe(tmp_path, state):
    """A checkpoint whose state has no field for the probe is restored."""

    class Before(NamedTuple):
        step: Any
        online_params: Any
        online_stats: Any
        target_params: Any
        target_stats: Any
        optimizer: Any

    manager = ocp.CheckpointManager(tmp_path / 'checkpoints', item_names=('state', 'digests'))
    before = jax.tree.map(np.asarray, Before(*at(state, 1)[:6]))
    manager.save(
        1,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(before), digests=ocp.args.JsonSave(digests(before))
        ),
    )
    manager.close()
    step, loaded = restore(tmp_path, state)
    assert step == 1
    assert isinstance(loaded, TrainState)
    assert digests(loaded) == digests(at(state, 1))


def test_reading_only_touches_nothing(tmp_path, state):
    """Reading beside a running job neither moves damaged files nor deletes unfinished ones."""
    save(tmp_path, state, 1, 2)
    flip_bit(payload(tmp_path, 2))
    (tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp').mkdir()
    checkpoints = Checkpoints(tmp_path, keep=5, read_only=True)
    assert checkpoints.restore(state)[0] == 1
    checkpoints.close()
    names = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
    assert names == {'1', '2', '3.orbax-checkpoint-tmp'}


def test_full_disk_is_told_at_once(tmp_path, state, capfd):
    """A checkpoint that cannot be written raises one error and leaves nothing else: no word of
    Orbax's threads, no folder. The older one stays good, and with room the next is written."""
    save(tmp_path, state, 1)
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in range(2, 6):
        # Other parts of the checkpoint fail first.
        with no_room_beyond(1024 * step), pytest.raises(UserError) as error:
            checkpoints.save(step, at(state, step))
        assert f'The checkpoint of step {step} (0.1 MB) could not be written' in str(error.value)
        assert 'free: File too large.' in str(error.value)
        assert 'goes on from step 1' in str(error.value)
        assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == {'1'}
    gc.collect()
    assert capfd.readouterr() == ('', '')
    checkpoints.save(6, at(state, 6))
    checkpoints.close()
    assert restore(tmp_path, state)[0] == 6
