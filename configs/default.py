"""All config keys with their defaults: ImageNet, 300 epochs, as in the paper.

Numbers are from arXiv:2006.07733, Appendices B (views), F and G (architecture, optimisation) and J,
and from google-deepmind/deepmind-research byol/configs/byol.py, unless the comment says otherwise.
"""

import ml_collections
from ml_collections import config_dict


def get_view(blur: float, solarize: float) -> ml_collections.ConfigDict:
    """One of the two asymmetric views, T or T' (paper, Appendix B, Table 6)."""
    view = ml_collections.ConfigDict()
    view.crop_area = (0.08, 1.0)  # crop area, fraction of the image, uniform
    view.crop_ratio = (3 / 4, 4 / 3)  # crop width / height, log-uniform
    view.flip = 0.5  # probability of a left-right flip
    view.jitter = 0.8  # probability of colour jitter
    view.brightness = 0.4  # largest brightness shift, fraction of full scale
    view.contrast = 0.4  # largest relative contrast change
    view.saturation = 0.2  # largest relative saturation change
    view.hue = 0.1  # largest hue shift, turns of the colour circle
    view.gray = 0.2  # probability of grey
    view.blur = blur  # probability of Gaussian blur
    view.blur_sigma = (0.1, 2.0)  # blur sigma, pixels of the view, uniform
    view.solarize = solarize  # probability of solarization
    view.solarize_threshold = 0.5  # values from here up are inverted, fraction of full scale
    view.operations = (  # in this order; or 'package.module:Class' of your own: docs/views.md
        'crop',
        'flip',
        'jitter',
        'gray',
        'blur',
        'solarize',
    )
    return view


