"""Records and alarms of invented runs, and the facts by which they are judged."""

from __future__ import annotations

import math

from tiny_runs import make_config

from byol_jax.app.alarms import Alarm, facts_of
from byol_jax.app.plan import make_plan
from byol_jax.methods.byol import Byol
from byol_jax.settings import Settings
from configs import div2k

CONFIG = Settings.of(div2k.get_config('sample'))
PLAN = make_plan(CONFIG, 3409, 1)
FACTS = facts_of(CONFIG, PLAN, Byol.loss_scale)
# Steps after the warm-up of the sample run.
LATE = range(100, 200, 10)


def record(step, share=0.8, **more):
    """A record like the healthy sample run's; `share` is the feature std times sqrt(P)."""
    return {
        'step': step,
        'epoch': step / 53,
        'loss': 1.2,
        'learning_rate': 0.4,
        'tau': 0.99,
        'feature_std': share / math.sqrt(FACTS.projection_size),
        'representation_std': 0.05,
        'rankme_projection': 25.0,
        'rankme_representation': 24.0,
        'alignment': 0.6,
        'uniformity': -2.0,
        'online_target_cosine': 0.9,
        'prediction_target_cosine': 0.7,
        'prediction_projection_cosine': 0.8,
        'gradient_norm': 1.0,
        'update_norm': 0.1,
        'parameter_norm': 50.0,
        'stats_spread': 0.0,
        'images_per_second': 100.0,
        'input_wait_fraction': 0.01,
        'bad_files': 0,
    } | more


def alarm(name, severity, step=110):
    words = ('', '', '') if severity == 'over' else ('seen & measured', 'a cause', 'do <this>')
    return Alarm(step, name, severity, *words)


def healthy(step, **changes):
    """A record like those of the sample run."""
    return {
        'step': step,
        'loss': 1.2,
        'learning_rate': 0.5,
        'feature_std': 0.072,
        'rankme_projection': 25.0,
        'online_target_cosine': 0.96,
        'prediction_projection_cosine': 0.8,
        'gradient_norm': 2.0,
        'update_norm': 0.1,
        'parameter_norm': 61.0,
        'stats_spread': 0.0,
        'input_wait_fraction': 0.01,
        **changes,
    }


def facts(config, devices=1):
    settings = Settings.of(config)
    return facts_of(settings, make_plan(settings, 10_000, devices), Byol.loss_scale)


def sample_config(**changes):
    return make_config(projector__output_size=128, **changes)
