"""Which operations make a view: the paper's two, and those that a config asks for."""

from __future__ import annotations

from typing import Any

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

    What both have in common are the operations' default values. The order is that of DeepMind's
    byol/utils/augmentations.py, postprocess.

    Args:
      image_size: side of the views, pixels; 224 in the paper.
      antialias: see `crop.crop_resize`. False is nearer to DeepMind's code.
      pictures: which of an example's pictures (`Source.keys`) feeds which view.
    """
    crop = Crop(image_size, antialias=antialias)
    first = (crop, Flip(), Jitter(), Gray(), Blur(1.0), Solarize(0.0))
    second = (crop, Flip(), Jitter(), Gray(), Blur(0.1), Solarize(0.2))
    return {'view1': View(first, pictures[0]), 'view2': View(second, pictures[1], partner=True)}


def config_views(views: settings.Views, pair_keys: tuple[str, str]) -> dict[str, View]:
    """The views of a config: {'view1', 'view2'}.

    Args:
      views: the section `views` of the settings.
      pair_keys: `data.pair_keys`.

    Raises:
      UserError: an operation does not exist or cannot be made so, or views.on='accelerator' and it
        has no JAX version.
    """
    made = {}
    for number, (name, view) in enumerate(views.named.items()):
        operations = config_operations(view, views.image_size, views.antialias)
        made[name] = View(operations, pair_keys[number], partner=number == 1)
        if views.on == 'accelerator':
            made[name].check_jax()
    return made


def config_operations(view: settings.View, image_size: int, antialias: bool) -> list[Operation]:
    """The operations of one view, `views.view1` say, of the settings.

    The flat keys are the arguments of the built-in operations; what stands beside a name in
    `operations` goes before them.
    """
    given: dict[str, dict[str, Any]] = {
        'crop': {
            'size': image_size,
            'area': view.crop_area,
            'ratio': view.crop_ratio,
            'antialias': antialias,
        },
        'flip': {'probability': view.flip},
        'jitter': {
            'probability': view.jitter,
            'brightness': view.brightness,
            'contrast': view.contrast,
            'saturation': view.saturation,
            'hue': view.hue,
        },
        'gray': {'probability': view.gray},
        'blur': {'probability': view.blur, 'sigma': view.blur_sigma},
        'solarize': {'probability': view.solarize, 'threshold': view.solarize_threshold},
    }
    return [
        OPERATIONS.build(name, {**given.get(name, {}), **kwargs})
        for name, kwargs in view.operations
    ]


def crop_and_flip(view: View) -> View:
    """A view's crop and flip alone, drawn as in the view itself: for the linear protocol."""
    return View([op for op in view.operations if isinstance(op, Resizing | Flip)], view.picture)
