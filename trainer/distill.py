"""A recipe from its first sample to its bundle. Steps that do not need each other run side by side where the cluster has room. A step
whose inputs have not changed is not done again: its result is found in the store by the digest of what goes into it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdxs import registry
from sdxs.bundle import Manifest
from sdxs.settings import Settings
from trainer.artifacts import open_artifacts
from trainer.assemble import assemble, check_replaceable
from trainer.cluster import Cluster, StageJob
from trainer.data.source import Captions
from trainer.launch import run_stage
from trainer.pairs import Pairs, PairsOrder, draw_shards, recombine
from trainer.plan import IMAGES, REVISION, Step, dated, source_digest, steps
from trainer.pool.client import Limits, Share, TeacherPool
from trainer.prompts import open_source
from trainer.real_images import encode_images, listing_digest
from trainer.recipe import ControlNetRecipe, ControlRecipe, RunRecipe, StyleRecipe, digest
from trainer.sections import (
    ControlledSection,
    ControlNetSection,
    ImagesSection,
    Optimisation,
    PairsSection,
    SampleImagesSection,
    Section,
    ShrinkSection,
)
from trainer.sources import latent_shape, teacher_folder
from trainer.specs import TeacherSpec
from trainer.teacher import TeacherClient
from trainer.tracking.board import Board
from trainer.triplets import BentMaps, SampleImages, draw_images, learnt_from

READ = ("unet/", "vae/")
"""What of a base bundle a ControlNet is trained on; ControlNets that it has already do not matter."""
# What a watcher is told: stage, steps done, steps in all, latest metrics.
Watch = Callable[[str, int, int, dict[str, float]], None]


@dataclass
class Result:
    """Digests of all steps, the seconds each took in this run (0 for reused ones), and the sealed bundle's folder."""

    digests: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    bundle: Path | None = None


