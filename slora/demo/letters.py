"""The source data: rendered letters, on which the demo's model was pretrained; generated, not downloaded.

Every glyph of every font is converted once to a signed distance field. On a distance field stroke thickness is
an offset and blur is the width of a ramp, so one batched affine resampling makes images that differ in font,
size, rotation, shear, position, thickness and softness.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from slora.errors import ConfigError

CLASSES = tuple(string.ascii_uppercase + string.ascii_lowercase)
IMAGE_SIZE = 16

# By name, not by listing the folder: a font that a matplotlib release adds would change every image. The
# folder's other fonts draw no Latin letters.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmti10",
    "cmtt10",
    "cmmi10",
)

# The atlas, in its own pixels: fine enough that a hairline of Computer Modern is two pixels wide.
_CANVAS = 96
_EM = 66
_BASELINE = 69

# The point of a glyph that lands on the image centre: halfway between the foot of a "p" and the top of an "A".
# It is the same for all glyphs, so height over the baseline still tells "c" from "C".
_ANCHOR_EM = 0.26

_SUPERSAMPLING = 2
_CHUNK = 512

# (low, high) of each uniform draw; lengths in pixels of the final image, angles in radians.
_SIZE = (12.5, 16.0)  # pixels per em
_ASPECT = (0.9, 1.1)
_ROTATION = (-0.2, 0.2)
_SHEAR = (-0.2, 0.2)
_SHIFT = (-1.2, 1.2)
_THICKEN = (-0.05, 0.5)
_SOFTNESS = (0.7, 2.0)
_BRIGHTNESS = (0.6, 1.0)
_NOISE = (0.0, 0.07)


@lru_cache(maxsize=1)
def _distance_fields() -> Tensor:
    """[fonts * classes, 96, 96] float32: distance to the outline in atlas pixels, positive inside the ink."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fields = np.empty((len(FONTS) * len(CLASSES), _CANVAS, _CANVAS), dtype=np.float32)
    for i, name in enumerate(FONTS):
        # The basic layout engine is part of every Pillow build; raqm is not.
        font = ImageFont.truetype(folder / f"{name}.ttf", _EM, layout_engine=ImageFont.Layout.BASIC)
        for j, letter in enumerate(CLASSES):
            canvas = Image.new("L", (_CANVAS, _CANVAS))
            ImageDraw.Draw(canvas).text((_CANVAS / 2, _BASELINE), letter, fill=255, font=font, anchor="ms")
            ink = np.asarray(canvas) > 127
            inside = ndimage.distance_transform_edt(ink)
            outside = ndimage.distance_transform_edt(~ink)
            fields[i * len(CLASSES) + j] = inside - outside
    return torch.from_numpy(fields)


