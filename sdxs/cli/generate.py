"""`sdxs generate`: a prompt to an image file."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sdxs.control import TYPES, Control
from sdxs.errors import InvalidRequest
from sdxs.image_to_image import check_strength
from sdxs.lora import Lora, check_scale
from sdxs.noise import MAX_IMAGES, image_seeds
from sdxs.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode=None)
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@app.command()
def generate(  # noqa: PLR0913  (one argument per option)
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; .png, .jpg or .webp. With -n 3: name-0, name-1, name-2.")
    ],
    model: Annotated[
        str, typer.Option(help="Bundle: name, name@pointer, sha256:digest, s3://bucket/folder or folder.")
    ] = "emoji",
    seed: Annotated[int, typer.Option(help="Same seed, same image. Image i of a request has seed + i.")] = 0,
    n: Annotated[int, typer.Option("-n", min=1, max=MAX_IMAGES, help="How many images.")] = 1,
    width: Annotated[int, typer.Option(min=0, help="Pixels; 0: the model's own.")] = 0,
    height: Annotated[int, typer.Option(min=0, help="Pixels; 0: the model's own.")] = 0,
    server: Annotated[
        str | None, typer.Option(help="host:port of a gateway; without it the image is made in this process.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control", help="Image that the result follows; several are added up. With --server also s3:// or sdxs-input:."
        ),
    ] = None,
    control_type: Annotated[
        list[str] | None,
        typer.Option("--control-type", help=f"What to make of it: {', '.join(TYPES)}. One for all, or one for each --control."),
    ] = None,
    scale: Annotated[list[float] | None, typer.Option(help="How strongly it counts, 0 to 2. One for all, or one each.")] = None,
    controlnet: Annotated[
        list[str] | None, typer.Option(help="The model's ControlNet by name, where the type does not say which.")
    ] = None,
    preprocessed: Annotated[bool, typer.Option("--preprocessed", help="Each --control is the map itself.")] = False,
    guess: Annotated[bool, typer.Option("--guess", help="Deep layers follow it more than shallow ones.")] = False,
    init_image: Annotated[str | None, typer.Option(help="Image to start from; as --control.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far to go from it: near 0 stays close, 1 goes all the way.  [default: 0.6]")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", help="LoRA and its scale, style:0.8; several are added up. Without --server also a file or folder."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make images of PROMPT.

    \b
    sdxs generate "red apple" -o apple.png
    sdxs generate "thumbs up dark skin tone" -o thumb.png --seed 7 -n 4
    sdxs generate "red apple" -o apple.png --control sketch.png --control-type sketch --scale 0.8
    sdxs generate "green apple" -o green.png --init-image apple.png --strength 0.6
    sdxs generate "red apple" -o apple.png --lora watercolour:0.8 --lora ./out/style
    sdxs generate "red apple" -o apple.jpg --server 127.0.0.1:8500
    """
    if output.suffix.lower() not in SUFFIXES:
        raise InvalidRequest("output", str(output), f"a file ending in {', '.join(SUFFIXES)}")
    image_seeds(seed, n)  # a wrong seed is said before torch is loaded
    start = _given("init-image", init_image, server) if init_image else Given()
    steering = Steering(
        controls=_controls(control or [], control_type or [], scale or [], controlnet or [], preprocessed, guess, server),
        init_image=start.image,
        init_image_uri=start.image_uri,
        strength=strength if strength is not None else 0.6 if init_image else 1.0,
        loras=[_lora(text, server) for text in lora or []],
    )
    check_strength(steering.strength, start.image or start.image_uri.encode())
    began = time.perf_counter()
    request = Request(prompt, model, seed, n, SUFFIXES[output.suffix.lower()], steering, width, height)
    files = _from_server(request, server) if server else _in_process(request)
    paths = [output if n == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(n)]
    _write(paths, files)
    seconds = round(time.perf_counter() - began, 3)
    if as_json:
        typer.echo(
            json.dumps({"files": [str(p) for p in paths], "prompt": prompt, "model": model, "seed": seed, "seconds": seconds})
        )
    else:
        typer.echo(f"{', '.join(str(p) for p in paths)} ({seconds} s)")


@dataclass(frozen=True)
class Given:
    """An image of the command line: a file's bytes, or the name of one that the server has."""

    image: bytes = b""
    image_uri: str = ""


@dataclass(frozen=True)
class Steering:
    """What steers the result beside the prompt."""

    controls: list[Control]
    init_image: bytes
    init_image_uri: str
    strength: float
    loras: list[Lora]


@dataclass(frozen=True)
class Request:
    """What was asked for, checked; `kind` is the format of the files."""

    prompt: str
    model: str
    seed: int
    n: int
    kind: str
    steering: Steering
    width: int
    height: int


