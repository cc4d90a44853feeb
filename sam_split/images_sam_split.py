"""Images of every kind as bytes in RGB.

This file is copied into each saved model folder. It imports torch, transformers and the standard library, PIL where
an image needs it, and opens no file but the images it is given.
"""

import os

import torch
from transformers.image_utils import load_image

LARGEST_IMAGE = 100_000_000  # pixels


def pixels_of(image, timeout=None):
    """An image as (3, height, width) uint8."""
    if isinstance(image, (str, os.PathLike)):
        image = _open(os.fspath(image), timeout)
    if hasattr(image, "convert"):  # a PIL image
        _check_size(image.height, image.width)
        if image.mode == "F":  # PIL's own conversion would make 0 to 1 black
            image = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).view(image.height, image.width)
            image = image / 255 if image.max() > 1 else image
        elif not image.mode.startswith("I"):
            image = load_image(image)
            image = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        else:  # PIL's own conversion would clip 16 bits
            kind = torch.int32 if image.mode == "I" else torch.uint16
            values = torch.frombuffer(bytearray(image.tobytes()), dtype=kind).view(image.height, image.width)
            image = (values.int().clamp(0, 65535) / 257).round().byte()
        channels_last = True
    else:
        channels_last = not isinstance(image, torch.Tensor)
        try:
            image = torch.as_tensor(image).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(image).__name__
            raise TypeError(f"an image must be a path, a PIL image, an array or a tensor, got {kind}") from error
    shape = tuple(image.shape)
    if image.ndim == 3 and ((channels_last and shape[2] in (1, 3, 4)) or shape[0] not in (1, 3, 4)):
        image = image.permute(2, 0, 1)  # (channels, height, width)
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or 0 in shape:
        raise ValueError(f"an image must be (height, width) with 1, 3 or 4 channels beside them, got {shape}")
    _check_size(*image.shape[1:])
    image = image[:3].expand(3, -1, -1)
    if image.dtype == torch.uint16:
        image = (image.int() / 257).round()
    elif image.dtype == torch.bool:
        image = image.byte() * 255
    elif image.is_floating_point():
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("a floating-point image must lie in [0, 1]; divide it by its largest possible value")
        image = (image.float() * 255).round()
    elif image.dtype != torch.uint8 and not (0 <= image.min() and image.max() <= 255):
        raise ValueError(f"an image of {image.dtype} must lie in [0, 255]; convert it to uint8 or uint16")
    return image.byte().contiguous()


def _open(path, timeout):
    try:
        from PIL import Image
    except ImportError:
        return load_image(path, timeout=timeout)  # says what is missing
    if not os.path.isfile(path):
        try:
            return load_image(path, timeout=timeout)
        except Exception as error:  # of the connection, of its library, or PIL's
            where = "" if "://" in path else ", which is no file here"
            raise ValueError(f"no image can be read from {path[:200]}{where}: {error}") from error
    with Image.open(path) as image:
        _check_size(image.height, image.width)
        image.load()
    return image


def _check_size(height, width):
    if height * width > LARGEST_IMAGE:
        raise ValueError(
            f"an image of {width} x {height} pixels is larger than {LARGEST_IMAGE // 10**6} MP; cut it into tiles or "
            "make it smaller"
        )
