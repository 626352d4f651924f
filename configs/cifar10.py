"""CIFAR-10: ResNet-18 with the stem for small images, 32 pixels, batch 512, no blur.

configs/cifar10.py:200|800 chooses the number of epochs, 200 without an argument. The data is TFDS
cifar10; or class folders, with --config.data.source=folder --config.data.path=DIR; or an array on
the accelerator, with --config.data.source=array --config.data.path=FILE.npz
--config.views.on=accelerator (docs/data.md). Learning rate and weight decay are those of DeepMind's
small-scale set-up (configs/imagenette.py); tau depends on the number of epochs as in the paper,
Appendix J.

configs/cifar10.py:cpu is for two CPU cores: a ResNet of three blocks, 20 epochs of batch 128, with
1,000 training and 200 test pictures of each class. Make their arrays from class folders with

    python examples/make_array.py --folder=DIR/train --output=train.npz --per_class=1000
    python examples/make_array.py --folder=DIR/test --output=test.npz --per_class=200

and give them as --config.data.path=train.npz --config.evaluate.data_path=test.npz.
benchmarks/RESULTS.md tells how its learning rate, tau and first weights were found.
"""

import ml_collections

from configs import default

TAU = {'200': 0.99, '800': 0.996}
ARGUMENTS = (*TAU, 'cpu')


def get_config(arg: str = '200') -> ml_collections.ConfigDict:
    """Returns the locked config for one of ARGUMENTS."""
    if arg not in ARGUMENTS:
        raise ValueError(
            f'configs/cifar10.py:{arg}: the argument must be one of {", ".join(ARGUMENTS)}.'
        )
    config = default.get_config()
    config.name = f'cifar10_{arg}'
    config.total_epochs = 20.0 if arg == 'cpu' else float(arg)
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
    config.optimizer.base_learning_rate = 4.0 if arg == 'cpu' else 2.0
    config.optimizer.weight_decay = 1e-6
    config.target.tau_base = TAU.get(arg, 0.9)
    config.evaluate.crop_fraction = 1.0
    config.checkpoint.every_epochs = 10.0
    if arg == 'cpu':
        _cpu(config)
    return config.lock()


def _cpu(config: ml_collections.ConfigDict) -> None:
    config.data.source = 'array'
    config.data.name = ''
    for view in (config.views.view1, config.views.view2):
        view.crop_area = (0.2, 1.0)
    config.encoder.name = 'resnet'
    config.encoder.kwargs = {
        'stage_sizes': (1, 1, 1),
        'strides': (2, 2, 2),
        'width': 0.5,  # 32 channels in the stem and the first stage, then 64 and 128
        'small_images': True,
        'zero_init_residual': False,
    }
    config.projector.hidden_size = 512
    config.projector.output_size = 128
    config.predictor.hidden_size = 512
    config.batch_size = 128
    config.warmup_epochs = 2.0
    config.evaluate.knn_k = (200, 20)
    config.evaluate.knn_temperature = 0.1
    config.checkpoint.every_epochs = 5.0
    config.log.lidar_every_steps = 0
