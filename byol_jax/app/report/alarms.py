"""Alarms: what the monitors of a run say is going wrong, why, and what to do about it.

Everything here is a pure function of the records of metrics.jsonl and of a few facts of the config.
Thresholds lie between what healthy and broken runs were measured at (docs/monitors.md has the
table; tests/test_alarms.py provokes each alarm).
"""

from __future__ import annotations

import math

from byol_jax.app.report.alarm import ALARM, WATCH, Alarm, Facts, History, Record

# Trends are judged from this step on: before it even a healthy network is still what it was drawn.
FIRST_STEP = 20


def standing(history: History, facts: Facts) -> list[Alarm]:
    """The alarms that stand at the last record of a run, at most one of a name.

    Args:
      history: the records of metrics.jsonl so far, oldest first.
      facts: of the run's config.
    """
    if not history:
        return []
    found = (rule(history, facts) for rule in _RULES)
    return [alarm for alarm in found if alarm is not None]


def collapse(history: History, facts: Facts) -> Alarm | None:
    """The projections of all pictures become alike, or lie along few directions.

    Measured by the last two records: the feature std times sqrt(P) (healthy: 0.74 to 0.83 in the
    sample run, 0.8 to 0.86 in the tiny runs of the tests; SimSiam, arXiv:2011.10566, Figure 2:
    near 1; broken: below 0.25), and RankMe of the projections (healthy: 21 and more of 128, 7.9 of
    16; broken: 2.1 and less of 16). Of few rows RankMe is at most their number.
    """
    if not judged(history):
        return None
    size = facts.projection_size
    share = max(share_of_std(record, facts) for record in history[-2:])
    rank = max(record['rankme_projection'] for record in history[-2:])
    most = min(size, facts.monitored_rows)
    if share >= 0.5 and rank >= min(5, most / 4):
        return None
    severe = share < 0.3 or rank < min(3, most / 6)
    early = history[-1]['step'] <= facts.warmup_steps
    cause, remedy = _cause_of_collapse(history, facts)
    return _alarm(
        history,
        'collapse',
        ALARM if severe and not early else WATCH,
        f'the feature std is {share:.0%} of 1/sqrt({size}) (healthy: 70 % and more) and the '
        f'projections use {rank:.1f} of {most} directions (RankMe), at a loss of '
        f'{history[-1]["loss"]:.3g}',
        cause,
        remedy,
    )


def trivial_loss(history: History, facts: Facts) -> Alarm | None:
    """The loss is near 0 because all pictures are given the same projection.

    Below 0.1 of 8 (a cosine of 0.975 between prediction and target) with a feature std below 30 %
    of 1/sqrt(P): the sample run ends at 1.2, the tiny runs of the tests at 0.35 and more; without
    a predictor they are at 0.06 and 17 % after 50 steps.
    """
    if not judged(history):
        return None
    share = max(share_of_std(record, facts) for record in history[-2:])
    loss = max(record['loss'] for record in history[-2:])
    if loss >= 0.1 or share >= 0.3:
        return None
    cause, remedy = _cause_of_collapse(history, facts)
    return _alarm(
        history,
        'trivial_loss',
        ALARM,
        f'the loss is {loss:.3g} of 8, but only since the projections hardly differ between '
        f'pictures (feature std {share:.0%} of 1/sqrt({facts.projection_size}))',
        f'collapse: {cause}',
        remedy,
    )


def learning_rate(history: History, facts: Facts) -> Alarm | None:
    """Steps so large that what was learned is undone.

    After the warm-up, in the last two records: the length of a step over that of all parameters
    (healthy: 0.8 % at the highest in the sample run, 0.7 % after the warm-up of the tiny ones; at
    1,000 times their learning rate 12 % to 25 %; LARS at the paper's 3.2 to 7.2 and eta 1e-3 steps
    by 0.3 % to 0.7 % a layer, and momentum makes that a few times more), or a loss at the level of
    chance, 4, where prediction and target are orthogonal.
    """
    last = history[-2:]
    if not judged(history) or last[0]['step'] <= facts.warmup_steps:
        return None
    step = min(record['update_norm'] / record['parameter_norm'] for record in last)
    loss = min(record['loss'] for record in last)
    if step <= 0.05 and loss <= 3.6:
        return None
    return _alarm(
        history,
        'learning_rate',
        ALARM if step > 0.1 or loss > 3.6 else WATCH,
        f'a step moves the weights by {step:.1%} of their length (healthy: below 2 %), at a loss '
        f'of {loss:.3g} (chance: 4)',
        'the learning rate is too high',
        f'lower optimizer.base_learning_rate={facts.base_learning_rate:g} (a third is a good first '
        'try), or lengthen the warm-up, in a new workdir',
    )


def weight_decay(history: History, facts: Facts) -> Alarm | None:
    """No weight decay: the paper (Section 5, Network hyperparameters) saw networks diverge then.

    Weights in front of a normalisation only ever grow then, which lowers the effective learning
    rate (arXiv:1706.05350). An alarm once the weights are 3 times as long as in the first record.
    """
    if facts.weight_decay > 0:
        return None
    growth = history[-1]['parameter_norm'] / max(history[0]['parameter_norm'], 1e-12)
    return _alarm(
        history,
        'weight_decay',
        ALARM if growth > 3 else WATCH,
        f'optimizer.weight_decay=0, and the weights are {growth:.2f} times as long as at step '
        f'{history[0]["step"]}',
        'nothing holds the weights back; long runs without weight decay diverge',
        'set optimizer.weight_decay (LARS: 1e-6, AdamW: 0.1), in a new workdir',
    )


