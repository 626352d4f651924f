"""What SLURM and Open MPI tell a process."""

from __future__ import annotations

import pytest

from byol_jax.app.launchers import Place, Share, count_gpus, find_place, find_share, own_devices
from byol_jax.errors import UserError


def slurm(**changes: str) -> dict[str, str]:
    """The environment of a task of `srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8`."""
    return {
        'SLURM_JOB_ID': '4711',
        'SLURM_STEP_ID': '0',
        'SLURM_STEP_NUM_TASKS': '4',
        'SLURM_STEP_NODELIST': 'node[007-010]',
        'SLURM_STEP_TASKS_PER_NODE': '1(x4)',
        'SLURM_NODEID': '2',
        'SLURM_PROCID': '2',
        'SLURM_LOCALID': '0',
        'SLURM_GPUS_ON_NODE': '8',
        **changes,
    }


EIGHT_A_NODE = slurm(
    SLURM_STEP_NUM_TASKS='16',
    SLURM_STEP_TASKS_PER_NODE='8(x2)',
    SLURM_NODEID='1',
    SLURM_PROCID='11',
    SLURM_LOCALID='3',
)
OPEN_MPI_4 = {
    'OMPI_COMM_WORLD_SIZE': '4',
    'OMPI_COMM_WORLD_RANK': '3',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
    'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
}
OPEN_MPI_5 = {
    **{k: v for k, v in OPEN_MPI_4.items() if 'orte' not in k},
    'PMIX_NAMESPACE': 'prterun-login1-2441@1',
}


def test_slurm_tells_all():
    """Process 0 is on the first host of the step."""
    place = find_place(None, None, None, slurm())
    assert place is not None
    host, port = place.coordinator.split(':')
    assert (host, place.count, place.index) == ('node007', 4, 2)
    assert 61440 <= int(port) < 65536
    assert place.coordinator == find_place(None, None, None, slurm(SLURM_PROCID='0')).coordinator


def test_two_steps_of_a_job_take_different_ports():
    """They may run at the same time on the same hosts."""
    first, second = (find_place(None, None, None, slurm(SLURM_STEP_ID=i)) for i in '01')
    assert first.coordinator != second.coordinator


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('node1', 'node1'),
        ('node1,node5', 'node1'),
        ('gpu[3-4],login', 'gpu3'),
        ('gpu[012,020-022]', 'gpu012'),
        ('rack[2,4]-ib,x', 'rack2-ib'),
        ('a,gpu[1-2]', 'a'),
    ],
)
def test_first_of_slurms_hosts(nodes, first):
    """SLURM shortens lists of hosts."""
    place = find_place(None, None, None, slurm(SLURM_STEP_NODELIST=nodes))
    assert place.coordinator.split(':')[0] == first


