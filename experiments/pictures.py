"""Pictures inside a report: grids and animations of images as data URIs, without files."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image

_GAP = 2


def data_uri(content: bytes, kind: str) -> str:
    """`content` of media type image/`kind` as the source of an HTML image."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images float [n, H, W, C] in [0, 1] side by side: uint8 [height, width, C], white between."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels))
    for i, image in enumerate(images):
        top = _GAP + i // columns * (height + _GAP)
        left = _GAP + i % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return np.rint(255 * np.clip(sheet, 0, 1)).astype(np.uint8)


def png(sheet: np.ndarray, zoom: int = 2) -> bytes:
    """A picture uint8 [H, W, 1 or 3] as PNG."""
    buffer = io.BytesIO()
    _picture(sheet, zoom).save(buffer, format="PNG")
    return buffer.getvalue()


def gif(sheets: Sequence[np.ndarray], *, milliseconds: int = 500, zoom: int = 2) -> bytes:
    """Pictures one after another, over and over, the last one for longer, as an animated GIF."""
    frames = [_picture(sheet, zoom) for sheet in sheets]
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return buffer.getvalue()


def _picture(sheet: np.ndarray, zoom: int) -> PIL.Image.Image:
    picture = PIL.Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    size = (picture.width * zoom, picture.height * zoom)
    return picture.resize(size, PIL.Image.Resampling.NEAREST)
