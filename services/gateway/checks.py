"""What a request may say. Pure functions: a message in, an order out, or InvalidRequest that names the field."""

import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sdxs import control, sizes
from sdxs import images as files
from sdxs.errors import InvalidRequest, NotFound
from sdxs.lora.manifest import LoraManifest
from sdxs.noise import MAX_IMAGES
from sdxs.sizes import Size
from sdxs.v1 import control_pb2, decoder_pb2, gateway_pb2, lora_pb2
from services.fabric.models import ServedModel

MAX_PROMPT_CHARACTERS = 4096
MAX_SEED = 2**63 - 1
MAX_CONTROLS = 4
_JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class UnknownModel(NotFound):
    """A model this server does not have."""

    field = "model"


@dataclass(frozen=True)
class OrderedLora:
    """A LoRA of an order."""

    name: str
    digest: str
    scale: float
    networks: frozenset[str]
    """What it changes."""


@dataclass(frozen=True)
class Order:
    """A request that has been checked, every choice made."""

    model: ServedModel
    size: Size
    prompt: str
    seeds: tuple[int, ...]
    format: "decoder_pb2.ImageFormat"
    deterministic: bool
    controls: tuple[control_pb2.Control, ...] = ()
    """Each with the name of its ControlNet."""
    init_image: bytes = b""
    strength: float = 1.0
    loras: tuple[OrderedLora, ...] = ()


def _no_lora(digest: str) -> LoraManifest:
    raise NotFound(f"LoRA {digest!r} is not known here")


def order(
    request: gateway_pb2.GenerateRequest,
    models: Mapping[str, ServedModel],
    max_image_bytes: int,
    lora: Callable[[str], LoraManifest] = _no_lora,
) -> Order:
    """The order a request makes; its images are not read. Raises InvalidRequest, or NotFound for what is not served here.

    Args:
        lora: gives the manifest of each LoRA of the request, whose names are digests.
    """
    model = _model(request.model, models)
    size = sizes.chosen(request.width, request.height, model.width, model.size_step)
    n = request.n or 1
    if n > MAX_IMAGES:
        raise InvalidRequest("n", request.n, f"1 to {MAX_IMAGES}, 0 for 1")
    seed = request.seed if request.HasField("seed") else secrets.randbelow(2**32)
    if not 0 <= seed <= MAX_SEED - n + 1:
        raise InvalidRequest("seed", seed, f"0 to 2^63 - {n}")
    if request.format not in decoder_pb2.ImageFormat.values():
        raise InvalidRequest("format", request.format, "one of " + ", ".join(decoder_pb2.ImageFormat.keys()))
    prompt, seeds = _prompt(request.prompt), tuple(range(seed, seed + n))
    _bytes(request, max_image_bytes)
    controls = _controls(request, model)
    loras = tuple(_lora(each, lora(each.name)) for each in request.loras)
    return Order(
        model,
        size,
        prompt,
        seeds,
        request.format,
        request.deterministic,
        controls,
        request.init_image,
        _strength(request),
        loras,
    )


def job_id(request_id: str) -> str:
    """The id of the caller's choice, or a new one. Raises InvalidRequest for one that cannot be a key."""
    if request_id and not _JOB_ID.fullmatch(request_id):
        raise InvalidRequest("request_id", request_id, "1 to 64 of A-Z a-z 0-9 . _ -")
    return request_id or secrets.token_hex(16)


def known_job_id(name: str) -> str:
    """An id to ask about. Raises InvalidRequest for none, and for one that cannot be."""
    if not _JOB_ID.fullmatch(name):
        raise InvalidRequest("job_id", name, "an id from SubmitJob")
    return name


def job_requests(job: gateway_pb2.SubmitJobRequest, most: int) -> dict[str, gateway_pb2.GenerateRequest]:
    """The requests of a job, each by the name of its field. Raises InvalidRequest."""
    if job.priority not in gateway_pb2.JobPriority.values():
        raise InvalidRequest("priority", job.priority, "one of " + ", ".join(gateway_pb2.JobPriority.keys()))
    if not job.requests:
        return {"request": job.request}
    if job.HasField("request"):
        raise InvalidRequest("requests", f"{len(job.requests)} and `request`", "one of the two")
    if len(job.requests) > most:
        raise InvalidRequest("requests", len(job.requests), f"at most {most}")
    return {f"requests[{i}]": each for i, each in enumerate(job.requests)}