@pytest.mark.parametrize(
    'environment',
    [{}, slurm(SLURM_STEP_NUM_TASKS='1'), {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4'}],
    ids=['no launcher', 'srun -n1', 'batch script of a job of four tasks'],
)
def test_one_process(environment):
    """A run that nobody started several times is of one process."""
    assert find_place(None, None, None, environment) is None


def test_flags_go_before_the_launcher():
    """Under a launcher each flag may be given alone."""
    given = find_place('other:1234', None, None, slurm())
    assert given == Place('other:1234', 4, 2)
    assert find_place('n:1', 2, 0, slurm()) == Place('n:1', 2, 0)


@pytest.mark.parametrize('flags', [('n:1', None, None), ('n:1', 2, None), (None, 2, 1)])
def test_half_given_flags_are_refused(flags):
    """Without a launcher all three are needed, and all are named."""
    with pytest.raises(UserError, match=r'--coordinator.*--process_count.*--process_index'):
        find_place(*flags, {})


def test_open_mpi_4_names_its_host():
    """Process 0 is where `mpirun` was started."""
    place = find_place(None, None, None, OPEN_MPI_4)
    assert (place.coordinator.split(':')[0], place.count, place.index) == ('10.96.0.1', 4, 3)


def test_open_mpi_5_asks_for_the_coordinator():
    """Open MPI 5 names no host; one flag is enough."""
    with pytest.raises(UserError, match=r'--coordinator=.*--process_count.*--process_index'):
        find_place(None, None, None, OPEN_MPI_5)
    assert find_place('n1:999', None, None, OPEN_MPI_5) == Place('n1:999', 4, 3)


def test_open_mpi_5_on_one_host():
    """On one host nothing has to be told."""
    place = find_place(None, None, None, OPEN_MPI_5 | {'OMPI_COMM_WORLD_LOCAL_SIZE': '4'})
    assert place.coordinator.startswith('localhost:')


@pytest.mark.parametrize(
    ('environment', 'share'),
    [
        ({}, Share(1, 0, None)),
        (slurm(), Share(1, 0, 8)),
        (EIGHT_A_NODE, Share(8, 3, 8)),
        (slurm(SLURM_STEP_TASKS_PER_NODE='2,1(x2)', SLURM_NODEID='0'), Share(2, 0, 8)),
        (OPEN_MPI_4, Share(2, 1, None)),
    ],
)
def test_share_of_the_host(environment, share):
    """The launcher tells how many processes a host has."""
    assert find_share(environment) == share


@pytest.mark.parametrize(
    ('share', 'visible', 'on_host', 'devices'),
    [
        (Share(1, 0, 8), 8, 8, None),
        (Share(1, 0, None), 8, 8, None),
        (Share(8, 3, 8), 8, 8, [3]),
        (Share(2, 1, 8), 8, 8, [4, 5, 6, 7]),
        (Share(8, 3, 8), 1, 8, None),
        (Share(2, 1, 8), 4, 8, None),
        (Share(2, 1, None), 8, 8, [4, 5, 6, 7]),
        (Share(2, 1, None), 1, 8, None),
        (Share(2, 1, 4), 4, 8, [2, 3]),
        (Share(4, 3, None), 0, 0, None),
    ],
    ids=[
        'one task a host: all eight',
        'no launcher: all',
        'eight tasks that see all: one each',
        'two tasks that see all: half each',
        'eight tasks with a GPU of their own',
        'two tasks with four of their own',
        'Open MPI: half each',
        'Open MPI behind a script that shows each its own',
        'half a host: half of that each',
        'no GPUs',
    ],
)
def test_devices_of_a_process(share, visible, on_host, devices):
    """A process takes all that it sees, unless others on its host see the same."""
    assert own_devices(share, visible, on_host) == devices


def test_more_processes_than_gpus():
    """Two processes cannot share a GPU."""
    with pytest.raises(UserError, match=r'4 processes share a host of 2 GPU'):
        own_devices(Share(4, 0, None), 2, 2)


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, (4, 4)),
        ({'CUDA_VISIBLE_DEVICES': '0,3'}, (2, 4)),
        ({'CUDA_VISIBLE_DEVICES': ''}, (0, 4)),
        ({'CUDA_VISIBLE_DEVICES': '-1'}, (0, 4)),
        ({'CUDA_VISIBLE_DEVICES': 'GPU-8932f937-d72c'}, (1, 4)),
    ],
)
def test_gpus_seen_and_there(tmp_path, environment, expected):
    """Only the devices themselves count, not the driver's other files."""
    for name in ('nvidia0', 'nvidia1', 'nvidia2', 'nvidia3', 'nvidiactl', 'nvidia-uvm'):
        (tmp_path / name).touch()
    assert count_gpus(environment, tmp_path) == expected


def test_gpus_of_amd(tmp_path):
    """AMD's GPUs are render devices with a driver for computing; other cards have none."""
    (tmp_path / 'dri').mkdir()
    for number in (128, 129):
        (tmp_path / 'dri' / f'renderD{number}').touch()
    assert count_gpus({}, tmp_path) == (0, 0)
    (tmp_path / 'kfd').touch()
    assert count_gpus({'ROCR_VISIBLE_DEVICES': '1'}, tmp_path) == (1, 2)
