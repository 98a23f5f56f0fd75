"""`sdxs demo`: everything once. Distils the emoji teacher, evaluates, publishes, serves over gRPC, shows pictures, ends by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sdxs import bundle, embedded, registry
from sdxs.client import Client
from sdxs.errors import SdxsError, Unavailable
from sdxs.settings import Settings
from sdxs.store import open_store
from trainer import recipe as recipes
from trainer.artifacts import Artifacts
from trainer.distill import Distillation, Result, ray_session
from trainer.evaluate import Generate, Row
from trainer.launch import Cluster
from trainer.progress import Bars
from trainer.recipe import DistillRecipe
from trainer.report import contact_sheet, write_report
from trainer.scoring import evaluate_bundle

PROMPTS = [
    "red apple", "pizza", "smiling face with sunglasses", "red heart", "blue heart", "penguin", "tropical fish", "rose",
    "fire", "rocket", "thumbs up medium skin tone", "woman firefighter", "strawberry", "soccer ball", "owl", "sunflower",
]  # fmt: skip
SEED = 7
SERVE_SECONDS = 180


def run_demo(output: Path, quick: bool) -> None:
    """Run the whole demo; results in `output`. A second run reuses every stage that is done."""
    console = Console()
    recipe = recipes.load("emoji-quick" if quick else "emoji-demo")
    assert isinstance(recipe, DistillRecipe)
    start = time.perf_counter()
    state = output / "state"
    with embedded.redis_server(state / "redis") as redis, embedded.s3_server(state / "s3") as s3:
        os.environ.update({**redis, **s3, "SDXS_CACHE_DIR": str((state / "cache").resolve())})
        settings = Settings()
        with Bars(console) as bars:
            with ray_session():
                result = Distillation(recipe, settings, Cluster(), bars, pool_size=2).run(output / "bundle")
            rows, generators = _evaluate(recipe, result, settings, bars)
        manifest = registry.publish(output / "bundle", open_store(settings))
        registry.promote(manifest.name, manifest.digest, open_store(settings))
        console.print(f"published {manifest.name}@prod = {manifest.digest[:19]}")
        with _server(f"{manifest.name}@prod", output / "serve.log", console) as address:
            served = _ask(address, manifest.name, output)
        _report(output, recipe, result, settings, rows, generators, served)
    _closing_words(console, output, rows, time.perf_counter() - start)


def _evaluate(recipe: DistillRecipe, result: Result, settings: Settings, bars: Bars) -> tuple[list[Row], dict[str, Generate]]:
    assert result.bundle is not None
    artifacts = Artifacts(open_store(settings), settings.cache_dir / "artifacts")
    began = time.perf_counter()
    total = 12
    seen: list[str] = []

    def progress(_text: str) -> None:
        seen.append(_text)
        bars("evaluation", len(seen), total, {})

    manifest = bundle.read(result.bundle)
    rows, generators = evaluate_bundle(result.bundle, manifest, recipe.world, recipe.evaluation, artifacts, progress)
    result.seconds["evaluation"] = round(time.perf_counter() - began, 1)
    return rows, generators


@contextmanager
def _server(model: str, log: Path, console: Console) -> Iterator[str]:
    """`sdxs serve` in its own process on a free port; ended by its id."""
    port = embedded.free_port()
    command = [sys.executable, "-c", "from sdxs.cli import main; main()", "serve", "--model", model, "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        with console.status("starting the replicas on Ray Serve"):
            _wait_until_serving(process, f"127.0.0.1:{port}", log)
        console.print(f"serving on 127.0.0.1:{port}")
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_serving(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + SERVE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with Client(address) as client:
                if client.list_models():
                    return
        except SdxsError:
            time.sleep(0.5)
    raise Unavailable(f"`sdxs serve` did not come up; its log {log} ends:\n{log.read_text(errors='replace')[-1500:]}")


def _ask(address: str, model: str, output: Path) -> np.ndarray:
    """The demo's prompts over gRPC; PNG files in `output`/images. Returns uint8 (N, H, W, 3)."""
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    with Client(address) as client:
        for prompt in PROMPTS:
            [image] = client.generate(prompt, model=model, seed=SEED, format="png").images
            (folder / f"{prompt.replace(' ', '-')}.png").write_bytes(image.data)
            pictures.append(np.asarray(image.pil().convert("RGB")))
    return np.stack(pictures)


def _report(  # noqa: PLR0913
    output: Path, recipe: DistillRecipe, result: Result, settings: Settings, rows: list[Row], generators: dict[str, Generate],
    served: np.ndarray,
) -> None:  # fmt: skip
    columns = {name: make(PROMPTS, [SEED] * len(PROMPTS)) for name, make in generators.items() if name != "final"}
    sheet = contact_sheet({**columns, "final": served}, PROMPTS)
    artifacts = Artifacts(open_store(settings), settings.cache_dir / "artifacts")
    stages = [stage for stage in result.digests if stage != "pairs"]
    logs = {stage: artifacts.fetch(stage, result.digests[stage]) / "log.jsonl" for stage in stages}
    summary = (
        f"recipe {recipe.name}, digest {recipes.digest(recipe)}; a short run: its pictures are worse than the shipped bundle's"
    )
    write_report(output, recipe.name, rows, result.seconds, sheet, logs, summary)


def _closing_words(console: Console, output: Path, rows: list[Row], seconds: float) -> None:
    table = Table("split", "row", "top-1", "top-5", "Frechet", "ms per image")
    for row in rows:
        top5 = "" if row.top5 is None else f"{row.top5:.1%}"
        table.add_row(row.split, row.row, f"{row.top1:.1%}", top5, f"{row.frechet:.3f}", f"{row.latency_ms or ''}")
    console.print(table)
    console.print(f"Done in {seconds / 60:.1f} minutes. Look at {output / 'contact_sheet.png'} and {output / 'report.html'}.")
    console.print(f'Your own:  .venv/bin/sdxs generate "green apple" -o apple.png --model ./{output / "bundle"}')
    console.print('The shipped bundle, trained longer:  .venv/bin/sdxs generate "green apple" -o apple.png')
