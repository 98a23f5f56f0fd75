"""Steps of training at the real sizes, on random weights: images per second, memory, time spent waiting for the teacher, share of the peak.

    python -m benchmarks.full_size sd21                                  here: full width, 64x64 pixels, two steps
    python -m benchmarks.full_size sd21 --pixels 512 --batch 16 --steps 20 --precision bf16 --device cuda

Needs torch and diffusers, not Ray: the teacher answers in a thread of the same process, on a stream of its own where there is a GPU.
One line per stage goes to benchmarks/results/full_size.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.loop import Stage
from trainer.models.families import FAMILIES, set_image_size, write_teacher
from trainer.models.students import decoder_config
from trainer.pairs import Pairs
from trainer.placement import Placement
from trainer.recipe import DistillRecipe
from trainer.sources import hush, latent_shape
from trainer.specs import TeacherSpec
from trainer.stages.context import StageContext
from trainer.stages.diff_instruct import DiffInstructStage
from trainer.stages.unet import UNetStage
from trainer.stages.warmup import WarmupStage
from trainer.teacher import Array, Request, Teacher

RESULTS = Path(__file__).parent / "results" / "full_size.jsonl"
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # bfloat16, dense, from the data sheets
STAGES: dict[str, Callable[[StageContext], Stage]] = {
    "unet": UNetStage,
    "warmup": WarmupStage,
    "diff_instruct": DiffInstructStage,
}
CAPTIONS = [
    "a photograph of an astronaut riding a horse",
    "a watercolour of a harbour at dawn",
    "a bowl of ramen, studio light",
]


class ThreadTeacher:
    """A client whose teacher works beside the training step; `waited` is what the step spent on it. `counted` has the operations of each
    answer while it is a list."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.waited, self.taken = teacher, 0.0, 0
        self.counted: list[int] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream() if teacher.device.type == "cuda" else None

    def submit(self, request: Request) -> _Reply:
        return _Reply(self, self._thread.submit(self._answer, request))

    def _answer(self, request: Request) -> list[Array]:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            counted = self.counted
            if counted is None:
                return self.teacher.answer(request)
            with FlopCounterMode(display=False) as counter:  # of this thread alone
                answer = self.teacher.answer(request)
            counted.append(counter.get_total_flops())
            return answer


class _Reply:
    def __init__(self, client: ThreadTeacher, future: Future[list[Array]]) -> None:
        self.client, self.future = client, future

    def result(self) -> list[Array]:
        start = time.perf_counter()
        reply = self.future.result()
        self.client.waited += time.perf_counter() - start
        self.client.taken += 1
        return reply


def recipe(chosen: argparse.Namespace) -> DistillRecipe:
    """The paper's stages at one size; numbers of the optimisation do not matter here."""
    step = {"steps": chosen.steps + 2, "batch": chosen.batch, "lr": 1e-5}
    matching = {"feature_weights": (1.0, *[0.5] * len(FAMILIES[chosen.family].unet["block_out_channels"]))}
    online = {} if chosen.online == "all" else {"online_lora_rank": 16}
    return DistillRecipe.model_validate({
        "kind": "distill", "name": "full-size", "teacher": chosen.family, "data": {"prompts": "none"},
        "compute": {"precision": chosen.precision, "activation_checkpointing": chosen.checkpointing}, "pairs": {"count": 8},
        "decoder": {**step, "config": decoder_config(4)}, "unet": step, "warmup": {**step, **matching},
        "diff_instruct": {**step, **matching, "online_lr": 1e-5, **online},
        "evaluation": {"train_images": 1, "heldout_images": 1},
    })  # fmt: skip


