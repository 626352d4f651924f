"""Your own folder of pictures: --config=configs/folder.py --config.data.path=DIR.

ResNet-50 at 224 pixels for one GPU. With fewer than about ten thousand pictures, keep the small
batch and train for many epochs.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the locked config."""
    config = default.get_config()
    config.name = 'folder'
    config.data.source = 'folder'
    config.data.held_out_fraction = 0.05
    config.batch_size = 256
    return config.lock()