def get_config() -> ml_collections.ConfigDict:
    """Returns the default config, unlocked, for other configs to change and lock."""
    config = ml_collections.ConfigDict()
    config.name = 'default'  # names the default workdir: runs/<name>
    config.seed = 0  # seed of the parameters, the order of the data and the views' random numbers
    config.total_epochs = config_dict.placeholder(float)  # length of the run; or total_steps
    config.total_steps = config_dict.placeholder(int)  # length in optimizer steps; or total_epochs
    config.total_epochs = 300.0
    config.warmup_epochs = config_dict.placeholder(float)  # linear warm-up; or warmup_steps
    config.warmup_steps = config_dict.placeholder(int)  # warm-up in steps; or warmup_epochs
    config.warmup_epochs = 10.0
    config.batch_size = 4096  # examples in an optimizer step, over all devices and hosts
    config.accumulate_steps = 1  # split each batch into this many microbatches, to save memory
    config.precision = 'float32'  # compute type, 'float32' or 'bfloat16'; parameters stay float32

    data = config.data = ml_collections.ConfigDict()
    data.source = 'folder'  # or 'sample', 'video', 'tfds', 'array', or your 'package.module:Class'
    data.kwargs = ml_collections.ConfigDict()  # arguments of your own source
    data.kwargs.lock()
    data.path = config_dict.placeholder(str)  # the folder; TFDS's data_dir; or an array's .npz file
    data.name = ''  # name of the TFDS data set, such as 'imagenet2012' or 'div2k/bicubic_x2'
    data.split = 'train'  # TFDS split to train on; slices and sums too: 'train[:10%]+test'
    data.download = True  # TFDS may download a data set that is not on disk; False: no network
    data.label_key = 'auto'  # TFDS feature with the label; 'auto': the labels there are; '': none
    data.exclude = ()  # files and folders left out, by patterns: ('*_mask.png', 'thumbnails')
    data.pair_keys = ('image', 'image')  # which picture feeds which view; or ('*_left', '*_right')
    data.max_frame_gap = 15  # 'video': largest distance of view 2, frames; 0: the same frame
    data.tile_size = 0  # cut pictures into square tiles of this many pixels; 0: whole pictures
    data.tile_stride = 0  # pixels from one tile to the next; 0: tile_size
    data.tile_shift = False  # shift the grid of the training tiles in every epoch
    data.held_out_fraction = 0.0  # share kept out of training: of examples, clips, or tiles' area
    data.held_out_seed = 0  # chooses the held-out examples, the same for runs of different `seed`
    data.cache_gib = 2.0  # memory for the decoded pictures that tiles are cut from, GiB
    data.cache = ''  # folder that keeps all decoded pictures, instead of cache_gib; '': none
    data.max_megapixels = 200.0  # pictures with a larger size in their header are not decoded
    data.max_bad_fraction = 0.01  # largest share of unreadable pictures, at least one file; 0: none
    data.index = 'auto'  # file that keeps a folder's file list; 'auto': in ~/.cache; '': none
    data.workers = 0  # how many examples are prepared in parallel; 0: one per CPU core
    data.prefetch = 2  # how many batches are prepared ahead of the step

    views = config.views = ml_collections.ConfigDict()
    views.image_size = 224  # side of both views, pixels
    views.antialias = True  # smooth when shrinking; False: faster, and as in DeepMind's code
    views.on = 'cpu'  # or 'accelerator': all but the crop in the step, and an array's crops too
    views.mean = (0.485, 0.456, 0.406)  # subtracted on the device; DeepMind byol/utils/dataset.py
    views.std = (0.229, 0.224, 0.225)  # divided by on the device; same source
    views.view1 = get_view(blur=1.0, solarize=0.0)  # T
    views.view2 = get_view(blur=0.1, solarize=0.2)  # T'

    encoder = config.encoder = ml_collections.ConfigDict()
    encoder.name = 'resnet50'  # a registered name, or 'package.module:Class' of your own
    encoder.kwargs = ml_collections.ConfigDict()  # arguments of the encoder's class
    encoder.kwargs.lock()
    encoder.hidden_layer = 'avgpool'  # path or index ('-2') of the layer that is the representation
    encoder.pool = 'mean'  # pools a layer [B, tokens, D]: 'mean', 'cls' (the first) or 'flatten'
    encoder.frozen = ()  # layers whose parameters are not trained, such as ('patch_embed',)
    encoder.init_from = ''  # start from these weights: an encoder/, a workdir, or torchvision:FILE
    encoder.freeze_steps = 0  # train projector and predictor alone for this many steps

    config.method = ml_collections.ConfigDict()
    config.method.name = 'byol'  # the method; or 'package.module:Class' of your own
    config.method.kwargs = ml_collections.ConfigDict()  # arguments of the method's class
    config.method.kwargs.lock()

    config.projector = ml_collections.ConfigDict()
    config.projector.hidden_size = 4096  # width of the hidden layer
    config.projector.output_size = 256  # width of the projection and of the prediction
    config.predictor = ml_collections.ConfigDict()
    config.predictor.hidden_size = 4096  # width of the hidden layer

    optimizer = config.optimizer = ml_collections.ConfigDict()
    optimizer.name = 'lars'  # or 'adamw', or 'package.module:factory' in the form of optax's
    optimizer.base_learning_rate = 0.3  # at batch 256; the peak is base x batch_size / 256
    optimizer.weight_decay = 1e-6  # on kernels only, never on biases and norms
    # Defaults: momentum=0.9 and trust_coefficient=1e-3 of LARS; b1=0.9, b2=0.999 and epsilon=1e-8
    # of AdamW.
    optimizer.kwargs = ml_collections.ConfigDict()  # other arguments, such as momentum
    optimizer.kwargs.lock()

    config.target = ml_collections.ConfigDict()
    config.target.tau_base = 0.99  # tau at step 0; rises to 1 at the last step

    checkpoint = config.checkpoint = ml_collections.ConfigDict()
    checkpoint.every_epochs = config_dict.placeholder(float)  # or every_steps; 0: the last only
    checkpoint.every_steps = config_dict.placeholder(int)  # or every_epochs
    checkpoint.every_epochs = 1.0
    checkpoint.keep = 3  # how many of the newest checkpoints are kept

    log = config.log = ml_collections.ConfigDict()
    log.every_steps = 50  # steps from one line of metrics.jsonl to the next
    log.tensorboard = True  # also write TensorBoard events
    log.wandb = False  # also write to Weights & Biases, offline unless WANDB_MODE=online is set
    log.lidar_every_steps = 1000  # steps from one LiDAR to the next, at logged steps only; 0: never

    evaluate = config.evaluate = ml_collections.ConfigDict()
    evaluate.every_epochs = 10.0  # epochs between evaluations, at logged steps only; 0: never
    evaluate.online_probe = True  # train a linear classifier beside the encoder, if labels exist
    evaluate.protocols = (  # the protocols of --mode=evaluate, in this order: docs/evaluation.md
        'spectrum',
        'knn',
        'kmeans',
        'retrieval',
        'ridge',
        'probe',
        'linear',
    )
    evaluate.data_path = config_dict.placeholder(str)  # test set: another folder, .npz or data_dir
    evaluate.data_split = config_dict.placeholder(str)  # test set: another split, for TFDS
    evaluate.knn_k = (20, 200)  # numbers of neighbours that vote; a run's table has the first
    evaluate.knn_temperature = 0.07  # a neighbour's vote is exp(cosine / temperature)
    evaluate.batch_size = 64  # images in a forward pass
    evaluate.max_gallery = 50_000  # largest number of training images to search for neighbours
    evaluate.max_queries = 10_000  # largest number of held-out or test images to classify
    evaluate.crop_fraction = 0.875  # centre crop over the shorter side (224 / 256 in the paper)
    evaluate.linear_learning_rates = (0.4, 0.3, 0.2, 0.1, 0.05)  # at batch 256; the best is chosen
    evaluate.linear_epochs = 80  # passes over the training images, each with new crops
    evaluate.linear_batch_size = 1024  # images in a step of the linear classifier
    evaluate.retrieval_pool = 1000  # number of images among which a view's partner is searched

    # 'package.module:Class' or ('package.module:Class', {..}) each.
    config.hooks = ()  # your own classes that watch a run: docs/own.md
    return config
