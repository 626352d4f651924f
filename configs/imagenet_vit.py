"""ImageNet with a vision transformer: 224 pixels, patches of 16, AdamW, batch 4096, 300 epochs.

configs/imagenet_vit.py:ti|s|b chooses the size, s without an argument (DeiT, arXiv:2012.12877,
Table 1; MoCo v3's ViT-S has more heads: --config.encoder.kwargs.heads=12).

BYOL's own paper trains no transformers. The numbers are those of MoCo v3, which trains ViT-S and
ViT-B with a target network and BYOL's views. They are from facebookresearch/moco-v3: the command in
README.md under "ViT-Base with 8-node training, batch 4096", and the defaults in main_moco.py for
options that the command leaves out. For stability, the patch projection stays frozen at its random
initial values (arXiv:2104.02057, Section 4).

The method is BYOL, and this recipe is unmeasured. It differs from MoCo v3, whose loss is
contrastive, whose projector has three layers, whose projector and predictor end in a batch
normalisation (moco/builder.py), which decays biases and norms too (main_moco.py gives AdamW all
parameters), and which has no ViT-Ti. TFDS prepares imagenet2012 from archives that you must
download yourself.
"""

import ml_collections

from configs import default

SIZES = {'ti': 'vit_ti', 's': 'vit_s', 'b': 'vit_b'}
ARGUMENTS = tuple(SIZES)


def get_config(arg: str = 's') -> ml_collections.ConfigDict:
    """Returns the locked config for one of ARGUMENTS."""
    if arg not in SIZES:
        raise ValueError(
            f'configs/imagenet_vit.py:{arg}: the size must be one of {", ".join(SIZES)}.'
        )
    config = default.get_config()
    config.name = f'imagenet_vit_{arg}'
    config.data.source = 'tfds'
    config.data.name = 'imagenet2012'
    config.data.split = 'train'
    config.encoder.name = SIZES[arg]
    config.encoder.hidden_layer = 'norm'
    config.encoder.pool = 'cls'
    config.encoder.frozen = ('patch_embed',)  # --stop-grad-conv1
    config.total_epochs = 300.0  # --epochs=300
    config.warmup_epochs = 40.0  # --warmup-epochs=40
    config.batch_size = 4096  # --batch-size, default
    config.optimizer.name = 'adamw'  # --optimizer=adamw, with PyTorch's betas and epsilon
    config.optimizer.base_learning_rate = 1.5e-4  # --lr=1.5e-4, for a batch of 256
    config.optimizer.weight_decay = 0.1  # --weight-decay=.1
    config.target.tau_base = 0.99  # --moco-m, default; rises to 1 as with --moco-m-cos
    for view in (config.views.view1, config.views.view2):
        view.crop_area = (0.08, 1.0)  # --crop-min, default
    return config.lock()
