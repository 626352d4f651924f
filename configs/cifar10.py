"""CIFAR-10: ResNet-18 with the stem for small images, 32 pixels, batch 512, no blur.

configs/cifar10.py:200|800 chooses the number of epochs, 200 without an argument. Data: TFDS
cifar10; class folders with --config.data.source=folder --config.data.path=DIR; or, all on the
accelerator, an array with --config.data.source=array --config.data.path=FILE.npz
--config.views.on=accelerator (docs/data.md). Learning rate and weight decay are those of DeepMind's
small-scale set-up (configs/imagenette.py); tau goes with the length as in the paper, Appendix J.
"""

import ml_collections

from configs import default

TAU = {'200': 0.99, '800': 0.996}
ARGUMENTS = tuple(TAU)


def get_config(arg: str = '200') -> ml_collections.ConfigDict:
    """Returns the locked config for one of ARGUMENTS."""
    if arg not in TAU:
        raise ValueError(
            f'configs/cifar10.py:{arg}: the number of epochs must be one of {", ".join(TAU)}.'
        )
    config = default.get_config()
    config.name = f'cifar10_{arg}'
    config.total_epochs = float(arg)
    config.batch_size = 512
    config.data.source = 'tfds'
    config.data.name = 'cifar10'
    # Mean and standard deviation of the training images' channels.
    config.views.mean = (0.4914, 0.4822, 0.4465)
    config.views.std = (0.2470, 0.2435, 0.2616)
    config.views.image_size = 32
    for view in (config.views.view1, config.views.view2):
        view.blur = 0.0
    config.encoder.name = 'resnet18'
    config.encoder.kwargs = {'small_images': True}
    config.optimizer.base_learning_rate = 2.0
    config.optimizer.weight_decay = 1e-6
    config.target.base_ema = TAU[arg]
    config.evaluate.crop_fraction = 1.0
    config.checkpoint.every_epochs = 10.0
    return config.lock()
