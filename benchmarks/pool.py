"""A separate teacher pool against a teacher inside each worker, on the same devices: here, two CPU cores.

    python -m benchmarks.pool

The teacher is that of the emoji world. Two loads without optimiser or data: `kd` asks for the network's output and its six features, ahead
of need; `sdi` asks for a guided score of its own sample and trains a teacher-sized online model meanwhile. Arms take turns; medians of
images a second over all workers of an arm, and of CPU milliseconds an image, teacher included, which other work on the machine disturbs
less. Writes benchmarks/results/pool.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.machine import machine, write
from trainer.models.students import FeatureTap, feature_names, shrink
from trainer.pool.client import Limits, Share, TeacherPool
from trainer.session import ray_session
from trainer.specs import TeacherSpec
from trainer.teacher import Denoise, InProcessTeacher, Teacher

SOURCE = Path(__file__).parents[1] / "trainer" / "assets" / "emoji" / "teacher"
LATENT, TEXT, CAPTION = (16, 8, 8), (20, 128), "red apple"
BATCH = 16


@dataclass(frozen=True)
class Arm:
    """How the cores are used: so many workers, whose teacher is a pool (by name) or their own, with so many requests ahead."""

    name: str
    load: str
    workers: int
    pool: str | None = None
    depth: int = 0


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

    def __init__(self, pools: dict[str | None, Any]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        own = Teacher(SOURCE)
        self.teachers: dict[str | None, Any] = {None: InProcessTeacher(own), **pools}
        self.student = shrink(own.unet).to(memory_format=torch.channels_last)
        self.online: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(SOURCE / "unet")
        self.teacher_names, student_names = feature_names(self.student)
        self.tap, self.text_BLD = FeatureTap(self.student, student_names), torch.randn(BATCH, *TEXT)

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
            steps += 1
        taken, waited = time.perf_counter() - start, self.waited
        while self.ahead:
            self.collect()
        cpu, answered = time.process_time() - cpu, steps + arm.depth
        return {"steps": steps, "seconds": taken, "waited": waited, "received": self.received / answered, "cpu": cpu}

    def ask(self, noisy_BCHW: Tensor, names: tuple[str, ...] = (), guidance: float = 1.0) -> None:
        start = time.perf_counter()
        request = Denoise(noisy_BCHW.half().numpy(), np.full(BATCH, 500), [CAPTION] * BATCH, guidance, names)
        self.ahead.append(self.teacher.submit(request))
        self.waited += time.perf_counter() - start

    def collect(self) -> list[Tensor]:
        start = time.perf_counter()
        reply = self.ahead.popleft().result()
        self.waited += time.perf_counter() - start
        self.received += sum(part.nbytes for part in reply)
        return [torch.from_numpy(part.astype(np.float32)) for part in reply]

    def noisy(self) -> Tensor:
        return torch.randn(BATCH, *LATENT)

    def network(self, unet: UNet2DConditionModel, x_BCHW: Tensor) -> Tensor:
        output: Tensor = unet(x_BCHW, torch.full((BATCH,), 500), self.text_BLD).sample
        return output

    def kd(self) -> None:
        """Output and features of a batch; the teacher's were asked for some steps ago."""
        self.ask(self.noisy(), tuple(self.teacher_names))
        target_BCHW, *features = self.collect()
        loss = (self.network(self.student, torch.randn(BATCH, *LATENT)) - target_BCHW).square().mean()
        for mine, theirs in zip(self.tap.take(), features, strict=True):
            loss = loss + (mine - theirs).square().mean()
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


def measure(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Every arm `rounds` times, in turn."""
    import ray

    with ray_session():
        pools = {
            "one": TeacherPool(TeacherSpec(str(SOURCE)), 1, Share(cpus=0), limits=Limits(max_batch=1)),
            "joining": TeacherPool(TeacherSpec(str(SOURCE)), 1, Share(cpus=0), limits=Limits(max_batch=64)),
        }
        actor: Any = ray.remote(num_cpus=0)(Worker)
        workers = [actor.remote({name: pool.client() for name, pool in pools.items()}) for _ in range(2)]
        for arm in ARMS:
            turn(arm, workers, pools, 0.5)
        return [
            {"round": number, **vars(arm), **turn(arm, workers, pools, seconds)} for number in range(rounds) for arm in ARMS
        ]


def turn(arm: Arm, workers: list[Any], pools: dict[str, TeacherPool], seconds: float) -> dict[str, float]:
    """One arm for some seconds: images a second, share of time waiting, bytes received a step, images a teacher's forward."""
    import ray

    pool = pools.get(arm.pool or "")
    before = pool.statistics()[0] if pool else {}
    cpu = cpu_seconds(before)
    runs = ray.get([worker.run.remote(arm, seconds) for worker in workers[: arm.workers]])
    after = pool.statistics()[0] if pool else {}
    answered = sum(run["steps"] + arm.depth for run in runs)
    found = {
        "images_per_s": sum(BATCH * run["steps"] / run["seconds"] for run in runs),
        "waiting_share": statistics.mean(run["waited"] / run["seconds"] for run in runs),
        "bytes_per_step": statistics.mean(run["received"] for run in runs),
        "cpu_ms_per_image": 1000 * (sum(run["cpu"] for run in runs) + cpu_seconds(after) - cpu) / (BATCH * answered),
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


def batch_efficiency(rounds: int) -> list[dict[str, Any]]:
    """Median CPU milliseconds an image of the teacher alone, one thread, by batch."""
    torch.set_num_threads(1)
    teacher, lines = Teacher(SOURCE), []
    requests = {
        size: Denoise(np.zeros((size, *LATENT), np.float16), np.full(size, 500), [CAPTION] * size)
        for size in (1, 2, 4, 8, 16, 32, 64)
    }
    times: dict[int, list[float]] = {size: [] for size in requests}
    for number in range(rounds + 1):
        for size, request in requests.items():
            start = time.process_time()
            teacher.answer(request)
            if number:
                times[size].append(1000 * (time.process_time() - start) / size)
    for size, taken in times.items():
        lines.append({"teacher_batch": size, "cpu_ms_per_image": round(statistics.median(taken), 3)})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    lines = [*batch_efficiency(arguments.rounds), *measure(arguments.rounds, arguments.seconds)]
    print(write("pool", [{"machine": machine(), **line} for line in lines]))


if __name__ == "__main__":
    main()
