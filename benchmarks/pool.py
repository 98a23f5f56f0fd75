"""A separate teacher pool against a teacher inside each worker, on the same devices: by default two CPU cores.

    python -m benchmarks.pool
    python -m benchmarks.pool --family sd21 --device cuda      random weights of the real shapes, bf16, on the GPUs of a machine
    python -m benchmarks.cluster_model --measured benchmarks/results/pool_sd21_cuda.jsonl

The teacher is that of the emoji world, or a random one of a family. Two loads without optimiser or data: `kd` asks for the network's
output and its features, ahead of need; `sdi` asks for a guided score of its own sample and trains a teacher-sized online model meanwhile.
Arms take turns; medians of images a second over all workers of an arm, and of CPU milliseconds an image, teacher included, which other
work on the machine disturbs less. On GPUs, of which each process takes `--gpus` (so that two workers and two pools share one), wall clock
counts. Beside the arms it measures what benchmarks.cluster_model takes: the teacher alone by batch, a worker whose teacher answers at
once, the way there and back. Writes benchmarks/results/pool.jsonl, or pool_<family>_<device>.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.machine import machine, write
from trainer.models.families import FAMILIES, write_teacher
from trainer.models.students import FeatureTap, feature_names, shrink
from trainer.placement import Placement
from trainer.pool.client import Limits, Share, TeacherPool
from trainer.session import ray_session
from trainer.sources import latent_shape
from trainer.specs import TeacherSpec
from trainer.teacher import Denoise, InProcessTeacher, Teacher

SOURCE = Path(__file__).parents[1] / "trainer" / "assets" / "emoji" / "teacher"
CAPTION = "red apple"
SIZES = (1, 2, 4, 8, 16, 32, 64)  # of the teacher alone


@dataclass(frozen=True)
class Setting:
    """Whose teacher, on which device, and the images of a worker's step."""

    source: str = str(SOURCE)
    family: str = "emoji"
    device: str = "cpu"
    batch: int = 16
    gpus: float = 0.0

    @property
    def precision(self) -> Literal["float32", "bf16"]:
        return "bf16" if self.device == "cuda" else "float32"

    @property
    def spec(self) -> TeacherSpec:
        return TeacherSpec(self.source, self.precision)

    @property
    def name(self) -> str:
        """Of the result's file."""
        return "pool" if (self.family, self.device) == ("emoji", "cpu") else f"pool_{self.family}_{self.device}"


@dataclass(frozen=True)
class Arm:
    """How the cores are used: so many workers, whose teacher is a pool (by name) or their own, with so many requests ahead."""

    name: str
    load: str
    workers: int
    pool: str | None = None
    depth: int = 0


FREE = "free"  # a teacher that costs nothing
ARMS = [
    Arm("in worker, 2 workers", "kd", 2),
    Arm("1 worker, 1 teacher, depth 0", "kd", 1, "one", 0),
    Arm("1 worker, 1 teacher, depth 1", "kd", 1, "one", 1),
    Arm("1 worker, 1 teacher, depth 3", "kd", 1, "one", 3),
    Arm("2 workers, 1 teacher, depth 3", "kd", 2, "one", 3),
    Arm("2 workers, 1 teacher joining, depth 3", "kd", 2, "joining", 3),
    Arm("in worker, 2 workers", "sdi", 2),
    Arm("1 worker, 1 teacher", "sdi", 1, "one"),
    Arm("2 workers, 1 teacher", "sdi", 2, "one"),
    Arm("2 workers, 1 teacher joining", "sdi", 2, "joining"),
]


