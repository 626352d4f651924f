"""ImageNette, DeepMind's small-scale set-up: ResNet-18, 128 pixels, batch 256, 1000 epochs.

Numbers are from google-deepmind/deepmind-research byol/README.md, a set-up for one V100 GPU.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the locked config."""
    config = default.get_config()
    config.name = 'imagenette'
    config.total_epochs = 1000.0
    config.batch_size = 256
    config.data.source = 'tfds'
    config.data.name = 'imagenette/160px-v2'
    config.data.held_out_fraction = 0.0  # as in DeepMind's: trains on all 9,469 pictures
    config.views.image_size = 128
    config.views.antialias = False  # as in DeepMind's
    config.encoder.name = 'resnet18'
    config.optimizer.base_learning_rate = 2.0
    config.optimizer.weight_decay = 1e-6
    config.target.tau_base = 0.996
    config.checkpoint.every_epochs = 10.0
    return config.lock()
