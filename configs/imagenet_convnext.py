"""ImageNet with ConvNeXt-T (arXiv:2201.03545): 224 pixels, AdamW, batch 4096, 300 epochs.

This recipe is our own, and unmeasured: there is no published one of BYOL for ConvNeXt. The numbers
are those of configs/imagenet_vit.py, MoCo v3's for transformers, the nearest published case: a
Siamese network with LayerNorm and AdamW. Nothing is frozen, since freezing helps a ViT's patch
projection only.

With labels, at the same batch size and number of epochs, ConvNeXt-T is trained with a base learning
rate of 2.5e-4 (4e-3 at 4096), a weight decay of 0.05, 20 epochs of warm-up and a drop_path of 0.1
(facebookresearch/ConvNeXt: TRAINING.md, "ImageNet-1K Training", and the defaults in main.py). Try
these next. TFDS prepares imagenet2012 from archives that you must download yourself.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the locked config."""
    config = default.get_config()
    config.name = 'imagenet_convnext'
    config.data.source = 'tfds'
    config.data.name = 'imagenet2012'
    config.data.split = 'train'
    config.encoder.name = 'convnext_t'
    config.encoder.hidden_layer = 'norm'  # after the pooling
    config.total_epochs = 300.0
    config.warmup_epochs = 40.0
    config.batch_size = 4096
    config.optimizer.name = 'adamw'
    config.optimizer.base_learning_rate = 1.5e-4
    config.optimizer.weight_decay = 0.1
    config.target.tau_base = 0.99
    return config.lock()
