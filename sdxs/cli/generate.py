"""`sdxs generate`: a prompt to an image file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from sdxs.errors import InvalidRequest
from sdxs.noise import MAX_IMAGES, image_seeds
from sdxs.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode=None)
QUIET = {
    "HF_HUB_OFFLINE": "1",
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
    server: Annotated[
        str | None, typer.Option(help="host:port of a gateway; without it the image is made in this process.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make images of PROMPT.

    \b
    sdxs generate "red apple" -o apple.png
    sdxs generate "thumbs up dark skin tone" -o thumb.png --seed 7 -n 4
    sdxs generate "red apple" -o apple.jpg --server 127.0.0.1:8500
    """
    if output.suffix.lower() not in SUFFIXES:
        raise InvalidRequest("output", str(output), f"a file ending in {', '.join(SUFFIXES)}")
    image_seeds(seed, n)  # a wrong seed is said before torch is loaded
    start = time.perf_counter()
    make = _from_server if server else _in_process
    files = make(prompt, model, seed, n, SUFFIXES[output.suffix.lower()], server or "")
    paths = [output if n == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(n)]
    _write(paths, files)
    seconds = round(time.perf_counter() - start, 3)
    if as_json:
        typer.echo(
            json.dumps({"files": [str(p) for p in paths], "prompt": prompt, "model": model, "seed": seed, "seconds": seconds})
        )
    else:
        typer.echo(f"{', '.join(str(p) for p in paths)} ({seconds} s)")


def _write(paths: list[Path], files: list[bytes]) -> None:
    """Raises InvalidRequest(field="output") where the system does not allow it."""
    for path, data in zip(paths, files, strict=True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise InvalidRequest("output", str(path), f"a file that can be written ({error.strerror})") from error


def _in_process(prompt: str, model: str, seed: int, n: int, kind: str, _server: str) -> list[bytes]:
    # Said before the import of the libraries, which read it then: no network, and nothing printed beside the result.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import numpy as np

    from sdxs import images, registry

    settings = Settings()
    folder, _ = registry.open_model(model, settings)  # and so is a model that is not there
    from sdxs.pipeline import OneStepPipeline

    pipeline = OneStepPipeline.from_bundle(folder, settings)
    made = pipeline(prompt, seed, n)
    name, digest = pipeline.manifest.name, pipeline.manifest.digest
    receipts = [images.receipt(prompt, one, name, digest) for one in image_seeds(seed, n)]
    return [
        images.encode(np.asarray(image), images.NAMES[kind], receipt) for image, receipt in zip(made, receipts, strict=True)
    ]


def _from_server(prompt: str, model: str, seed: int, n: int, kind: str, server: str) -> list[bytes]:
    from sdxs.client import Client

    with Client(server) as client:
        made = client.generate(prompt, model=model, seed=seed, n=n, format=kind, deterministic=True)
        return [image.data for image in made.images]