def target_follows(history: History, facts: Facts) -> Alarm | None:
    """A target that follows the online network at once.

    Paper, Table 5a, 300 epochs: 72.5 % with a tau_base of 0.99, 68.4 % with 0.9, 0.3 % with 0.
    """
    if facts.base_ema >= 0.9:
        return None
    cosine = history[-1]['online_target_cosine']
    return _alarm(
        history,
        'target_follows',
        WATCH,
        f'target.tau_base={facts.base_ema:g}, and the cosine between the online and the target '
        f'projections is {cosine:.4f}',
        'the target is no slow average of the online network, which invites collapse',
        'set target.tau_base to 0.99 (0.97 for short runs), in a new workdir',
    )


def small_norm_batch(history: History, facts: Facts) -> Alarm | None:
    """Batch statistics of few examples, although the batch is larger.

    Below 16 examples batch normalisation loses accuracy (arXiv:1803.08494, Figure 1: 23.7 % error
    at 32 and at 16, 24.8 % at 8, 27.3 % at 4, 34.7 % at 2). Statistics that are averaged over all
    devices agree between them to 1e-6; the tests' network of two devices of 8 with a normalisation
    of its own differs by 1e-1.
    """
    spread = history[-1]['stats_spread']
    each = facts.batch_size // (facts.device_count * facts.passes)
    apart = facts.device_count > 1 and spread > 1e-3
    seen = each if apart else each * facts.device_count
    if seen >= min(32, facts.batch_size):
        return None
    split = f'{facts.device_count} device(s) and accumulate_steps={facts.passes}'
    where = f'batch statistics are of {seen} of {facts.batch_size} examples at a time, over {split}'
    if apart:
        cause = (
            f'they are not synchronised: they differ by {spread:.1%} between devices, so some '
            "layer takes them by itself (Flax's own BatchNorm is synchronised)"
        )
        remedy = "use Flax's BatchNorm, or give the layer the device axis that it averages over"
    else:
        cause = 'accumulation splits the batch'
        remedy = 'lower accumulate_steps'
    return _alarm(
        history,
        'small_norm_batch',
        ALARM if seen < 16 else WATCH,
        where,
        cause,
        f'{remedy}, or raise batch_size to {math.ceil(32 / seen) * facts.batch_size} and more, '
        'in a new workdir',
    )


def input_bound(history: History, facts: Facts) -> Alarm | None:
    """The devices wait for pictures, by the last three records.

    The sample run waits 0.2 % to 1.5 % of its time; at 30 % a third of the machine is idle, and at
    60 % most of it.
    """
    waits = [r['input_wait_fraction'] for r in history[-3:] if 'input_wait_fraction' in r]
    if len(waits) < 3 or not judged(history):
        return None
    # The median: one slow stretch (another job on the disk) is no trend.
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
        remedy += "; or, in a new workdir, make the views' colours there with views.on=accelerator"
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
        'pictures are decoded and augmented more slowly than they are trained on',
        remedy,
    )


def non_finite(step: int, values: Record, facts: Facts, saved: int) -> Alarm:
    """A number that is not finite: the run stops.

    Args:
      step: it was seen at. values: the metrics of that step. facts: of the run's config.
      saved: the step of the newest checkpoint, 0 if there is none.
    """
    names = [name for name, value in values.items() if not math.isfinite(value)]
    kept = f'the checkpoint of step {saved}, from before it, is kept' if saved else 'none was saved'
    return Alarm(
        step,
        'non_finite',
        ALARM,
        f'{", ".join(names)} not finite (loss {values["loss"]:.4g}, gradient norm '
        f'{values["gradient_norm"]:.3g}, learning rate {values["learning_rate"]:.3g}); {kept}',
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


def _cause_of_collapse(history: History, facts: Facts) -> tuple[str, str]:
    """The likely cause and the remedy, by what the first judged record already shows.

    Not by an earlier one: the target starts as the online network.
    """
    first = next(r for r in history if r['step'] >= FIRST_STEP)
    if first['prediction_projection_cosine'] > 0.9999:
        return (
            f'the predictor does nothing: predictions equal projections since step {first["step"]}',
            'put a predictor with a hidden layer behind the projector (predictor.hidden_size)',
        )
    if facts.base_ema < 0.9:
        return (
            f'target.tau_base={facts.base_ema:g}: the target follows the online network at once',
            'set target.tau_base to 0.99 (0.97 for short runs), in a new workdir',
        )
    if first['online_target_cosine'] > 0.9999:
        return (
            f'the target is the online network itself, in spite of target.tau_base='
            f'{facts.base_ema:g}: a changed loss lacks its stop-gradient',
            'take the targets from the target network, inside jax.lax.stop_gradient',
        )
    if any(r['update_norm'] > 0.1 * r['parameter_norm'] for r in history):
        return (
            f'the learning rate (optimizer.base_learning_rate={facts.base_learning_rate:g}) is too '
            'high: steps of more than 10 % of the weights',
            'lower it to a third, or lengthen the warm-up, in a new workdir',
        )
    return (
        'a predictor too weak or too slow for its target, too fast a target, or views too alike',
        f'raise target.tau_base={facts.base_ema:g} or predictor.hidden_size, lower '
        'optimizer.base_learning_rate, or strengthen views.*, in a new workdir',
    )


def judged(history: History) -> bool:
    """Whether there is enough to see a trend in."""
    return len(history) >= 2 and history[-1]['step'] >= FIRST_STEP


def share_of_std(record: Record, facts: Facts) -> float:
    """The feature std over 1/sqrt(P), that of evenly spread projections."""
    return record['feature_std'] * math.sqrt(facts.projection_size)


def _alarm(
    history: History, name: str, severity: str, evidence: str, cause: str, remedy: str
) -> Alarm:
    return Alarm(history[-1]['step'], name, severity, evidence, cause, remedy)