class Worker:
    """One training process with a student, an online model and a teacher of its own; each arm uses what it needs."""

    def __init__(self, setting: Setting, pools: dict[str | None, Any]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.placement = Placement(torch.device(setting.device), setting.precision)
        self.batch, own = setting.batch, Teacher.load(setting.spec, setting.device)
        self.latent = latent_shape(Path(setting.source))
        self.student = self._trained(shrink(own.unet))
        self.online = self._trained(UNet2DConditionModel.from_pretrained(own.folder / "unet", torch_dtype=torch.float32))
        self.teacher_names, student_names = feature_names(self.student)
        self.tap, self.text = FeatureTap(self.student, student_names), own.text.encode([CAPTION] * self.batch)
        self.teachers: dict[str | None, Any] = {None: InProcessTeacher(own), FREE: Free(InProcessTeacher(own)), **pools}

    def _trained(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        self.placement.place(unet.requires_grad_(True))
        return unet

    def run(self, arm: Arm, seconds: float) -> dict[str, float]:
        """Steps, seconds, seconds spent asking and waiting, bytes received."""
        self.teacher, self.waited, self.received = self.teachers[arm.pool], 0.0, 0
        self.ahead: deque[Any] = deque()
        step = getattr(self, arm.load)
        for _ in range(arm.depth):
            self.ask(self.noisy(), tuple(self.teacher_names))
        start, cpu, steps = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            step()
            self._synchronise()
            steps += 1
        taken, waited = time.perf_counter() - start, self.waited
        while self.ahead:
            self.collect()
        cpu, answered = time.process_time() - cpu, steps + arm.depth
        return {"steps": steps, "seconds": taken, "waited": waited, "received": self.received / answered, "cpu": cpu}

    def there_and_back(self, pool: str, times: int) -> float:
        """Median seconds between asking a pool for one image's output and having it."""
        request = Denoise(np.zeros((1, *self.latent), np.float16), np.full(1, 500), [CAPTION])
        return statistics.median(seconds_of(lambda: self.teachers[pool].submit(request).result()) for _ in range(times))

    def _synchronise(self) -> None:
        if self.placement.device.type == "cuda":
            torch.cuda.synchronize()

    def ask(self, noisy_BCHW: Tensor, names: tuple[str, ...] = (), guidance: float = 1.0) -> None:
        start = time.perf_counter()
        noisy = noisy_BCHW.half().cpu().numpy()
        request = Denoise(noisy, np.full(self.batch, 500), [CAPTION] * self.batch, guidance, names)
        self.ahead.append(self.teacher.submit(request))
        self.waited += time.perf_counter() - start

    def collect(self) -> list[Tensor]:
        start = time.perf_counter()
        reply = self.ahead.popleft().result()
        self.waited += time.perf_counter() - start
        self.received += sum(part.nbytes for part in reply)
        return [torch.from_numpy(part).to(self.placement.device).float() for part in reply]

    def noisy(self) -> Tensor:
        return torch.randn(self.batch, *self.latent, device=self.placement.device)

    def network(self, unet: UNet2DConditionModel, x_BCHW: Tensor) -> Tensor:
        t_B = torch.full((self.batch,), 500, device=x_BCHW.device)
        with self.placement.autocast():
            output: Tensor = unet(x_BCHW, t_B, **self.text.arguments()).sample
        return output.float()

    def kd(self) -> None:
        """Output and features of a batch; the teacher's were asked for some steps ago."""
        self.ask(self.noisy(), tuple(self.teacher_names))
        target_BCHW, *features = self.collect()
        loss = (self.network(self.student, self.noisy()) - target_BCHW).square().mean()
        for mine, theirs in zip(self.tap.take(), features, strict=True):
            loss = loss + (mine.float() - theirs).square().mean()
        loss.backward()

    def sdi(self) -> None:
        """Sample, ask for its guided score, train the online model and take its score meanwhile, then the student's backward."""
        x0_BCHW = self.network(self.student, self.noisy())
        self.ask(x0_BCHW.detach() + self.noisy(), guidance=1.75)
        (self.network(self.online, x0_BCHW.detach()) - self.noisy()).square().mean().backward()
        with torch.no_grad():
            online_BCHW = self.network(self.online, x0_BCHW.detach())
        [offline_BCHW] = self.collect()
        (x0_BCHW * (online_BCHW - offline_BCHW)).mean().backward()


class Free:
    """A teacher that answers at once: with what another said the first time it was asked so."""

    def __init__(self, teacher: InProcessTeacher) -> None:
        self.teacher = teacher
        self.known: dict[tuple[Any, ...], Any] = {}

    def submit(self, request: Denoise) -> Any:
        kind = (request.guidance, request.feature_names)
        if kind not in self.known:
            self.known[kind] = self.teacher.submit(request)
        return self.known[kind]


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def measure(setting: Setting, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Every arm `rounds` times, in turn, and the costs of a step and of the way there and back."""
    import ray

    share = Share(cpus=0, gpus=setting.gpus)
    with ray_session():
        pools = {
            "one": TeacherPool(setting.spec, 1, share, limits=Limits(max_batch=1)),
            "joining": TeacherPool(setting.spec, 1, share, limits=Limits(max_batch=64)),
        }
        actor: Any = ray.remote(num_cpus=0, num_gpus=setting.gpus)(Worker)
        workers = [actor.remote(setting, {name: pool.client() for name, pool in pools.items()}) for _ in range(2)]
        for arm in ARMS:
            turn(setting, arm, workers, pools, 0.5)
        lines = [
            {"round": number, **vars(arm), **turn(setting, arm, workers, pools, seconds)}
            for number in range(rounds)
            for arm in ARMS
        ]
        return [*lines, *costs(setting, workers[0], rounds, seconds)]


def costs(setting: Setting, worker: Any, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Of one worker alone: seconds of a step without its teacher's, by load, and of the way to a pool and back."""
    import ray

    found: list[dict[str, Any]] = []
    clock = "cpu" if setting.device == "cpu" else "seconds"
    for load in ("kd", "sdi"):
        arm = Arm("nobody to wait for", load, 1, FREE)
        runs = ray.get([worker.run.remote(arm, seconds) for _ in range(rounds + 1)])[1:]
        step = statistics.median(run[clock] / run["steps"] for run in runs)
        found.append({"load": load, "worker_step_s": round(step, 6), "bytes": runs[0]["received"] / setting.batch})
    away = ray.get(worker.there_and_back.remote("one", 5 * rounds))
    return [*found, {"there_and_back_s": round(away, 6)}]


def turn(setting: Setting, arm: Arm, workers: list[Any], pools: dict[str, TeacherPool], seconds: float) -> dict[str, float]:
    """One arm for some seconds: images a second, share of time waiting, bytes received a step, images a teacher's forward."""
    import ray

    pool = pools.get(arm.pool or "")
    before = pool.statistics()[0] if pool else {}
    cpu = cpu_seconds(before)
    runs = ray.get([worker.run.remote(arm, seconds) for worker in workers[: arm.workers]])
    after = pool.statistics()[0] if pool else {}
    answered = sum(run["steps"] + arm.depth for run in runs)
    found = {
        "images_per_s": sum(setting.batch * run["steps"] / run["seconds"] for run in runs),
        "waiting_share": statistics.mean(run["waited"] / run["seconds"] for run in runs),
        "bytes_per_step": statistics.mean(run["received"] for run in runs),
        "cpu_ms_per_image": 1000 * (sum(run["cpu"] for run in runs) + cpu_seconds(after) - cpu) / (setting.batch * answered),
    }
    if pool:
        forwards = max(1, after["forwards"] - before["forwards"])
        found["forward_images"] = (after["images"] - before["images"]) / forwards
        found["teacher_busy"] = (after["busy_seconds"] - before["busy_seconds"]) / max(run["seconds"] for run in runs)
    return {name: round(value, 4) for name, value in found.items()}


def cpu_seconds(member: dict[str, float]) -> float:
    """Processor time of a member's process so far; of none, nothing."""
    if not member:
        return 0.0
    fields = Path(f"/proc/{int(member['pid'])}/stat").read_text(encoding="utf8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def batch_efficiency(setting: Setting, rounds: int, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """Of the teacher alone, by batch: median seconds of a forward; on a CPU of one thread, and milliseconds an image too."""
    torch.set_num_threads(1)
    teacher, lines = Teacher.load(setting.spec, setting.device), []
    latent = latent_shape(teacher.folder)
    requests = {size: Denoise(np.zeros((size, *latent), np.float16), np.full(size, 500), [CAPTION] * size) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in requests}
    clock = clock_of(setting)
    for number in range(rounds + 1):
        for size, request in requests.items():
            taken = seconds_of(lambda: teacher.answer(request), clock)  # noqa: B023  (called at once; its reply is on the CPU)
            if number:
                times[size].append(taken)
    for size, found in times.items():
        middle = statistics.median(found)
        processor = {"cpu_ms_per_image": round(1000 * middle / size, 3)} if setting.device == "cpu" else {}
        lines.append({"teacher_batch": size, "forward_s": round(middle, 6), **processor})
    return lines


def clock_of(setting: Setting) -> Callable[[], float]:
    """Of a CPU its own time, which other work does not lengthen."""
    return time.process_time if setting.device == "cpu" else time.perf_counter


def facts(setting: Setting) -> dict[str, Any]:
    """What the lines were measured on."""
    gpu: dict[str, Any] = {}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {"gpu": properties.name, "memory": properties.total_memory, "gpus": setting.gpus}
    return {"machine": machine() | gpu, "family": setting.family, "batch": setting.batch}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--family", default="emoji", choices=["emoji", *FAMILIES], help="emoji's teacher, or random weights")
    parser.add_argument("--small", action="store_true", help="the family's classes at tiny widths: does the script run?")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--gpus", type=float, default=0.25, help="of a process, on cuda")
    parser.add_argument("--folder", type=Path, help="keeps the random teacher")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        setting = prepared(chosen, chosen.folder or Path(scratch))
        lines = [*batch_efficiency(setting, chosen.rounds), *measure(setting, chosen.rounds, chosen.seconds)]
        print(write(setting.name, [{**facts(setting), **line} for line in lines]))


def prepared(chosen: argparse.Namespace, folder: Path) -> Setting:
    """The teacher of the chosen family, written where it is not there."""
    source, gpus = SOURCE, chosen.gpus if chosen.device == "cuda" else 0.0
    if chosen.family != "emoji":
        source = folder / chosen.family
        if not (source / "model_index.json").exists():
            write_teacher(chosen.family, source, small=chosen.small, dtype=torch.bfloat16)
    family = f"{chosen.family}_small" if chosen.small else chosen.family
    return Setting(str(source), family, chosen.device, chosen.batch, gpus)


if __name__ == "__main__":
    main()
