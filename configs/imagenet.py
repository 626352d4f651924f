"""ImageNet as in the paper: ResNet-50, 224 pixels, batch 4096.

configs/imagenet.py:40|100|300|1000 chooses the number of epochs, 1000 without an argument. Learning
rate, weight decay and tau depend on it (paper, Appendix J; DeepMind byol/configs/byol.py, the
presets at its top). TFDS prepares imagenet2012 from archives that you must download yourself.
"""

import ml_collections

from configs import default

# epochs: base learning rate, weight decay, tau_base.
PRESETS = {
    '40': (0.45, 1e-6, 0.97),
    '100': (0.45, 1e-6, 0.99),
    '300': (0.3, 1e-6, 0.99),
    '1000': (0.2, 1.5e-6, 0.996),
}
ARGUMENTS = tuple(PRESETS)


def get_config(arg: str = '1000') -> ml_collections.ConfigDict:
    """Returns the locked config for one of ARGUMENTS."""
    if arg not in PRESETS:
        raise ValueError(
            f'configs/imagenet.py:{arg}: the number of epochs must be one of {", ".join(PRESETS)}.'
        )
    config = default.get_config()
    config.name = f'imagenet_{arg}'
    config.total_epochs = float(arg)
    config.views.antialias = False  # DeepMind byol/utils/dataset.py, _preprocess_image
    rate, decay, tau = PRESETS[arg]
    config.optimizer.base_learning_rate = rate
    config.optimizer.weight_decay = decay
    config.target.tau_base = tau
    config.data.source = 'tfds'
    config.data.name = 'imagenet2012'
    config.data.split = 'train'
    return config.lock()
