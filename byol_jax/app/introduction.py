"""What a run prints and writes before its first step: data and plan, layers.txt, views.png."""

from __future__ import annotations

from byol_jax.app.build import Run
from byol_jax.app.devices import describe_devices
from byol_jax.app.hooks import Hook
from byol_jax.app.hosts import is_main, say
from byol_jax.app.left_out import tried
from byol_jax.app.report.pictures import draw_views
from byol_jax.app.side_files import SideFile
from byol_jax.input.pixels import Finding, look
from byol_jax.input.stream import Stream
from byol_jax.models.layer_table import TAPPED, layer_table
from byol_jax.training.online_probe import too_many_labels
from byol_jax.training.state import TrainState

# A table of more than _MOST_LINES lines is printed with _AROUND lines on both sides of the tapped
# layer only.
_MOST_LINES = 60
_AROUND = 5


def introduce(run: Run) -> None:
    """Prints the data, length, batch and optimizer exclusions of a run."""
    plan, data = run.plan, run.data
    devices, warnings = describe_devices()
    tested = '' if data.test is None else f', {len(data.test.train):,} in the test set'
    say(
        f'{plan.examples:,} training examples, {len(data.held_out):,} held out{tested}; '
        f'{plan.total_steps:,} steps of {plan.batch_size} pairs '
        f'({plan.epoch(plan.total_steps):.1f} epochs) on {devices}\n'
        f'{run.training.excluded}'
    )
    for line in warnings:
        say(line)
    too_many = too_many_labels(data.train) if run.config.evaluate.online_probe else ''
    for line in (*data.lines(), too_many, large_batch(run)):
        if line:
            say(line)
    if run.training.origin:
        say(run.training.origin)
    if plan.freeze_steps:
        say(f'projector and predictor train alone for the first {plan.freeze_steps:,} steps')


def large_batch(run: Run) -> str:
    """A line for a batch of more pictures than there are: what an epoch then is; '' otherwise."""
    plan, epochs = run.plan, run.config.total_epochs
    if plan.batch_size <= plan.examples:
        return ''
    length = '' if epochs is None else f'total_epochs={epochs:g} are {plan.total_steps:,} steps; '
    often = f'every {plan.checkpoint_steps:,} steps' if plan.checkpoint_steps > 1 else 'every step'
    saved = (
        f'{plan.checkpoints:,} checkpoints are written, {often}'
        if plan.checkpoint_steps
        else 'one checkpoint is written, at the end'
    )
    return (
        f'batch_size={plan.batch_size} is more than the {plan.examples:,} training examples: a '
        f'step shows each of them {plan.batch_size / plan.examples:.1f} times, in other views, and '
        f'an epoch is {plan.examples / plan.batch_size:.2g} of a step. {length}{saved} (the newest '
        f'{run.config.checkpoint.keep} are kept). A batch of at most {plan.examples:,} makes an '
        'epoch a step or more'
    )


def first_look(run: Run) -> tuple[Finding, ...]:
    """What is odd about the first pictures and views, which process 0 looks at.

    The monitors print it, as alarms, and the report's verdict names it.
    """
    if not is_main():
        return ()
    stream = Stream(run.data.train, run.views, run.config.seed)
    found: list[Finding] = []
    tried(
        'the first look at the pictures',
        lambda: found.extend(look(stream, workers=run.config.data.workers)),
    )
    return tuple(found)


class Layers(Hook):
    """Writes layers.txt, the table of the encoder's layers with the tapped one marked."""

    def start(self, run: Run, state: TrainState) -> None:
        """Writes the table and prints it; of a long one, only the lines around the tapped layer."""
        path = run.workdir / 'layers.txt'
        table = layer_table(run.method.encoder, run.config.views.image_size)
        SideFile(path).replace(lambda partial: partial.write_text(f'{table}\n', encoding='utf-8'))
        say(f'\n{shortened(table)}\n\nlayers: {path}')


def shortened(table: str) -> str:
    """Shortens a long table to its head, the lines around the tapped layer, and the sums.

    Args:
      table: a table from `layer_table`.
    """
    lines = table.split('\n')
    if len(lines) <= _MOST_LINES:
        return table
    (tapped,) = (number for number, line in enumerate(lines) if line.endswith(TAPPED))
    end = lines.index('')
    first, last = max(1, tapped - _AROUND), min(end, tapped + _AROUND + 1)
    above, below = first - 1, end - last
    return '\n'.join(
        [
            lines[0],
            *([f'... {above} layers'] if above else []),
            *lines[first:last],
            *([f'... {below} layers'] if below else []),
            *lines[end:],
        ]
    )


class Views(Hook):
    """Draws views.png."""

    def start(self, run: Run, state: TrainState) -> None:
        """Draws and writes views.png. Bad files among its pictures are counted in training only."""
        draw_views(run, run.workdir)
        say(f'view pairs: {run.workdir / "views.png"}')
