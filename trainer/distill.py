"""A distillation from recipe to bundle: pairs, then the four stages, then assembly. Stages that do not need each other run side by
side where the cluster has room. A stage whose inputs have not changed is not run again: its result is found in the store by the
digest of what goes into it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import load_file, save_file

from sdxs import bundle
from sdxs.errors import AlreadyExists, NotFound
from sdxs.settings import Settings
from sdxs.store import open_store
from trainer.artifacts import Artifacts
from trainer.board import Board
from trainer.launch import Cluster, StageJob, run_stage
from trainer.pairs import draw_pairs, recombine
from trainer.pool import TeacherPool
from trainer.recipe import DistillRecipe, PairsSection, digest
from trainer.worlds.base import get_world

ASSETS = Path(__file__).parent / "assets"
# What each stage reads. Drawn samples come first; compositions only if the recipe has them.
UPSTREAM = {
    "decoder": ("pairs", "compositions"),
    "unet": ("pairs", "compositions"),
    "warmup": ("pairs", "compositions", "unet"),
    "diff_instruct": ("pairs", "compositions", "warmup"),
}
REVISION = 1  # raised when a stage's code changes what it computes, so that old results are not taken for new ones

# What a watcher is told: stage, steps done, steps in all, latest metrics.
Watch = Callable[[str, int, int, dict[str, float]], None]


@dataclass
class Result:
    """Digests of all stages, the seconds each took in this run (0 for reused ones), and the sealed bundle's folder."""

    digests: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    bundle: Path | None = None


def teacher_folder(teacher: str) -> Path:
    """Folder of a teacher: the name `<world>-teacher` for an embedded one, else a path to any diffusers text-to-image folder.

    Raises:
        NotFound: there is no such folder.
    """
    embedded = ASSETS / teacher.removesuffix("-teacher") / "teacher"
    folder = embedded if teacher.endswith("-teacher") and len(Path(teacher).parts) == 1 else Path(teacher)
    if not (folder / "unet" / "config.json").is_file():
        raise NotFound(f"teacher {teacher!r}: {folder} is not a diffusers text-to-image folder")
    return folder.resolve()