def measure(
    name: str, context: StageContext, client: ThreadTeacher, chosen: argparse.Namespace
) -> tuple[dict[str, Any], Stage]:
    """Two steps to warm up, by whose operations the share of the peak is told, then the timed ones."""
    stage = STAGES[name](context)
    flops, teacher_flops = _operations(stage, client)
    client.waited = 0.0
    _synchronise(chosen.device)
    start = time.perf_counter()
    losses = [float(stage.step(index)["loss"]) for index in range(2, chosen.steps + 2)]
    _synchronise(chosen.device)
    seconds = (time.perf_counter() - start) / chosen.steps
    line = {
        "stage": name, "seconds_per_step": round(seconds, 3), "images_per_second": round(chosen.batch / seconds, 3),
        "teacher_wait": round(client.waited / chosen.steps / seconds, 4), "tflop_per_step": round(flops / 1e12, 9),
        "teacher_tflop_per_step": round(teacher_flops / 1e12, 9), "memory_gib": round(_memory(chosen.device), 2),
        "losses": [round(loss, 5) for loss in losses],
    }  # fmt: skip
    accelerator = torch.cuda.get_device_name() if chosen.device == "cuda" else ""
    return line | share_of_peak(flops + teacher_flops, seconds, accelerator), stage


def _operations(stage: Stage, client: ThreadTeacher) -> tuple[int, float]:
    """Two steps to warm up: operations of the second one, and of the teacher's answers that it took."""
    client.counted = []
    stage.step(0)
    taken = client.taken
    with FlopCounterMode(display=False) as counter:
        stage.step(1)
    taken, counted = client.taken - taken, client.counted
    client.counted = None
    return counter.get_total_flops(), taken * sum(counted) / len(counted) if counted else 0.0


def share_of_peak(flops: float, seconds: float, device: str) -> dict[str, float]:
    """Of the accelerator's peak, by the operations of the step and of the teacher, which works on the same one."""
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
    return {} if peak is None else {"share_of_peak": round(flops / seconds / 1e12 / peak, 4)}


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _memory(device: str) -> float:
    """Peak, in GiB: of the accelerator, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(chosen: argparse.Namespace, folder: Path) -> None:
    hush()
    teacher_folder = folder / chosen.family
    if not (teacher_folder / "model_index.json").exists():
        write_teacher(chosen.family, teacher_folder, small=chosen.small, dtype=torch.bfloat16)
    set_image_size(teacher_folder, chosen.pixels)
    shape = latent_shape(teacher_folder)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, *shape, generator=generator).half()
    pairs = Pairs(latents, torch.arange(8), [CAPTIONS[i % len(CAPTIONS)] for i in range(8)])
    settings = recipe(chosen).model_copy(update={"teacher": str(teacher_folder)})
    placement = Placement.of(settings.compute, chosen.device)
    spec = TeacherSpec(str(teacher_folder), "bf16" if chosen.precision == "bf16" else "float32")
    client, inputs = ThreadTeacher(Teacher.load(spec, chosen.device)), dict[str, Path]()
    client.teacher.text.encode([*CAPTIONS, ""])  # kept from then on, as in a run
    for name in STAGES:
        if chosen.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        context = StageContext(settings, teacher_folder, client, pairs, inputs, placement)
        line, stage = measure(name, context, client, chosen)
        if name == "unet":
            stage.export(folder / "student")
            inputs["unet"] = inputs["warmup"] = folder / "student"
        del stage
        note(line, chosen)


def note(line: dict[str, Any], chosen: argparse.Namespace) -> None:
    where = (
        torch.cuda.get_device_name() if chosen.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    facts = {"family": chosen.family, "small": chosen.small, "pixels": chosen.pixels, "batch": chosen.batch, "precision": chosen.precision,
             "online": chosen.online, "checkpointing": chosen.checkpointing, "machine": where, "torch": torch.__version__}  # fmt: skip
    with RESULTS.open("a") as file:
        file.write(json.dumps({**facts, **line}) + "\n")
    print(json.dumps(line), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--online", default=None, choices=["all", "lora"], help="all weights of the online model (GPU), or a LoRA (CPU)"
    )
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--small", action="store_true", help="the same classes at tiny widths: does the script run?")
    parser.add_argument("--folder", type=Path, help="keeps the random teacher")
    chosen = parser.parse_args(arguments)
    chosen.online = chosen.online or ("all" if chosen.device == "cuda" else "lora")
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run(chosen, chosen.folder or Path(scratch))


if __name__ == "__main__":
    main()