class Distillation:
    """One recipe on one cluster. `run` returns when the bundle is sealed."""

    def __init__(self, recipe: RunRecipe, settings: Settings, cluster: Cluster, watch: Watch) -> None:
        self.recipe, self.settings, self.cluster, self.watch = recipe, settings, cluster, watch
        self.folder, self.prompts = teacher_folder(recipe.teacher), open_source(recipe, settings)
        self.artifacts = open_artifacts(settings)
        self.result = Result()
        self.pools: dict[TeacherSpec, TeacherPool] = {}
        self._board: Any = None
        self._lock = threading.Lock()  # of pools and board: lanes ask for them

    def run(self, output: Path) -> Result:
        """All steps that are not done yet, then the bundle in `output`.

        Raises:
            AlreadyExists: `output` holds something that is not a bundle.
        """
        check_replaceable(output)
        plan = self.plan()
        try:
            self._all(plan)
        finally:
            for pool in self.pools.values():
                pool.close()
        order = [step.name for step in plan]
        self.result.reused.sort(key=order.index)
        assemble(self.recipe, plan, self.folder, self.artifacts, output)
        self.result.bundle = output
        return self.result

    def plan(self) -> list[Step]:
        """Every step and the digest of its result."""
        common = {
            "revision": REVISION, "teacher": source_digest(self.recipe.teacher), "prompts": self.prompts.digest,
            "seed": self.recipe.seed, "compute": digest(self.recipe.compute),
        }  # fmt: skip
        plan = dated(steps(self.recipe), lambda step: common | self._kind(step), self._spread)
        self.result.digests = {step.name: step.digest for step in plan}
        return plan

    def _kind(self, step: Step) -> dict[str, Any]:
        """What shapes the student. Of a ControlNet's recipe the steps before the first control image are those of the distillation that
        made the base: where that one's results are in the store, they are taken."""
        recipe = self.recipe
        if isinstance(recipe, ControlNetRecipe):
            return {"conditions": recipe.conditions}
        if isinstance(recipe, StyleRecipe):
            return {"base": self._base.digest}
        found: dict[str, Any] = {"student": digest(recipe.student)}
        if isinstance(recipe, ControlRecipe) and not set(step.reads).isdisjoint(IMAGES):
            found["conditions"] = recipe.conditions
            if step.name in ("control_warmup", "control_diff_instruct"):
                found["base"] = digest(
                    {name: entry.sha256 for name, entry in self._base.files.items() if name.startswith(READ)}
                )
        return found

    @cached_property
    def _base(self) -> Manifest:
        """The bundle that learns a style or a condition."""
        assert isinstance(self.recipe, (StyleRecipe, ControlRecipe))
        return registry.open_model(self.recipe.base, self.settings)[1]

    def _spread(self, section: Section) -> Any:
        """The number of workers, where the size of a micro-batch follows from it; and which real images there are."""
        fixed = isinstance(section, Optimisation) and section.micro_batch is not None
        images = getattr(section, "images", None)
        return [None if fixed else self.cluster.workers, images and listing_digest(images, self.settings)]

    def _all(self, plan: list[Step]) -> None:
        """Each step as soon as what it needs is there and a lane is free. The plan is in topological order, so nothing can wait for
        a step that has not begun."""
        futures: dict[str, Future[None]] = {}
        waiting = Counter(step.teacher for step in plan if self._asks_pool(step))

        def run(step: Step) -> None:
            for name in step.reads:
                futures[name].result()
            with self._timed(step) as needed:
                if needed:
                    (self._draw if step.drawn else self._train)(step)
            if self._asks_pool(step):
                self._done_with(step.teacher, waiting)

        with ThreadPoolExecutor(self._lanes()) as lanes:
            for step in plan:
                futures[step.name] = lanes.submit(run, step)
        for future in futures.values():
            future.result()

    def _lanes(self) -> int:
        """Two (the decoder beside the chain of U-Net stages) if workers for both and the pool fit the cluster at once, else one."""
        have, cluster = ray.cluster_resources(), self.cluster
        room = all(have.get(name, 0) >= wanted for name, wanted in cluster.wanted(stages=2).items())
        return 2 if room else 1

    @contextmanager
    def _timed(self, step: Step) -> Iterator[bool]:
        """Yields whether the step has to be done; notes its time, or that it was reused."""
        if self.artifacts.facts(step.name, step.digest) is not None:
            self.result.reused.append(step.name)
            self.result.seconds[step.name] = 0.0
            self.watch(step.name, 1, 1, {"reused": 1.0})
            yield False
            return
        start = time.perf_counter()
        yield True
        self.result.seconds[step.name] = round(time.perf_counter() - start, 1)

    def pool(self, spec: TeacherSpec) -> TeacherPool:
        """The pool of a teacher, started when first asked for. Without a pool of its own a run draws with one on the workers' devices."""
        cluster = self.cluster
        size, gpus = (
            (cluster.teachers, cluster.gpus_per_teacher)
            if cluster.teachers
            else (cluster.most_workers, cluster.gpus_per_worker)
        )
        with self._lock:
            if spec not in self.pools:
                environment = self.settings.environment()
                share = Share(cluster.cpus_per_worker, gpus, cluster.threads)
                # Joined on a GPU only: on a CPU it gains little, and without it a run repeats to the last bit.
                limits = Limits() if gpus else Limits(max_batch=1)
                self.pools[spec] = TeacherPool(
                    spec, size, share, limits=limits, environment=environment, reserve=cluster.elastic
                )
            return self.pools[spec]

    def _asks_pool(self, step: Step) -> bool:
        """Whether a pool answers a step: always to draw, in training only where workers have no teacher of their own. A ControlNet's
        training asks nobody; its images are encoded before."""
        training = self.cluster.teachers > 0 and not isinstance(step.section, ControlNetSection)
        return step.teacher is not None and (step.drawn or training)

    def _done_with(self, spec: TeacherSpec | None, waiting: Counter[TeacherSpec | None]) -> None:
        """Close a pool that no later step asks: its devices may be another one's."""
        with self._lock:
            waiting[spec] -= 1
            if spec in self.pools and not waiting[spec]:
                self.pools.pop(spec).close()

    def board(self) -> Any:
        """Where workers pin their metrics."""
        with self._lock:
            if self._board is None:
                here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may leave
                self._board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
            return self._board

    def _draw(self, step: Step) -> None:
        assert step.teacher is not None
        self.draw(step, self.pool(step.teacher).client().whole())

    def draw(self, step: Step, client: TeacherClient) -> None:
        """What the teacher is asked for, into the store: samples, or the images of those that the step reads."""
        result = (step.name, step.digest)
        if isinstance(step.section, SampleImagesSection):
            pairs, _ = self._read(step)
            told = partial(self._told, step.name, len(pairs.captions))
            draw_images(client, pairs, step.section.format, self.artifacts, result, told)
        else:
            order = self.order(step)
            draw_shards(client, order, self.artifacts, result, partial(self._told, step.name, len(order.seeds)))

    def _told(self, name: str, count: int, done: int) -> None:
        self.watch(name, done, count, {})

    def order(self, step: Step) -> PairsOrder:
        """The prompts of a drawn step with their noises."""
        assert isinstance(step.section, PairsSection)
        seed = self.recipe.seed + {"pairs": 1, "compositions": 2, "samples": 3, "controlled": 4}[step.name]
        if isinstance(step.section, ControlledSection):
            assert isinstance(self.recipe, ControlRecipe)
            pairs, images = self._read(step)
            assert images is not None
            maps = BentMaps(images, self.recipe.conditions, step.section.warp)
            return PairsOrder.of(pairs.captions, step.section, latent_shape(self.folder), seed, maps)
        captions: Sequence[str] = Captions(self.prompts, "train")
        if step.name == "compositions":
            captions = recombine(list(captions), set(Captions(self.prompts, "heldout")), step.section.count, seed)
        return PairsOrder.of(captions, step.section, latent_shape(self.folder), seed)

    def _read(self, step: Step) -> tuple[Pairs, SampleImages | None]:
        """The pairs that a step reads, and their images if it reads those too."""
        pairs, images = learnt_from({name: self.artifacts.fetch(name, self.result.digests[name]) for name in step.reads})
        assert pairs is not None
        return pairs, images

    def _train(self, step: Step) -> None:
        if isinstance(step.section, (ShrinkSection, ControlNetSection)) and step.section.images is not None:
            self._encode(step, step.section.images)
        job = StageJob(
            stage=step.name,
            digest=step.digest,
            recipe=self.recipe.model_dump(mode="json"),
            prompts=self.prompts.digest,
            settings=self.settings.environment(),
            inputs={name: self.result.digests[name] for name in step.reads},
            teacher=None if isinstance(step.section, ControlNetSection) else step.teacher,
            client=self.pool(step.teacher).client() if step.teacher and self._asks_pool(step) else None,
            board=self.board(),
            cluster=self.cluster,
        )
        run_stage(job, self.settings, self.watch)

    def _encode(self, step: Step, images: ImagesSection) -> None:
        """A stage's real images, by the pool; one that no step asks makes room for the workers at once."""
        assert step.teacher is not None
        client, told = self.pool(step.teacher).client().whole(), lambda done: self.watch("images", done, done, {})
        encode_images(images, self.recipe.teacher, client, self.settings, told)
        if not self._asks_pool(step):
            self._close(step.teacher)

    def _close(self, spec: TeacherSpec) -> None:
        with self._lock:
            if spec in self.pools:
                self.pools.pop(spec).close()