def teacher_digest(folder: Path) -> str:
    """Digest of a teacher's networks, tokenizer and scheduler; its card and logs, which lie beside their folders, do not count."""
    parts = []
    for path in sorted(p for p in folder.glob("*/**/*") if p.is_file()):
        with path.open("rb") as file:
            parts.append([path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(parts)


class Distillation:
    """One recipe on one cluster. `run` returns when the bundle is sealed."""

    def __init__(self, recipe: DistillRecipe, settings: Settings, cluster: Cluster, watch: Watch, pool_size: int = 1) -> None:
        self.recipe, self.settings, self.cluster, self.watch, self.pool_size = recipe, settings, cluster, watch, pool_size
        self.folder, self.world = teacher_folder(recipe.teacher), get_world(recipe.world)
        self.artifacts = Artifacts(open_store(settings), settings.cache_dir / "artifacts")
        self.result = Result()
        self._pool: TeacherPool | None = None
        self._board: Any = None
        self._starting = threading.Lock()  # stages in both lanes ask for the pool

    def run(self, output: Path) -> Result:
        """All stages that are not done yet, then the bundle in `output`.

        Raises:
            AlreadyExists: `output` holds something that is not a bundle.
        """
        _check_replaceable(output)
        stages = ["decoder", "unet", "warmup", *(["diff_instruct"] if self.recipe.diff_instruct else [])]
        self.plan(stages)
        try:
            for name in self._samples():
                self._draw(name)
            self._stages(stages)
        finally:
            if self._pool is not None:
                self._pool.close()
        self.result.reused.sort(key=[*self._samples(), *stages].index)
        self._assemble(stages, output)
        return self.result

    def _stages(self, stages: list[str]) -> None:
        """Each as soon as what it needs is there and a lane is free. `stages` is in topological order, so nothing can wait for a
        stage that has not begun."""
        futures: dict[str, Future[None]] = {}

        def run(stage: str) -> None:
            for upstream in UPSTREAM[stage]:
                if upstream in futures:
                    futures[upstream].result()
            self._stage(stage)

        with ThreadPoolExecutor(self._lanes()) as lanes:
            for stage in stages:
                futures[stage] = lanes.submit(run, stage)
        for future in futures.values():
            future.result()

    def _lanes(self) -> int:
        """Two (the decoder beside the chain of U-Net stages) if workers for both and the pool fit the cluster at once, else one."""
        cpus = self.cluster.cpus_per_worker * (2 * self.cluster.workers + self.pool_size)
        return 2 if ray.cluster_resources().get("CPU", 0) >= cpus else 1

    def plan(self, stages: list[str]) -> dict[str, str]:
        """Digest of every stage: its section of the recipe and whatever it reads."""
        teacher = teacher_digest(self.folder)
        captions = self.world.captions("train")
        common = {"revision": REVISION, "teacher": teacher, "captions": digest(captions), "seed": self.recipe.seed}
        for name, section in self._samples().items():
            self.result.digests[name] = digest(
                [common, section.model_dump(mode="json", exclude_none=True), *([name] if name != "pairs" else [])]
            )
        for stage in stages:
            section = getattr(self.recipe, stage).model_dump(mode="json", exclude_none=True)
            self.result.digests[stage] = digest([common, section, list(self._inputs(stage).values()), self.cluster.workers])
        return self.result.digests

    def _samples(self) -> dict[str, PairsSection]:
        """What is drawn from the teacher before any stage."""
        compositions = self.recipe.compositions
        return {"pairs": self.recipe.pairs} | ({"compositions": compositions} if compositions else {})

    def _inputs(self, stage: str) -> dict[str, str]:
        """Digests of what a stage reads."""
        return {name: self.result.digests[name] for name in UPSTREAM[stage] if name in self.result.digests}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[bool]:
        """Yields whether the stage has to run; notes its time, or that it was reused."""
        if self.artifacts.facts(stage, self.result.digests[stage]) is not None:
            self.result.reused.append(stage)
            self.result.seconds[stage] = 0.0
            self.watch(stage, 1, 1, {"reused": 1.0})
            yield False
            return
        start = time.perf_counter()
        yield True
        self.result.seconds[stage] = round(time.perf_counter() - start, 1)

    @property
    def pool(self) -> TeacherPool:
        """The teacher pool, started when the first stage has to run."""
        with self._starting:
            if self._pool is None:
                self._board = Board.remote()  # type: ignore[attr-defined]
                self._pool = TeacherPool(
                    self.folder, self.pool_size, cpus=self.cluster.cpus_per_worker, threads=self.cluster.threads
                )
            return self._pool

    def _draw(self, name: str) -> None:
        section = self._samples()[name]
        seed = self.recipe.seed + (1 if name == "pairs" else 2)
        captions = self.world.captions("train")
        if name == "compositions":
            captions = recombine(captions, set(self.world.captions("heldout")), section.count, seed)
        with self._timed(name) as needed:
            if not needed:
                return
            config = json.loads((self.folder / "unet" / "config.json").read_text())
            pairs = draw_pairs(
                self.pool.client(),
                captions,
                section,
                (config["in_channels"], config["sample_size"], config["sample_size"]),
                seed,
                lambda done: self.watch(name, done, section.count, {}),
            )
            with tempfile.TemporaryDirectory() as scratch:
                pairs.save(Path(scratch) / "pairs.safetensors")
                self.artifacts.save(name, self.result.digests[name], Path(scratch), {"count": section.count})

    def _stage(self, stage: str) -> None:
        digests = self.result.digests
        with self._timed(stage) as needed:
            if needed:
                job = StageJob(
                    stage=stage,
                    digest=digests[stage],
                    recipe=self.recipe.model_dump(mode="json"),
                    teacher_folder=str(self.folder),
                    settings=self.settings.environment(),
                    cache=str(self.artifacts.cache),
                    inputs=self._inputs(stage),
                    client=self.pool.client(),
                    board=self._board,
                    cluster=self.cluster,
                )
                run_stage(job, self.settings, self.watch)

    def _assemble(self, stages: list[str], output: Path) -> None:
        """The bundle: the last student, the tiny decoder, and the teacher's text encoder, tokenizer and scheduler; fp16 on disk."""
        digests = self.result.digests
        fetched = {stage: self.artifacts.fetch(stage, digests[stage]) for stage in stages}
        part = output.with_name(output.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        sources = {"unet": fetched[stages[-1]] / "unet", "vae": fetched["decoder"] / "vae"}
        sources |= {name: self.folder / name for name in ("text_encoder", "tokenizer", "scheduler")}
        for name, source in sources.items():
            shutil.copytree(source, part / name)
        slim(part)
        logs = [f"# {stage}\n" + (fetched[stage] / "log.jsonl").read_text() for stage in stages]
        (part / "training.txt").write_text("\n".join(logs))
        (part / "recipe.json").write_text(self.recipe.model_dump_json(indent=1))
        write_model_index(part)
        bundle.seal(
            part,
            self.recipe.name,
            recipe_hash=digest(self.recipe),
            lineage={"teacher": self.recipe.teacher, **digests},
        )
        _check_replaceable(output)
        shutil.rmtree(output, ignore_errors=True)
        part.rename(output)
        self.result.bundle = output


def _check_replaceable(output: Path) -> None:
    """Only an earlier bundle may be replaced. Raises AlreadyExists."""
    if output.exists() and not (output / "bundle.json").is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise AlreadyExists(f"output {str(output)!r} holds something that is not a bundle; name a new folder")


def slim(folder: Path) -> None:
    """As a folder of networks ships: weights in float16, configurations without the path they were once loaded from."""
    for path in folder.rglob("*.safetensors"):
        tensors = {
            name: value.half().contiguous() if value.is_floating_point() else value for name, value in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_model_index(folder: Path) -> None:
    """`model_index.json`, with which diffusers' StableDiffusionPipeline loads the folder."""
    classes = {
        name: json.loads((folder / name / config).read_text()).get("_class_name")
        for name, config in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json"))
    }
    index = {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        **{name: ["diffusers", kind] for name, kind in classes.items()},
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
