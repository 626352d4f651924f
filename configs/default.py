"""Every config key there is, with its default: ImageNet, 300 epochs, as in the paper.

Numbers are from arXiv:2006.07733, Appendix B (views), F and G (architecture, optimisation) and J,
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
    config.seed = 0  # of the parameters, the order of the data and every random choice of a view
    config.total_epochs = config_dict.placeholder(float)  # length of the run; or total_steps
    config.total_steps = config_dict.placeholder(int)  # length in optimizer steps; or total_epochs
    config.total_epochs = 300.0
    config.warmup_epochs = config_dict.placeholder(float)  # linear warm-up; or warmup_steps
    config.warmup_steps = config_dict.placeholder(int)  # warm-up in steps; or warmup_epochs
    config.warmup_epochs = 10.0
    config.batch_size = 4096  # global: examples an optimizer step, over all devices and hosts
    config.accumulate_steps = 1  # split each batch into this many passes to save memory
    config.precision = 'float32'  # compute type, 'float32' or 'bfloat16'; parameters stay float32

    data = config.data = ml_collections.ConfigDict()
    data.source = 'folder'  # 'sample', 'folder', 'video', 'tfds', 'array', or your own by its name
    data.kwargs = ml_collections.ConfigDict()  # arguments of a source of your own
    data.kwargs.lock()
    data.path = config_dict.placeholder(str)  # folder; TFDS's data_dir; 'array': the .npz file
    data.name = ''  # name of the TFDS data set, such as 'imagenet2012' or 'div2k/bicubic_x2'
    data.split = 'train'  # TFDS split to train on; slices and sums too: 'train[:10%]+test'
    data.download = True  # TFDS downloads what is not on disk; False: it never asks the network
    data.label_key = 'auto'  # TFDS feature with the label; 'auto': the one there is; '': none
    data.pair_keys = ('image', 'image')  # which picture feeds which view; or ('*_left', '*_right')
    data.max_frame_gap = 15  # 'video': view 2 is at most so many frames away; 0: the same frame
    data.tile_size = 0  # cut pictures into square tiles of this many pixels; 0: whole pictures
    data.tile_stride = 0  # pixels from one tile to the next; 0: tile_size
    data.tile_shift = False  # shift the grid of the training tiles anew in each epoch
    data.held_out_fraction = 0.0  # share kept from training: of examples, clips, or tiles' area
    data.held_out_seed = 0  # which examples are held out; not the run's seed, so runs compare
    data.cache_gib = 2.0  # memory for the decoded pictures that tiles are cut from, GiB
    data.cache = ''  # folder to keep all pictures in, decoded, in place of cache_gib; '': none
    data.max_megapixels = 200.0  # larger pictures (by their header) are refused, not decoded
    data.max_bad_fraction = 0.01  # share of unreadable pictures a run bears, at least one; 0: none
    data.index = 'auto'  # keeps the list of a folder's files: 'auto' in ~/.cache; a file; '': none
    data.workers = 0  # examples prepared in parallel; 0: one per CPU core
    data.prefetch = 2  # batches prepared ahead of the step

    views = config.views = ml_collections.ConfigDict()
    views.image_size = 224  # side of both views, pixels
    views.antialias = True  # smooth what is shrunk; False: faster, and as in DeepMind's code
    views.on = 'cpu'  # or 'accelerator': colours, blur and flip in the step, an array's crops too
    views.mean = (0.485, 0.456, 0.406)  # subtracted on the device; DeepMind byol/utils/dataset.py
    views.std = (0.229, 0.224, 0.225)  # divided by on the device; same source
    views.view1 = get_view(blur=1.0, solarize=0.0)  # T
    views.view2 = get_view(blur=0.1, solarize=0.2)  # T'

    encoder = config.encoder = ml_collections.ConfigDict()
    encoder.name = 'resnet50'  # a registered name, or 'package.module:Class' of your own
    encoder.kwargs = ml_collections.ConfigDict()  # arguments of the encoder's constructor
    encoder.kwargs.lock()
    encoder.hidden_layer = 'avgpool'  # the layer that is the representation; or its index: '-2'
    encoder.pool = 'mean'  # of a layer [B, tokens, D]: 'mean', 'cls' (the first) or 'flatten'
    encoder.frozen = ()  # layers whose parameters stay as they start, such as ('patch_embed',)
    encoder.init_from = ''  # start from these weights: an encoder/, a workdir, or torchvision:FILE
    encoder.freeze_steps = 0  # train projector and predictor alone for this many steps

    config.method = ml_collections.ConfigDict()
    config.method.name = 'byol'  # what is learned; or 'package.module:Class' of your own
    config.method.kwargs = ml_collections.ConfigDict()  # its arguments
    config.method.kwargs.lock()

    config.projector = ml_collections.ConfigDict()
    config.projector.hidden_size = 4096  # width of the hidden layer
    config.projector.output_size = 256  # size of the projection and of the prediction
    config.predictor = ml_collections.ConfigDict()
    config.predictor.hidden_size = 4096  # width of the hidden layer

    optimizer = config.optimizer = ml_collections.ConfigDict()
    optimizer.name = 'lars'  # as in the paper; 'adamw'; or 'package.module:factory', as optax has
    optimizer.base_learning_rate = 0.3  # at batch 256; the peak is base x batch_size / 256
    optimizer.weight_decay = 1e-6  # on kernels only, never on biases and norms
    # Its other arguments: momentum=0.9 and trust_coefficient=1e-3 of LARS, b1=0.9, b2=0.999 and
    # epsilon=1e-8 of AdamW are what they are unless given here.
    optimizer.kwargs = ml_collections.ConfigDict()  # such as momentum
    optimizer.kwargs.lock()

    config.target = ml_collections.ConfigDict()
    config.target.tau_base = 0.99  # tau at step 0; rises to 1 at the last step

    checkpoint = config.checkpoint = ml_collections.ConfigDict()
    checkpoint.every_epochs = config_dict.placeholder(float)  # or every_steps
    checkpoint.every_steps = config_dict.placeholder(int)  # or every_epochs
    checkpoint.every_epochs = 1.0
    checkpoint.keep = 3  # newest checkpoints kept

    log = config.log = ml_collections.ConfigDict()
    log.every_steps = 50  # steps between two lines of metrics.jsonl
    log.tensorboard = True  # write TensorBoard events too
    log.wandb = False  # write to Weights & Biases too, offline unless WANDB_MODE=online is set
    log.lidar_every_steps = 1000  # steps between two LiDAR of 1,000 views, if logged then; 0: never

    evaluate = config.evaluate = ml_collections.ConfigDict()
    evaluate.every_epochs = 10.0  # measure the encoder so often, at a logged step; 0: never
    evaluate.online_probe = True  # train a linear classifier beside the encoder, if labels exist
    evaluate.protocols = (  # what --mode=evaluate measures, in this order; docs/evaluation.md
        'spectrum',
        'knn',
        'kmeans',
        'retrieval',
        'ridge',
        'probe',
        'linear',
    )
    evaluate.data_path = config_dict.placeholder(str)  # a test set: another folder, .npz, data_dir
    evaluate.data_split = config_dict.placeholder(str)  # a test set: another split, for TFDS
    evaluate.knn_k = (20, 200)  # neighbours that vote; the table of a run takes the first number
    evaluate.knn_temperature = 0.07  # a neighbour's vote is exp(cosine / temperature)
    evaluate.batch_size = 64  # images a forward pass
    evaluate.max_gallery = 50_000  # training images searched for neighbours, at most
    evaluate.max_queries = 10_000  # held-out or test images classified, at most
    evaluate.crop_fraction = 0.875  # centre crop, of the shorter side (224 / 256 in the paper)
    evaluate.linear_learning_rates = (0.4, 0.3, 0.2, 0.1, 0.05)  # at batch 256; one is chosen
    evaluate.linear_epochs = 80  # passes over the training images, each with new crops
    evaluate.linear_batch_size = 1024  # images a step of the linear classifier
    evaluate.retrieval_pool = 1000  # images among whose views the other view is sought

    # Your own classes that watch a run: 'package.module:Class' or ('package.module:Class', {..}).
    config.hooks = ()  # your own classes that watch a run: docs/own.md
    return config
