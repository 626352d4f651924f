"""DIV2K: a few hundred 2K photographs, many tiles from each.

configs/div2k.py          TFDS div2k, which is downloaded; or, with --config.data.path=DIR, the
                          official folders (DIR holds DIV2K_train_HR) or div2k as prepared by TFDS;
                          --config.data.cache=DIR keeps decoded pictures on disk, not in memory
configs/div2k.py:lr_hr    view 1 from the low-resolution version of a picture, view 2 from the
                          high-resolution version; the same data
configs/div2k.py:sample   ten photographs that scikit-image and scikit-learn contain: no download,
                          minutes on a CPU
"""

import ml_collections

from configs import default

ARGUMENTS = ('', 'lr_hr', 'sample')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """Returns the locked config for one of ARGUMENTS."""
    if arg not in ARGUMENTS:
        raise ValueError(
            f"configs/div2k.py:{arg}: the argument must be one of 'lr_hr', 'sample' or nothing."
        )
    config = default.get_config()
    config.name = f'div2k_{arg}' if arg else 'div2k'
    config.batch_size = 256
    # 800 pictures give about 17,000 tiles, an 80th of ImageNet.
    config.total_epochs = 1000.0
    config.encoder.name = 'resnet50'
    config.optimizer.base_learning_rate = 0.2
    config.optimizer.weight_decay = 1.5e-6
    config.target.tau_base = 0.996
    config.checkpoint.every_epochs = 10.0

    data = config.data
    data.source = 'tfds'
    data.name = 'div2k/bicubic_x2'
    data.pair_keys = ('lr', 'hr') if arg == 'lr_hr' else ('hr', 'hr')
    data.tile_size = 512
    data.tile_stride = 256
    data.tile_shift = True  # without it, all 1,000 epochs show the same 17,000 tiles
    data.held_out_fraction = 0.1
    data.cache_gib = 8.0  # all 800 pictures, decoded
    config.evaluate.crop_fraction = 1.0  # a tile is classified as a whole
    if arg == 'sample':
        _sample(config)
    return config.lock()


def _sample(config: ml_collections.ConfigDict) -> None:
    """A run of 5 minutes on two CPU cores; benchmarks/RESULTS.md has its results."""
    config.data.source = 'sample'
    config.data.name = ''
    config.data.pair_keys = ('image', 'image')
    config.data.tile_size = 64
    config.data.tile_stride = 32
    config.data.tile_shift = False
    config.data.held_out_fraction = 0.2
    config.views.image_size = 48
    config.encoder.name = 'resnet'
    config.encoder.kwargs = {'stage_sizes': (1, 1, 1), 'width': 0.5}
    config.projector.hidden_size = 512
    config.projector.output_size = 128
    config.predictor.hidden_size = 512
    config.batch_size = 64
    config.total_epochs = None
    config.total_steps = 320
    config.warmup_epochs = None
    config.warmup_steps = 32
    config.optimizer.base_learning_rate = 2.0
    config.optimizer.weight_decay = 1e-6
    config.target.tau_base = 0.97
    config.checkpoint.every_epochs = None
    config.checkpoint.every_steps = 80
    config.log.every_steps = 20
    config.log.lidar_every_steps = 320
