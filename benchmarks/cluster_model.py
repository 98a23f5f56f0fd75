"""The cluster model at the sizes of SD 2.1 and SDXL, as a table and a plot in docs/teacher_pool.md.

    python -m benchmarks.cluster_model
    python -m benchmarks.cluster_model --measured benchmarks/results/pool_sd21_cuda.jsonl

The second adds cases with the times that benchmarks.pool measured in place of FLOPs and speeds; memory and the network between machines
stay assumptions.
FLOPs and activations were counted with torch's FlopCounterMode and saved-tensor hooks on the meta device, bf16, attention without its
matrix; device and network speeds are assumptions, named in the table's text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.pool.cluster_model import Cluster, Device, Load, Network, best, predict

DOCUMENT = Path(__file__).parents[1] / "docs" / "teacher_pool.md"
BEGIN, END = "<!-- benchmarks.cluster_model begins -->", "<!-- benchmarks.cluster_model ends -->"
SIZES = (8, 16, 32, 64, 128, 256)
GFLOP, GB, MB = 1e9, 1e9, 1e6

H200 = Device(flops=989e12, memory=141 * GB)
A100 = Device(flops=312e12, memory=80 * GB)
A100_40 = replace(A100, memory=40 * GB)
SLOW, FAST = Network(), Network(objects=6e9)  # TCP between machines, shared by eight GPUs; and at the speed of RDMA

# The student's weights, gradients, moments and average in float32 take 20 bytes a parameter, the online model's 16, bf16 weights 2.
SD21_KD = Load(
    worker_flops=3 * 370 * GFLOP, teacher_flops=804 * GFLOP, overlap=0.0, bytes=12.2 * MB, state_bytes=7.1 * GB,
    activation_bytes=0.36 * GB, teacher_bytes=1.7 * GB, teacher_activation_bytes=0.1 * GB, gradient_bytes=1.3 * GB, depth=3,
)  # fmt: skip
# Student 3 x 370, online update 3 x 804 and score 804 (these two overlap), features of eq. 10 3 x 250; a guided answer is two forwards.
SD21_SDI = Load(
    worker_flops=(3 * 370 + 4 * 804 + 3 * 250) * GFLOP, teacher_flops=2 * 804 * GFLOP, overlap=4 * 804 / (3 * 370 + 4 * 804 + 3 * 250),
    bytes=0.066 * MB, state_bytes=21.6 * GB, activation_bytes=1.37 * GB, teacher_bytes=1.7 * GB, teacher_activation_bytes=0.2 * GB,
    gradient_bytes=4.7 * GB,
)  # fmt: skip
SDXL_SDI = Load(
    worker_flops=(3 * 2822 + 4 * 6761 + 3 * 2136) * GFLOP, teacher_flops=2 * 6761 * GFLOP,
    overlap=4 * 6761 / (3 * 2822 + 4 * 6761 + 3 * 2136), bytes=0.26 * MB, state_bytes=59.4 * GB, activation_bytes=10.3 * GB,
    teacher_bytes=5.1 * GB, teacher_activation_bytes=0.8 * GB, gradient_bytes=13.2 * GB,
)  # fmt: skip

Case = tuple[str, Device, Load, Network]
CASES: list[Case] = [
    ("KD, SD 2.1, H200", H200, SD21_KD, SLOW),
    ("KD, SD 2.1, H200, fast objects", H200, SD21_KD, FAST),
    ("SDI, SD 2.1, H200", H200, SD21_SDI, SLOW),
    ("SDI, SD 2.1, A100 80 GB", A100, SD21_SDI, SLOW),
    ("SDI, SD 2.1, A100 40 GB", A100_40, SD21_SDI, SLOW),
    ("SDI, SD 2.1, a device of 28.5 GB", replace(A100_40, memory=28.5 * GB), SD21_SDI, SLOW),
    ("SDI, SDXL, H200", H200, SDXL_SDI, SLOW),
    ("SDI, SDXL, A100 80 GB", A100, SDXL_SDI, SLOW),
    ("SDI, SDXL, A100 80 GB, half_batch 0", replace(A100, half_batch=0.0), SDXL_SDI, SLOW),
    ("SDI, SDXL, a device of 75 GB", replace(A100, memory=75 * GB), SDXL_SDI, SLOW),
]


COUNTED = {"sd21 kd": SD21_KD, "sd21 sdi": SD21_SDI, "sdxl sdi": SDXL_SDI}
"""Whose memory and overlap measured cases take over."""


def measured(lines: list[dict[str, Any]]) -> list[Case]:
    """Cases of a file of benchmarks.pool, on a device of one "FLOP" a second, so that costs are seconds.

    A forward of b images takes F (b + half_batch), fitted to the teacher alone: F is the slope, half_batch the intercept over it. A
    worker's own part is as far from its best speed at its batch as the teacher.

    Raises:
        ValueError: the teacher's forwards do not take longer with more images: the machine was busy with other things.
    """
    first = lines[0]
    alone = [(line["teacher_batch"], line["forward_s"]) for line in lines if "teacher_batch" in line]
    slope, start = map(float, np.polyfit([size for size, _ in alone], [seconds for _, seconds in alone], 1))
    if slope <= 0:
        raise ValueError(
            f"forwards that do not grow with the batch: {alone}; measure again on a machine that does nothing else"
        )
    half = max(0.0, start / slope)
    device = Device(flops=1.0, memory=first["machine"].get("memory", H200.memory), utilisation=1.0, half_batch=half)
    away = statistics.mean(line["there_and_back_s"] for line in lines if "there_and_back_s" in line)
    network = Network(round_trip=max(0.0, away - device.seconds(slope, 1)))
    name = first["machine"].get("gpu", first["machine"]["cpu"])
    cases: list[Case] = []
    for line in (line for line in lines if "worker_step_s" in line):
        counted = COUNTED.get(f"{first['family'].removesuffix('_small')} {line['load']}")
        if counted is not None:
            forwards = 2 if line["load"] == "sdi" else 1  # a guided answer
            own = line["worker_step_s"] / (first["batch"] + half)
            load = replace(counted, worker_flops=own, teacher_flops=forwards * slope, bytes=line["bytes"])
            cases.append((f"{line['load'].upper()}, {first['family']}, measured on {name}", device, load, network))
    return cases


def table(cases: Sequence[Case] = CASES) -> str:
    """Of each case and cluster: pool over in-worker, and the best pool's size."""
    lines = [
        "| | in worker, images/s, 8 and 256 GPUs | " + " | ".join(map(str, SIZES)) + " | waiting at 8, 256 |",
        "|---|---|" + "---|" * (len(SIZES) + 1),
    ]
    for name, device, load, network in cases:
        clusters = [Cluster(device, size, network) for size in SIZES]
        inside, pooled = [predict(c, load, 0) for c in clusters], [best(c, load) for c in clusters]
        cells = [ratio(i.images_per_s, p.images_per_s, p.pool) for i, p in zip(inside, pooled, strict=True)]
        ends = f"{inside[0].images_per_s:.0f}, {inside[-1].images_per_s:.0f}"
        lines.append(f"| {name} | {ends} | " + " | ".join(cells) + f" | {pooled[0].waiting:.0%}, {pooled[-1].waiting:.0%} |")
    return "\n".join(lines)


