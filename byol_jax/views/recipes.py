"""The operations of the paper's two views, and of the views of a config."""

from __future__ import annotations

from byol_jax import settings
from byol_jax.names import Registry
from byol_jax.views.colors import Blur, Flip, Gray, Jitter, Solarize
from byol_jax.views.crop import Crop
from byol_jax.views.operation import Operation, Resizing
from byol_jax.views.view import View

OPERATIONS = Registry(
    'view operation',
    'views.view1.operations',
    {
        'crop': Crop,
        'flip': Flip,
        'jitter': Jitter,
        'gray': Gray,
        'blur': Blur,
        'solarize': Solarize,
    },
)


def paper_views(
    image_size: int = 224,
    *,
    antialias: bool = True,
    pictures: tuple[str, str] = ('image', 'image'),
) -> dict[str, View]:
    """The paper's two views, T and T' (arXiv:2006.07733, Appendix B, Table 6).

    The values that both views share are the operations' defaults. The order is that of DeepMind's
    byol/utils/augmentations.py, postprocess.

    Args:
      image_size: side of the views, pixels; 224 in the paper.
      antialias: see `crop.crop_resize`. False is nearer to DeepMind's code.
      pictures: key of the picture (`Source.keys`) that feeds each view.
    """
    crop = Crop(image_size, antialias=antialias)
    first = (crop, Flip(), Jitter(), Gray(), Blur(1.0), Solarize(0.0))
    second = (crop, Flip(), Jitter(), Gray(), Blur(0.1), Solarize(0.2))
    return {'view1': View(first, pictures[0]), 'view2': View(second, pictures[1], partner=True)}


def config_views(views: settings.Views, pair_keys: tuple[str, str]) -> dict[str, View]:
    """The views of a config: {'view1', 'view2'}.

    Args:
      views: the settings of the views.
      pair_keys: keys of the pictures that feed the two views (data.pair_keys).

    Raises:
      UserError: an operation does not exist, does not take its arguments, or has no JAX version
        while views.on='accelerator'.
    """
    made = {}
    for number, (name, view) in enumerate(views.named.items()):
        operations = config_operations(view, views.image_size, views.antialias)
        made[name] = View(operations, pair_keys[number], partner=number == 1)
        if views.on == 'accelerator':
            made[name].check_jax()
    return made


def config_operations(view: settings.View, image_size: int, antialias: bool) -> list[Operation]:
    """The operations of one view of the settings, such as `views.view1`.

    The view's other keys (`crop_area`, ..) are the arguments of the built-in operations; arguments
    given beside a name in `operations` override them.

    Args:
      view: the settings of the view.
      image_size: side of the view, pixels.
      antialias: see `crop.crop_resize`.
    """
    given = {
        name: {argument: getattr(view, key) for argument, key in keys.items()}
        for name, keys in settings.OPERATION_KEYS.items()
    }
    given['crop'] |= {'size': image_size, 'antialias': antialias}
    return [
        OPERATIONS.build(name, {**given.get(name, {}), **kwargs})
        for name, kwargs in view.operations
    ]


def crop_and_flip(view: View) -> View:
    """A view of only the crop and the flip, with their draws in `view`: for the linear protocol."""
    return View([op for op in view.operations if isinstance(op, Resizing | Flip)], view.picture)