def _prompt(prompt: str) -> str:
    """The prompt; how many tokens it has is the text encoder's to say."""
    if not prompt.strip():
        raise InvalidRequest("prompt", prompt, "some text")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest("prompt", f"{len(prompt)} characters", f"at most {MAX_PROMPT_CHARACTERS} characters")
    return prompt


def _model(name: str, models: Mapping[str, ServedModel]) -> ServedModel:
    """The model of that name or digest, the first for no name."""
    if not name:
        return next(iter(models.values()))
    for model in models.values():
        if name in (model.name, model.digest):
            return model
    raise UnknownModel(f"model {name[:100]!r} is not served here; {', '.join(models)} is")


def _bytes(request: gateway_pb2.GenerateRequest, limit: int) -> None:
    """Of all images together."""
    found = len(request.init_image) + sum(len(each.image) for each in request.controls)
    if found > limit:
        name = "controls" if request.controls else "init_image"
        raise InvalidRequest(name, f"{found} bytes of images", f"at most {limit} bytes, all images together")


def _strength(request: gateway_pb2.GenerateRequest) -> float:
    """1 when none is given."""
    if not request.HasField("strength"):
        return 1.0
    if not request.init_image:
        raise InvalidRequest("strength", request.strength, "none without an init_image")
    if not 0 < request.strength <= 1:
        raise InvalidRequest("strength", request.strength, "above 0, at most 1")
    return request.strength


def _controls(request: gateway_pb2.GenerateRequest, model: ServedModel) -> tuple[control_pb2.Control, ...]:
    """The controls, each with its ControlNet's name. What is in the images is the ControlNet's room's to say."""
    if len(request.controls) > MAX_CONTROLS:
        raise InvalidRequest("controls", len(request.controls), f"at most {MAX_CONTROLS}")
    return tuple(_control(each, f"controls[{i}]", model) for i, each in enumerate(request.controls))


def _control(asked: control_pb2.Control, field: str, model: ServedModel) -> control_pb2.Control:
    """One control with every choice made."""
    if asked.image_uri:
        raise InvalidRequest(f"{field}.image_uri", asked.image_uri, "none on a stream: send the image itself")
    if not asked.image:
        raise InvalidRequest(f"{field}.image", "0 bytes", "a PNG, JPEG or WebP file")
    chosen = control_pb2.Control()
    chosen.CopyFrom(asked)
    chosen.scale = asked.scale if asked.HasField("scale") else 1.0
    control.check_scale(chosen.scale, field)
    chosen.controlnet = control.pick(model.controlnets, asked.type, asked.controlnet, field)
    if not asked.preprocessed and asked.type not in control.TYPES:
        raise InvalidRequest(f"{field}.type", asked.type, f"one of {', '.join(control.TYPES)}, or `preprocessed`")
    return chosen


def _lora(asked: lora_pb2.Lora, manifest: LoraManifest) -> OrderedLora:
    """One LoRA; whether it fits the model is the stages' to say."""
    return OrderedLora(manifest.name, manifest.digest, asked.scale, frozenset(manifest.networks))


def images(order: Order) -> list[tuple[str, bytes]]:
    """The image files of an order, each with its field."""
    found = [(f"controls[{i}].image", each.image) for i, each in enumerate(order.controls)]
    return [*found, ("init_image", order.init_image)] if order.init_image else found


def receipts(order: Order) -> list[str]:
    """What the file of each image of an order carries."""
    own = Size(order.model.width, order.model.height)
    steering = files.sized(order.size, own) | files.steering(order.controls, order.init_image, order.strength)
    steering |= files.styles(order.loras)
    return [files.receipt(order.prompt, seed, order.model.name, order.model.digest, steering) for seed in order.seeds]


def sha256(data: bytes) -> str:
    """Hexadecimal; empty for no bytes."""
    return hashlib.sha256(data).hexdigest() if data else ""