def _sampling_grid(draw: dict[str, Tensor]) -> Tensor:
    """[n, 32, 32, 2] float32: where each point of the supersampled image lies in its glyph, as grid_sample wants."""
    points = IMAGE_SIZE * _SUPERSAMPLING
    offsets = (torch.arange(points, dtype=torch.float32) + 0.5) / _SUPERSAMPLING - IMAGE_SIZE / 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    x = x - draw["shift_x"][:, None, None]
    y = y - draw["shift_y"][:, None, None]
    cos, sin = draw["rotation"].cos()[:, None, None], draw["rotation"].sin()[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
    x = (x + draw["shear"][:, None, None] * y) / draw["aspect"][:, None, None]
    atlas_per_pixel = (_EM / draw["size"])[:, None, None]
    anchor_y = _BASELINE - _ANCHOR_EM * _EM - _CANVAS / 2
    return torch.stack((x * atlas_per_pixel, y * atlas_per_pixel + anchor_y), dim=-1) / (_CANVAS / 2)


def _render(glyphs: Tensor, draw: dict[str, Tensor]) -> Tensor:
    """[n, 1, 16, 16] float32 in [0, 1], without noise, of the glyphs with these atlas rows."""
    fields = _distance_fields()[glyphs, None]
    distance = F.grid_sample(fields, _sampling_grid(draw), padding_mode="border", align_corners=False)
    distance = distance * (draw["size"] / _EM)[:, None, None, None]
    distance = distance + draw["thicken"][:, None, None, None]
    ink = (distance / draw["softness"][:, None, None, None] + 0.5).clamp(0.0, 1.0)
    return F.avg_pool2d(ink, _SUPERSAMPLING) * draw["brightness"][:, None, None, None]


class Styled(NamedTuple):
    """Rendered letters and how each was drawn."""

    images: Tensor
    """[n, 1, 16, 16] float32 in [0, 1], light ink on black."""
    labels: Tensor
    """[n] int64, indices into `CLASSES`."""
    fonts: Tensor
    """[n] int64, indices into `FONTS`."""
    draw: dict[str, Tensor]
    """[n] float32 each, lengths in pixels and angles in radians: `size`, `aspect`, `rotation`, `shear`, `shift_x`,
    `shift_y`, `thicken`, `softness`, `brightness`, and `noise`, the standard deviation of the noise."""


def letters(n_per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render `n_per_class` images of each of the 52 letters, in random order.

    The same arguments give the same images on any machine, up to the rounding of its font rasteriser. Different
    seeds are independent draws from one distribution, so a held-out set is simply another seed.

    Args:
        n_per_class: images per letter, at least 1; n = 52 * n_per_class.
        seed: any integer from 0 up.

    Returns:
        images [n, 1, 16, 16] float32 in [0, 1], light ink on black, and labels [n] int64, indices into `CLASSES`.

    Raises:
        ConfigError: `n_per_class` is below 1, or `seed` is negative.
    """
    styled = styled_letters(n_per_class, seed)
    return styled.images, styled.labels


def styled_letters(n_per_class: int, seed: int, fonts: Sequence[str] = FONTS) -> Styled:
    """Render letters as `letters` does, in some of the fonts, and return with them how each was drawn.

    Args:
        fonts: names from `FONTS`, at least one.

    Raises:
        ConfigError: `n_per_class` is below 1, `seed` is negative, or `fonts` is empty or names an unknown font.
    """
    if n_per_class < 1:
        raise ConfigError(f"n_per_class={n_per_class} leaves no image to render; use 1 or more")
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative; use 0 or more")
    unknown = [name for name in fonts if name not in FONTS]
    if unknown or not fonts:
        raise ConfigError(f"fonts={list(fonts)} must name at least one of {', '.join(FONTS)}, and no other font")
    rng = np.random.default_rng(seed)
    n = n_per_class * len(CLASSES)
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), n_per_class))
    chosen = np.array([FONTS.index(name) for name in fonts])[rng.integers(len(fonts), size=n)]
    glyphs = torch.from_numpy(chosen * len(CLASSES) + labels)

    def uniform(bounds: tuple[float, float]) -> Tensor:
        return torch.from_numpy(rng.uniform(*bounds, size=n).astype(np.float32))

    draw = {
        "size": uniform(_SIZE),
        "aspect": uniform(_ASPECT),
        "rotation": uniform(_ROTATION),
        "shear": uniform(_SHEAR),
        "shift_x": uniform(_SHIFT),
        "shift_y": uniform(_SHIFT),
        "thicken": uniform(_THICKEN),
        "softness": uniform(_SOFTNESS),
        "brightness": uniform(_BRIGHTNESS),
        "noise": uniform(_NOISE),
    }
    # The gathered distance fields take 36 kB an image: in one piece, a training set would need a gigabyte.
    chunks = [
        _render(glyphs[start : start + _CHUNK], {k: v[start : start + _CHUNK] for k, v in draw.items()})
        for start in range(0, n, _CHUNK)
    ]
    images = torch.cat(chunks)
    noise = torch.from_numpy(rng.standard_normal(size=images.shape, dtype=np.float32))
    images = (images + draw["noise"][:, None, None, None] * noise).clamp_(0.0, 1.0)
    return Styled(images, torch.from_numpy(labels).long(), torch.from_numpy(chosen).long(), draw)
