"""A sheet of generated images as one picture: a row a method, a column a class."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

_LABEL_WIDTH, _CELL, _GAP = 210, 56, 4


def png(rows: Sequence[tuple[str, np.ndarray, Any]], side: int) -> bytes:
    """The picture as PNG.

    Args:
      rows: label, images float [n, H, W, C] in [0, 1], and which codes bool [>= n, side * side]
        were drawn again (tinted where that is some of them, not all); None for no tint.
      side: codes along a side of an image.
    """
    columns = max(len(images) for _, images, _ in rows)
    step = _CELL + _GAP
    sheet = PIL.Image.new("RGB", (_LABEL_WIDTH + columns * step, len(rows) * step + _GAP), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    for i, (label, images, marked) in enumerate(rows):
        top = _GAP + i * step
        pen.text((6, top + _CELL // 2 - 6), label, fill="black")
        tint = marked is not None and not marked.all()
        for j, image in enumerate(images):
            shade = marked[j].reshape(side, side) if marked is not None and tint else None
            sheet.paste(_cell(image, shade), (_LABEL_WIDTH + j * step, top))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _cell(image: np.ndarray, marked: np.ndarray | None) -> PIL.Image.Image:
    """One image float [H, W, C], grey or coloured, with a red tint over marked codes."""
    pixels = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    pixels = np.clip(pixels, 0, 1)
    if marked is not None:
        scale = image.shape[0] // marked.shape[0]
        cells = np.kron(marked, np.ones((scale, scale)))[..., None]
        pixels = pixels * (1 - 0.35 * cells) + 0.35 * cells * np.array([0.9, 0.15, 0.1])
    picture = PIL.Image.fromarray((255 * pixels).astype(np.uint8))
    return picture.resize((_CELL, _CELL), PIL.Image.Resampling.NEAREST)