def _controls(  # noqa: PLR0913  (one argument per option)
    files: list[str],
    types: list[str],
    scales: list[float],
    names: list[str],
    preprocessed: bool,
    guess: bool,
    server: str | None,
) -> list[Control]:
    """One for each file; the other options are for all, or one for each. Raises InvalidRequest."""
    given: dict[str, list[Any]] = {"control-type": types, "scale": scales, "controlnet": names}
    for option, values in given.items():
        if len(values) not in (0, 1, len(files)) or (values and not files):
            raise InvalidRequest(option, values, f"one, or one for each of the {len(files)} --control")
    if files and not types and not names:
        raise InvalidRequest("control-type", "", f"one of {', '.join(TYPES)}; or --controlnet with --preprocessed")

    def of(values: list[Any], index: int, default: Any) -> Any:
        return default if not values else values[0] if len(values) == 1 else values[index]

    images = [_given("control", file, server) for file in files]
    return [
        Control(each.image, of(types, i, ""), of(names, i, ""), of(scales, i, 1.0), guess, preprocessed, each.image_uri)
        for i, each in enumerate(images)
    ]


def _given(option: str, text: str, server: str | None) -> Given:
    """What an option names. Raises InvalidRequest where there is no such file, or no server to know such a name."""
    if not text.startswith(("s3://", "sdxs-input:")):
        return Given(_read(option, Path(text)))
    if server is None:
        raise InvalidRequest(option, text, "a file, or with --server the name of an image that it has")
    return Given(image_uri=text)


def _lora(text: str, server: str | None) -> Lora:
    """`name:scale`, `sha256:digest:scale`, or without a scale. Raises InvalidRequest."""
    name, colon, scale = text.rpartition(":")
    if not colon or name == "sha256" or "/" in scale:
        name, scale = text, "1"
    try:
        found = Lora(name, float(scale))
    except ValueError:
        raise InvalidRequest("lora", text, "a name, or a name and a number: style:0.8") from None
    check_scale(found.scale, "lora")
    if server is not None and "/" in name:
        raise InvalidRequest("lora", text, "with --server the name or the digest of a published LoRA")
    return found


def _read(option: str, path: Path) -> bytes:
    """Raises InvalidRequest where there is no such file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(option, str(path), f"a file that can be read ({error.strerror})") from error


def _write(paths: list[Path], files: list[bytes]) -> None:
    """Raises InvalidRequest(field="output") where the system does not allow it."""
    for path, data in zip(paths, files, strict=True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise InvalidRequest("output", str(path), f"a file that can be written ({error.strerror})") from error


def quiet() -> None:
    """Said before the import of the libraries, which read it then: nothing is printed beside the result."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def _in_process(request: Request) -> list[bytes]:
    quiet()
    import numpy as np

    from sdxs import images, registry

    settings = Settings()
    folder, _ = registry.open_model(request.model, settings)  # and so is a model that is not there
    from sdxs.pipeline import OneStepPipeline

    pipeline, steering = OneStepPipeline.from_bundle(folder, settings), request.steering
    made = pipeline(
        request.prompt, request.seed, request.n, steering.controls, steering.init_image, steering.strength, steering.loras,
        request.width, request.height,
    )  # fmt: skip
    name, digest = pipeline.manifest.name, pipeline.manifest.digest
    manifest = pipeline.manifest
    facts = images.sized(manifest.size(request.width, request.height), manifest.size())
    facts |= images.steering(pipeline.named(steering.controls), steering.init_image, steering.strength)
    facts |= images.styles(pipeline.loras.applied(steering.loras))
    receipts = [images.receipt(request.prompt, one, name, digest, facts) for one in image_seeds(request.seed, request.n)]
    return [
        images.encode(np.asarray(image), images.NAMES[request.kind], receipt)
        for image, receipt in zip(made, receipts, strict=True)
    ]


def _from_server(request: Request, server: str) -> list[bytes]:
    from sdxs.client import Client, Options

    options: Options = {
        "model": request.model,
        "seed": request.seed,
        "n": request.n,
        "format": request.kind,
        "deterministic": True,
        "width": request.width,
        "height": request.height,
    }
    steering = request.steering
    if steering.controls:
        options["controls"] = steering.controls
    if steering.loras:
        options["loras"] = steering.loras
    if steering.init_image or steering.init_image_uri:
        start: Options = {"init_image": steering.init_image, "init_image_uri": steering.init_image_uri}
        options |= {**start, "strength": steering.strength}
    with Client(server) as client:
        return [image.data for image in client.generate(request.prompt, **options).images]
