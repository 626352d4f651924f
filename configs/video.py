"""Your own clips: --config=configs/video.py --config.data.path=DIR.

DIR holds video files, folders of numbered frames, or both; the two views come from two frames of a
clip. ResNet-50 at 224 pixels for one GPU, for 100 epochs, because the frames of a clip resemble
each other; learning rate and tau are the paper's for 100 epochs (Appendix J). The largest distance
of the two frames, half a second at 30 frames a second, is our own choice.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the locked config."""
    config = default.get_config()
    config.name = 'video'
    config.data.source = 'video'
    config.data.max_frame_gap = 15
    config.data.held_out_fraction = 0.1  # of the clips, each as a whole
    config.batch_size = 256
    config.total_epochs = 100.0
    config.optimizer.base_learning_rate = 0.45
    return config.lock()
