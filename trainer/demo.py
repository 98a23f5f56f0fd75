"""`sdxs demo`: everything once. Distils the emoji teacher, evaluates, publishes, serves over gRPC, shows pictures, ends by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from sdxs import bundle, embedded, registry
from sdxs.client import Client
from sdxs.errors import SdxsError, Unavailable
from sdxs.settings import Settings
from sdxs.store import open_store
from trainer import recipe as recipes
from trainer.artifacts import open_artifacts
from trainer.cluster import Cluster
from trainer.distill import Distillation, Result
from trainer.evaluation.judge import Judge
from trainer.evaluation.report import console_table, contact_sheet, write_report
from trainer.evaluation.rows import Row
from trainer.evaluation.scoring import Comparison, compare_recipe
from trainer.recipe import DistillRecipe
from trainer.tracking.progress import Bars

PROMPTS = [
    "red apple", "pizza", "smiling face with sunglasses", "red heart", "blue heart", "penguin", "tropical fish", "rose",
    "fire", "rocket", "thumbs up medium skin tone", "woman firefighter", "strawberry", "soccer ball", "owl", "sunflower",
]  # fmt: skip
SEED = 7
SERVE_SECONDS = 180


def run_demo(output: Path, quick: bool, ray_session: ExitStack) -> None:
    """Run the whole demo; results in `output`. A second run reuses every stage that is done. Ends `ray_session` after the training."""
    console = Console()
    recipe = recipes.load("emoji-quick" if quick else "emoji-demo")
    assert isinstance(recipe, DistillRecipe)
    start = time.perf_counter()
    state = output / "state"
    alone = embedded.alone_in(state, "another demo runs there; name another folder with -o")
    with alone, embedded.redis_server(state / "redis") as redis, embedded.s3_server(state / "s3") as s3:
        os.environ.update({**redis, **s3, "SDXS_CACHE_DIR": str((state / "cache").resolve())})
        settings = Settings()
        with Bars(console) as bars:
            result = Distillation(recipe, settings, Cluster(teachers=1 if quick else 2), bars).run(output / "bundle")
            ray_session.close()
            manifest = registry.publish(output / "bundle", open_store(settings, "models"))
            registry.promote(manifest.name, manifest.digest, open_store(settings, "models"))
            console.print(f"published {manifest.name}@prod = {manifest.digest[:19]}")
            with _server(f"{manifest.name}@prod", output / "serve.log") as server:
                comparison, rows = _evaluate(recipe, result, settings, bars)  # while the replicas start
                server.wait()
                console.print(f"serving on {server.address}")
                served = _ask(server.address, manifest.name, output)
            rows = comparison.timed(rows)
        _report(output, recipe, result, settings, rows, comparison, served)
    _closing_words(console, output, rows, comparison.judge, time.perf_counter() - start)


def _evaluate(recipe: DistillRecipe, result: Result, settings: Settings, bars: Bars) -> tuple[Comparison, list[Row]]:
    assert result.bundle is not None
    began = time.perf_counter()
    comparison = compare_recipe(result.bundle, bundle.read(result.bundle), recipe, settings)
    total = 2 * (len(comparison.generators) + 1)
    seen: list[str] = []

    def progress(text: str) -> None:
        bars("evaluation", len(seen), total, {})
        seen.append(text)

    rows = comparison.scores(progress)
    bars("evaluation", total, total, {})
    result.seconds["evaluation"] = round(time.perf_counter() - began, 1)
    return comparison, rows


@dataclass(frozen=True)
class _Server:
    """`sdxs serve` in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def wait(self) -> None:
        """Until it serves. Raises Unavailable, with the end of its log."""
        deadline = time.monotonic() + SERVE_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with Client(self.address) as client:
                    if client.ready():
                        return
            except SdxsError:
                time.sleep(0.5)
        end = self.log.read_text(errors="replace")[-1500:]
        raise Unavailable(f"`sdxs serve` did not come up; its log {self.log} ends:\n{end}")


@contextmanager
def _server(model: str, log: Path) -> Iterator[_Server]:
    """A server for `model` on a free port, starting; ended by its process id."""
    port = embedded.free_port()
    command = [sys.executable, "-c", "from sdxs.cli import main; main()", "serve", "--model", model, "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        yield _Server(process, f"127.0.0.1:{port}", log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
    output: Path, recipe: DistillRecipe, result: Result, settings: Settings, rows: list[Row], comparison: Comparison,
    served: np.ndarray,
) -> None:  # fmt: skip
    columns = {name: make(PROMPTS, [SEED] * len(PROMPTS)) for name, make in comparison.generators.items() if name != "final"}
    sheet = contact_sheet({**columns, "final": served}, PROMPTS)
    artifacts = open_artifacts(settings)
    stages = [stage for stage in result.digests if stage not in ("pairs", "compositions")]
    logs = {stage: artifacts.fetch(stage, result.digests[stage]) / "log.jsonl" for stage in stages}
    summary = (
        f"recipe {recipe.name}, digest {recipes.digest(recipe)}; a short run: its pictures are worse than the shipped bundle's"
    )
    write_report(output, recipe.name, rows, comparison.judge, result.seconds, sheet, logs, summary)


def _closing_words(console: Console, output: Path, rows: list[Row], judge: Judge | None, seconds: float) -> None:
    console.print(console_table(rows, judge))
    console.print(f"Done in {seconds / 60:.1f} minutes. Look at {output / 'contact_sheet.png'} and {output / 'report.html'}.")
    console.print(f'Your own:  .venv/bin/sdxs generate "green apple" -o apple.png --model {(output / "bundle").absolute()}')
    console.print('The shipped bundle, trained longer:  .venv/bin/sdxs generate "green apple" -o apple.png')