def ratio(inside: float, pooled: float, pool: int) -> str:
    """How much faster the pool is, and how many devices it takes."""
    return f"only the pool fits ({pool})" if inside == 0 else f"{pooled / inside:.2f} ({pool})"


def added() -> str:
    """H200 workers alone, against the same workers with A100 teachers beside them."""
    lines = ["| H200 workers | teachers inside, images/s | as many A100 as teachers |", "|---|---|---|"]
    for size in SIZES:
        inside = predict(Cluster(H200, size), SD21_SDI, 0).images_per_s
        found = predict(Cluster(H200, 2 * size, teacher_device=A100), SD21_SDI, size).images_per_s
        lines.append(f"| {size} | {inside:.0f} | {found:.0f} ({found / inside:.2f}) |")
    return "\n".join(lines)


def plot(path: Path, cases: Sequence[Case] = CASES) -> None:
    """Pool over in-worker, by GPUs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4))
    for name, device, load, network in cases:
        inside = [predict(Cluster(device, size, network), load, 0).images_per_s for size in SIZES]
        pooled = [best(Cluster(device, size, network), load).images_per_s for size in SIZES]
        if all(inside):
            axes.plot(SIZES, [p / i for p, i in zip(pooled, inside, strict=True)], marker="o", markersize=3, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(
        xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="GPUs", ylabel="images/s: best pool / teacher in each worker"
    )
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="files of benchmarks.pool")
    files = [[json.loads(line) for line in path.read_text().splitlines()] for path in parser.parse_args().measured]
    cases = [*CASES, *(case for lines in files for case in measured(lines))]
    before, _, rest = DOCUMENT.read_text(encoding="utf8").partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{BEGIN}\n\n{table(cases)}\n\n![Pool over in-worker]({DOCUMENT.stem}.png)\n\n{added()}\n\n{END}"
    DOCUMENT.write_text(before + made + after, encoding="utf8")
    plot(DOCUMENT.with_suffix(".png"), cases)
    print(made)


if __name__ == "__main__":
    main()
