"""A condition as a client asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdxs.control.images import fit, read_image
from sdxs.control.preprocessors import extract
from sdxs.errors import InvalidRequest
from sdxs.sizes import Size


@dataclass(frozen=True)
class Control:
    """An image that a generated one is to follow.

    Args:
        image: a PNG, JPEG or WebP file.
        type: the control type (`sdxs.control.TYPES`): it names the preprocessor, and picks the model's first ControlNet that knows it.
        controlnet: one of the model's ControlNets by its name, where the type alone does not say which.
        scale: how strongly the residuals count; 1 is as trained.
        guess: diffusers' guess mode: the residuals count 0.1 to 1.0, more the deeper they enter, on top of `scale`.
        preprocessed: the image is the map itself; it is only resized.
        image_uri: in place of `image`, one that a server knows by this name (`Client.upload`).
    """

    image: bytes = b""
    type: str = ""
    controlnet: str = ""
    scale: float = 1.0
    guess: bool = False
    preprocessed: bool = False
    image_uri: str = ""


MAX_SCALE = 2.0


def check_scale(scale: float, field: str) -> None:
    """Raises InvalidRequest."""
    if not 0 <= scale <= MAX_SCALE:  # not a number is not either
        raise InvalidRequest(f"{field}.scale", scale, f"0 to {MAX_SCALE:g}")


def map_of(control: Control, size: int | Size, field: str) -> np.ndarray:
    """The map that a ControlNet of images of that size reads, of a square for one number: uint8 (height, width, 3).

    Args:
        field: what the control is called in errors, such as `controls[0]`.

    Raises:
        InvalidRequest: the image cannot be read, or its type has no preprocessor.
        PreconditionFailed: the preprocessor is not installed.
    """
    if control.image_uri:
        raise InvalidRequest(f"{field}.image_uri", control.image_uri, "none without a server: the image itself")
    image_HWC = read_image(control.image, f"{field}.image")
    if control.preprocessed:
        return fit(image_HWC, Size.of(size).height, Size.of(size).width)
    return extract(image_HWC, control.type, size, f"{field}.type")


def pick(controlnets: Mapping[str, Sequence[str]], type_: str, controlnet: str, field: str) -> str:
    """Name of the ControlNet that a control asks for: by its name, or the first that was trained for the type, or that takes any.

    Args:
        controlnets: those of the model, each with its types; none: any type.
        field: what the control is called in errors, such as `controls[0]`.

    Raises:
        InvalidRequest: no such ControlNet, or none for the type; says which there are.
    """
    known = (
        "; ".join(f"{name} ({', '.join(types) or 'any type'})" for name, types in controlnets.items()) or "this model has none"
    )
    if controlnet:
        if controlnet not in controlnets:
            raise InvalidRequest(f"{field}.controlnet", controlnet, known)
        types = controlnets[controlnet]
        if type_ and types and type_ not in types:
            raise InvalidRequest(f"{field}.type", type_, f"one that ControlNet {controlnet} knows: {', '.join(types)}")
        return controlnet
    if not type_:
        raise InvalidRequest(f"{field}.type", type_, f"a type, or the name of a ControlNet: {known}")
    trained = [name for name, types in controlnets.items() if type_ in types]
    for name in trained + [name for name, types in controlnets.items() if not types]:
        return name
    raise InvalidRequest(f"{field}.type", type_, known)
