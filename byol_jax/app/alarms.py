"""Alarms: rules that find problems of a run in its metrics, with evidence, cause and remedy.

Each rule is a pure function of the records of metrics.jsonl and a few facts of the config. A rule
does not apply if its metrics are missing from the records, because a method may have no predictor,
no target network or no projection. The thresholds lie between the values measured in healthy and in
broken runs (table in docs/monitors.md; tests/app/test_alarms.py provokes each alarm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from byol_jax.app.plan import Plan
from byol_jax.cores import usable_cores
from byol_jax.input.pixels import Finding
from byol_jax.methods.base import LossScale
from byol_jax.settings import Settings

if TYPE_CHECKING:
    # A comparison judges records without building a run.
    from byol_jax.app.build import Run

# A record of metrics.jsonl, and all records of a run so far, oldest first.
Record = Mapping[str, Any]
History = Sequence[Record]

# 'watch': may be on purpose or pass by itself. 'alarm': the run is not worth continuing.
WATCH, ALARM = 'watch', 'alarm'

# Trends are judged from this step on. Before it the weights are still near their random start.
FIRST_STEP = 20


class Alarm(NamedTuple):
    """A problem that a rule has found.

    Attributes:
      step: step of the record that raised it.
      name: name of the rule.
      severity: WATCH or ALARM.
      evidence: what was measured.
      cause: the likely cause.
      remedy: what to do, with the config keys.
    """

    step: int
    name: str
    severity: str
    evidence: str
    cause: str
    remedy: str

    def line(self) -> str:
        """One line for the log."""
        return (
            f'{self.severity.upper()} at step {self.step}: {self.name}: {self.evidence}. '
            f'Likely cause: {self.cause}. What to do: {self.remedy}.'
        )


class Facts(NamedTuple):
    """What the rules need to know about a run.

    Attributes:
      batch_size: examples per optimizer step.
      passes: microbatches (forward/backward passes) per optimizer step (accumulate_steps).
      device_count: devices of all processes together.
      projection_size: channels of the projection, P.
      monitored_rows: rows of features that RankMe is computed from.
      warmup_steps: optimizer steps of learning-rate warm-up.
      base_learning_rate: optimizer.base_learning_rate.
      weight_decay: optimizer.weight_decay.
      tau_base: target.tau_base.
      workers: number of examples that this host prepares in parallel.
      cores: CPU cores of this host.
      tile_size: data.tile_size, pixels; 0 for none.
      cache_gib: data.cache_gib.
      image_size: views.image_size, pixels.
      views_on: views.on, 'cpu' or 'accelerator'.
      initial_norm: norm of all parameters before the first step; 0 if not known.
      pixels: what is odd about the first pictures and views (`pixel_alarms`).
      loss_scale: range of the method's loss.
    """

    batch_size: int
    passes: int
    device_count: int
    projection_size: int
    monitored_rows: int
    warmup_steps: int
    base_learning_rate: float
    weight_decay: float
    tau_base: float
    workers: int
    cores: int
    tile_size: int
    cache_gib: float
    image_size: int
    views_on: str
    loss_scale: LossScale
    initial_norm: float = 0.0
    pixels: tuple[Alarm, ...] = ()


def facts_of(
    config: Settings,
    plan: Plan,
    loss_scale: LossScale,
    initial_norm: float = 0.0,
    pixels: tuple[Alarm, ...] = (),
) -> Facts:
    """The facts of a run on this host.

    Args:
      config: the run's settings.
      plan: the run's plan.
      loss_scale: range of the method's loss.
    """
    cores = usable_cores()
    return Facts(
        batch_size=plan.batch_size,
        passes=plan.accumulate_steps,
        device_count=plan.device_count,
        projection_size=config.projector.output_size,
        monitored_rows=plan.monitored_rows,
        warmup_steps=plan.warmup_steps,
        base_learning_rate=config.optimizer.base_learning_rate,
        weight_decay=config.optimizer.weight_decay,
        tau_base=config.target.tau_base,
        workers=config.data.workers or cores,
        cores=cores,
        tile_size=config.data.tile_size,
        cache_gib=config.data.cache_gib,
        image_size=config.views.image_size,
        views_on=config.views.on,
        loss_scale=loss_scale,
        initial_norm=initial_norm,
        pixels=pixels,
    )


def facts_of_run(run: Run) -> Facts:
    """The facts of a run that trains on this host, with what was found before its first step."""
    return facts_of(
        run.config,
        run.plan,
        run.method.loss_scale,
        run.initial_norm,
        pixel_alarms(run.pixels),
    )


def pixel_alarms(found: Sequence[Finding]) -> tuple[Alarm, ...]:
    """What was found before the first step, as alarms that stand from then on."""
    return tuple(
        Alarm(0, each.name, ALARM if each.severe else WATCH, each.evidence, each.cause, each.remedy)
        for each in found
    )


def standing(history: History, facts: Facts) -> list[Alarm]:
    """The alarms that stand at the last record of a run, at most one of each name.

    Args:
      history: the records of metrics.jsonl so far, oldest first.
      facts: facts of the run.
    """
    if not history:
        return list(facts.pixels)
    found = (rule(history, facts) for rule in _RULES)
    return [*facts.pixels, *(alarm for alarm in found if alarm is not None)]


def collapse(history: History, facts: Facts) -> Alarm | None:
    """The projections of all pictures become alike, or use few directions.

    Looks at the last two records. The feature std times sqrt(P) is 0.74 to 0.83 in the sample run,
    0.8 to 0.86 in the tests' tiny runs and near 1 in SimSiam (arXiv:2011.10566, Figure 2), but
    below 0.25 in broken runs. RankMe of the projections is at least 21 of 128 or 7.9 of 16 in
    healthy runs, and at most 2.1 of 16 in broken ones. RankMe cannot exceed the number of rows it
    is computed from. Before FIRST_STEP only a std that has fallen counts (`_falls`).
    """
    shares = _stds(history[-2:], facts)
    ranks = _values(history[-2:], 'rankme_projection')
    if not (judged(history) or _falls(history, facts)) or not (shares or ranks):
        return None
    share = max(shares, default=math.inf)
    rank = max(ranks, default=math.inf)
    most = min(facts.projection_size, facts.monitored_rows)
    if share >= 0.5 and rank >= min(5, most / 4):
        return None
    severe = share < 0.3 or rank < min(3, most / 6)
    # In the warm-up the std may still rise again, but not from next to nothing.
    early = history[-1]['step'] <= facts.warmup_steps and share >= 0.15
    measured = []
    if shares:
        measured.append(f'the feature std is {std_words(share, facts)}')
    if ranks:
        measured.append(f'the projections use {rank:.1f} of {most} directions (RankMe)')
    cause, remedy = _cause_of_collapse(history, facts)
    return _alarm(
        history,
        'collapse',
        ALARM if severe and not early else WATCH,
        f'{" and ".join(measured)}, at a loss of {history[-1]["loss"]:.3g}',
        cause,
        remedy,
    )


def trivial_loss(history: History, facts: Facts) -> Alarm | None:
    """The loss is low only because all pictures have the same projection.

    Raised if the loss is in the lowest 2.5 % of the range from the lowest loss to chance (BYOL:
    below 0.1, a cosine of 0.975 between prediction and target) and the feature std is below 30 % of
    1/sqrt(P). The sample run ends at a loss of 1.2, the tests' tiny runs at 0.35 and more. Without
    a predictor the tiny runs reach a loss of 0.06 and 17 % of 1/sqrt(P) after 50 steps.
    """
    shares = _stds(history[-2:], facts)
    if not judged(history) or not shares:
        return None
    share = max(shares)
    loss = max(record['loss'] for record in history[-2:])
    if loss_share(loss, facts.loss_scale) >= 0.025 or share >= 0.3:
        return None
    cause, remedy = _cause_of_collapse(history, facts)
    return _alarm(
        history,
        'trivial_loss',
        ALARM,
        f'the loss is {loss_words(loss, facts.loss_scale)}, but only because the projections '
        f'hardly differ between pictures (feature std {std_words(share, facts)})',
        f'collapse: {cause}',
        remedy,
    )


def learning_rate(history: History, facts: Facts) -> Alarm | None:
    """Steps are so large that they undo what was learned.

    Looks at the last two records after the warm-up. Raised if the norm of the update is above 5 %
    of the norm of all parameters, or if the loss is above 90 % of chance (BYOL: 3.6 of 4). Updates
    are at most 0.8 % in the sample run and 0.7 % in the tests' tiny runs after the warm-up; with
    1,000 times their learning rate they are 12 % to 25 %. LARS with the paper's learning rates of
    3.2 to 7.2 and eta 1e-3 moves a layer by 0.3 % to 0.7 %, and momentum makes that a few times
    more.
    """
    blown_up = _blown_up(history, facts)
    if blown_up:
        return _alarm(
            history,
            'learning_rate',
            ALARM,
            f'{blown_up}, at a loss of {history[-1]["loss"]:.3g}',
            'the learning rate is too high',
            _lower_rate(facts),
        )
    last = history[-2:]
    if not judged(history) or last[0]['step'] <= facts.warmup_steps:
        return None
    steps = [step for step in map(_relative_step, last) if step is not None]
    step = min(steps) if len(steps) == len(last) else None
    loss = min(record['loss'] for record in last)
    chance = loss_share(loss, facts.loss_scale) > 0.9
    if not chance and (step is None or step <= 0.05):
        return None
    moved = (
        ''
        if step is None
        else f'a step moves the weights by {step:.1%} of their length (healthy: below 2 %), at '
    )
    return _alarm(
        history,
        'learning_rate',
        ALARM if chance or (step is not None and step > 0.1) else WATCH,
        f'{moved}a loss of {loss:.3g} (chance: {facts.loss_scale.chance:g})',
        'the learning rate is too high',
        _lower_rate(facts),
    )


def _lower_rate(facts: Facts) -> str:
    return (
        f'lower optimizer.base_learning_rate={facts.base_learning_rate:g} (a third is a good first '
        'try; AdamW takes a thousandth of the rates of LARS), or lengthen the warm-up, in a new '
        'workdir'
    )


def weight_decay(history: History, facts: Facts) -> Alarm | None:
    """There is no weight decay: networks can diverge (paper, Section 5, Network hyperparameters).

    Without it, weights before a normalisation only grow, which lowers the effective learning rate
    (arXiv:1706.05350). It becomes an alarm once the norm of the weights is 3 times that of the
    first record.
    """
    if facts.weight_decay > 0 or not _values((history[0], history[-1]), 'parameter_norm'):
        return None
    growth = history[-1]['parameter_norm'] / max(history[0]['parameter_norm'], 1e-12)
    return _alarm(
        history,
        'weight_decay',
        # Weights that grew by steps too large are not the fault of the weight decay.
        ALARM if growth > 3 and not _blown_up(history, facts) else WATCH,
        f'optimizer.weight_decay=0, and the weights are {growth:.2f} times as long as at step '
        f'{history[0]["step"]}',
        'nothing limits the length of the weights; long runs without weight decay diverge',
        'set optimizer.weight_decay (LARS: 1e-6, AdamW: 0.1), in a new workdir',
    )


def target_follows(history: History, facts: Facts) -> Alarm | None:
    """The target network copies the online network almost at once (tau_base below 0.9).

    Accuracy in the paper's Table 5a, 300 epochs: 72.5 % with a tau_base of 0.99, 68.4 % with 0.9,
    0.3 % with 0.
    """
    cosines = _values(history[-1:], 'online_target_cosine')
    if facts.tau_base >= 0.9 or not cosines:
        return None
    return _alarm(
        history,
        'target_follows',
        WATCH,
        f'target.tau_base={facts.tau_base:g}, and the cosine between the online and the target '
        f'projections is {cosines[0]:.4f}',
        'the target is no slow average of the online network, which can lead to collapse',
        'set target.tau_base to 0.99 (0.97 for short runs), in a new workdir',
    )


def small_norm_batch(history: History, facts: Facts) -> Alarm | None:
    """Batch statistics are computed from few examples, although the batch is larger.

    Batch normalisation loses accuracy below 16 examples (arXiv:1803.08494, Figure 1: 23.7 % error
    at 32 and at 16, 24.8 % at 8, 27.3 % at 4, 34.7 % at 2). Synchronised statistics agree between
    devices to 1e-6. In the tests, a layer that is not synchronised differs by 1e-1 between two
    devices with 8 examples each.
    """
    spreads = _values(history[-1:], 'stats_spread')
    if not spreads:
        return None
    spread = spreads[0]
    each = facts.batch_size // (facts.device_count * facts.passes)
    apart = facts.device_count > 1 and spread > 1e-3
    seen = each if apart else each * facts.device_count
    if seen >= min(32, facts.batch_size):
        return None
    split = f'{facts.device_count} device(s) and accumulate_steps={facts.passes}'
    where = f'batch statistics use {seen} of {facts.batch_size} examples at a time, over {split}'
    if apart:
        cause = (
            f'they are not synchronised: they differ by {spread:.1%} between devices, so some '
            "layer computes its own on each (Flax's BatchNorm is synchronised)"
        )
        remedy = "use Flax's BatchNorm, or have the layer average over the device axis"
    else:
        cause = 'accumulation splits the batch'
        remedy = 'lower accumulate_steps'
    return _alarm(
        history,
        'small_norm_batch',
        ALARM if seen < 16 else WATCH,
        where,
        cause,
        f'{remedy}, or raise batch_size to {math.ceil(32 / seen) * facts.batch_size} or more, '
        'in a new workdir',
    )


def input_bound(history: History, facts: Facts) -> Alarm | None:
    """The devices wait for pictures for more than 30 % of the time, in the last three records."""
    waits = _values(history[-3:], 'input_wait_fraction')
    if len(waits) < 3 or not judged(history):
        return None
    # The median, because one slow stretch (say, another job on the disk) is no trend.
    wait = sorted(waits)[1]
    if wait <= 0.3:
        return None
    if facts.workers < facts.cores:
        remedy = f'raise data.workers={facts.workers} to 0 (all {facts.cores} cores)'
    else:
        remedy = (
            f'data.workers={facts.workers} already uses all {facts.cores} cores: give the run more '
            f'cores, store smaller pictures, or lower views.image_size={facts.image_size}'
        )
    if facts.views_on == 'cpu':
        remedy += (
            '; or, in a new workdir, compute the colour augmentations on the accelerator with '
            'views.on=accelerator'
        )
    if facts.tile_size:
        remedy += (
            f'; if the decoded pictures exceed data.cache_gib={facts.cache_gib:g}, raise that '
            'first, or keep them on disk (data.cache)'
        )
    return _alarm(
        history,
        'input_bound',
        ALARM if wait > 0.6 else WATCH,
        f'the step had no batch for {wait:.0%} of the time (healthy: below 5 %)',
        'pictures are decoded and augmented more slowly than the step trains on them',
        remedy,
    )


def non_finite(step: int, values: Record, facts: Facts, saved: int) -> Alarm:
    """The alarm for a value that is not finite, which stops the run.

    Args:
      step: the step at which it was seen.
      values: the metrics of that step by name.
      facts: facts of the run.
      saved: the step of the newest checkpoint, 0 if there is none.
    """
    names = [name for name, value in values.items() if not math.isfinite(value)]
    shown = ', '.join(
        f'{words} {values[name]:.4g}'
        for name, words in (
            ('loss', 'loss'),
            ('gradient_norm', 'gradient norm'),
            ('learning_rate', 'learning rate'),
        )
        if name in values
    )
    kept = f'the checkpoint of step {saved}, from before it, is kept' if saved else 'none was saved'
    return Alarm(
        step,
        'non_finite',
        ALARM,
        f'{", ".join(names)} not finite ({shown}); {kept}',
        'the learning rate is too high, or the network overflows',
        f'lower optimizer.base_learning_rate={facts.base_learning_rate:g} or lengthen the warm-up, '
        'in a new workdir',
    )


_RULES = (
    collapse,
    trivial_loss,
    learning_rate,
    weight_decay,
    target_follows,
    small_norm_batch,
    input_bound,
)


def judged(history: History) -> bool:
    """Whether there are enough records to judge a trend."""
    return len(history) >= 2 and history[-1]['step'] >= FIRST_STEP


def loss_share(loss: float, scale: LossScale) -> float:
    """The position of a loss between the lowest loss (0) and chance (1)."""
    return (loss - scale.lowest) / (scale.chance - scale.lowest)


def loss_words(loss: float, scale: LossScale) -> str:
    """A loss with its range, such as '1.2 (lowest 0, chance 4)'."""
    return f'{loss:.3g} (lowest {scale.lowest:g}, chance {scale.chance:g})'


def share_of_std(record: Record, facts: Facts) -> float | None:
    """The feature std as a share of 1/sqrt(P), the std of evenly spread projections; or None."""
    std = record.get('feature_std')
    return None if std is None else std * math.sqrt(facts.projection_size)


def std_words(share: float, facts: Facts) -> str:
    """A share of std in words, such as '80% of 1/sqrt(128) (healthy: 70 % and more)'."""
    return f'{share:.0%} of 1/sqrt({facts.projection_size}) (healthy: 70 % and more)'


def _cause_of_collapse(history: History, facts: Facts) -> tuple[str, str]:
    """The likely cause and the remedy of a collapse, from the first record at or after FIRST_STEP.

    Earlier records would mislead, because the target starts as a copy of the online network.
    """
    first = next((r for r in history if r['step'] >= FIRST_STEP), history[-1])
    if first.get('prediction_projection_cosine', 0) > 0.9999:
        return (
            f'the predictor does nothing: predictions equal projections since step {first["step"]}',
            'add a predictor with a hidden layer behind the projector (predictor.hidden_size)',
        )
    has_target = 'online_target_cosine' in first
    if has_target and facts.tau_base < 0.9:
        return (
            f'target.tau_base={facts.tau_base:g}: the target follows the online network at once',
            'set target.tau_base to 0.99 (0.97 for short runs), in a new workdir',
        )
    early = first['step'] < FIRST_STEP
    if has_target and first['online_target_cosine'] > 0.9999 and not early:
        return (
            f'the target equals the online network, in spite of target.tau_base={facts.tau_base:g}:'
            ' a changed loss lacks its stop-gradient',
            'take the targets from the target network, inside jax.lax.stop_gradient',
        )
    large = any((_relative_step(record) or 0) > 0.1 for record in history)
    why = _blown_up(history, facts) or ('steps of more than 10 % of the weights' if large else '')
    if why:
        return (
            f'the learning rate (optimizer.base_learning_rate={facts.base_learning_rate:g}) is too '
            f'high: {why}',
            _lower_rate(facts),
        )
    if not has_target:
        return (
            'too high a learning rate, or views too alike',
            'lower optimizer.base_learning_rate, or strengthen views.*, in a new workdir',
        )
    return (
        'a predictor too weak or too slow for its target, too fast a target, or views too alike',
        f'raise target.tau_base={facts.tau_base:g} or predictor.hidden_size, lower '
        'optimizer.base_learning_rate, or strengthen views.*, in a new workdir',
    )


def _falls(history: History, facts: Facts) -> bool:
    """Whether the feature std falls to next to nothing, at whatever step.

    Networks begin with 0.6 of 1/sqrt(P) and more; one of another kind that begins with less is not
    judged before FIRST_STEP unless it falls to half of that.
    """
    shares = _stds(history, facts)
    return len(shares) > 1 and max(shares[-2:]) < 0.3 and shares[-1] <= max(shares) / 2


def _blown_up(history: History, facts: Facts) -> str:
    """Words on weights that grew by steps too large; '' if they did not.

    More than 3 times as long as at the start, and by more than 2 % of that for each step. Healthy
    ones of docs/monitors.md grow by 7 % at most. The growth hides the steps that made it: with
    AdamW at the rate of LARS a step of the sample run is 14 % of the weights at step 10, and 2 %
    at step 30, when they are 54 times as long.
    """
    for record in history if facts.initial_norm else ():
        growth = record.get('parameter_norm', 0) / facts.initial_norm
        if growth > 3 and growth - 1 > 0.02 * record['step']:
            return f'the weights are {growth:.0f} times as long at step {record["step"]} as before'
    return ''


def _values(records: Sequence[Record], name: str) -> list[float]:
    """The values of a metric in the records; empty unless all of them have it."""
    found = [record[name] for record in records if name in record]
    return found if len(found) == len(records) else []


def _stds(records: Sequence[Record], facts: Facts) -> list[float]:
    """`share_of_std` of each record; empty unless all of them have it."""
    return [std * math.sqrt(facts.projection_size) for std in _values(records, 'feature_std')]


def _relative_step(record: Record) -> float | None:
    """The norm of the update over the norm of all parameters; None if it was not measured."""
    if 'update_norm' not in record or not record.get('parameter_norm'):
        return None
    return record['update_norm'] / record['parameter_norm']


def _alarm(
    history: History, name: str, severity: str, evidence: str, cause: str, remedy: str
) -> Alarm:
    return Alarm(history[-1]['step'], name, severity, evidence, cause, remedy)
