"""What a request may say. Pure functions: a message in, an order out, or InvalidRequest that names the field."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from sdxs.errors import InvalidRequest, NotFound
from sdxs.noise import MAX_IMAGES
from sdxs.v1 import decoder_pb2, gateway_pb2

MAX_PROMPT_CHARACTERS = 4096
MAX_SEED = 2**63 - 1
_JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class UnknownModel(NotFound):
    """A model this server does not have."""

    field = "model"


@dataclass(frozen=True)
class ServedModel:
    """What the gateway knows of a model it serves."""

    name: str
    digest: str
    width: int
    height: int
    max_prompt_tokens: int


@dataclass(frozen=True)
class Order:
    """A request that has been checked, every choice made."""

    model: ServedModel
    prompt: str
    seeds: tuple[int, ...]
    format: "decoder_pb2.ImageFormat"
    deterministic: bool


def order(request: gateway_pb2.GenerateRequest, models: Mapping[str, ServedModel]) -> Order:
    """The order a request makes. Raises InvalidRequest, or NotFound for a model that is not served here."""
    model = _model(request.model, models)
    _size("width", request.width, model.width)
    _size("height", request.height, model.height)
    n = request.n or 1
    if n > MAX_IMAGES:
        raise InvalidRequest("n", request.n, f"1 to {MAX_IMAGES}, 0 for 1")
    seed = request.seed if request.HasField("seed") else secrets.randbelow(2**32)
    if not 0 <= seed <= MAX_SEED - n + 1:
        raise InvalidRequest("seed", seed, f"0 to 2^63 - {n}")
    if request.format not in decoder_pb2.ImageFormat.values():
        raise InvalidRequest("format", request.format, "one of " + ", ".join(decoder_pb2.ImageFormat.keys()))
    seeds = tuple(range(seed, seed + n))
    return Order(model, _prompt(request.prompt), seeds, request.format, request.deterministic)


def job_id(request_id: str) -> str:
    """The id of the caller's choice, or a new one. Raises InvalidRequest for one that cannot be a key."""
    if request_id and not _JOB_ID.fullmatch(request_id):
        raise InvalidRequest("request_id", request_id, "1 to 64 of A-Z a-z 0-9 . _ -")
    return request_id or secrets.token_hex(16)


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


def _size(field: str, asked: int, made: int) -> None:
    """0 or the size the model makes."""
    if asked not in (0, made):
        raise InvalidRequest(field, asked, f"{made}, or 0 for the model's own")
