"""A bundle measured by a protocol: images first, kept as files so that an interrupted run goes on; then their scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxs.bundle import Manifest
from sdxs.errors import InvalidRequest, NotFound
from trainer.evaluation.generators import BATCH, Images, gflops, latencies_ms, served
from trainer.evaluation.metrics.base import ImageFeatures
from trainer.evaluation.metrics.clip import ALLOWED as CLIP_ALLOWED
from trainer.evaluation.metrics.clip import ClipFeatures
from trainer.evaluation.metrics.frechet import Gaussian, gaussian_distance
from trainer.evaluation.metrics.inception import ALLOWED as INCEPTION_ALLOWED
from trainer.evaluation.metrics.inception import InceptionFeatures
from trainer.evaluation.metrics.kernel import kernel_distance
from trainer.evaluation.metrics.manifold import NEIGHBOURS, precision_recall
from trainer.evaluation.protocol import CaptionsSection, Protocol
from trainer.evaluation.rows import Row
from trainer.evaluation.scoring import best_device, embedded_judge
from trainer.recipe import digest
from trainer.sources import hush

Watch = Callable[[str, int, int, dict[str, float]], None]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REFERENCE, RESULT, BEGUN = "reference.npz", "result.json", "run.json"


def default_folder(protocol: Protocol, manifest: Manifest) -> Path:
    """Where a bundle's images and result go: one folder for each protocol and bundle."""
    return Path("out") / "eval" / protocol.name / f"{manifest.name}-{manifest.digest[7:19]}"


def run_protocol(protocol: Protocol, bundle: Path, manifest: Manifest, output: Path, watch: Watch) -> Row:
    """Make what images `output` lacks, measure all, and write `result.json` and the statistics of what is real beside them.

    Raises:
        InvalidRequest, NotFound, PreconditionFailed: prompts, real images or a network are not there (before any image is made), or
            `output` holds images of another bundle, prompts or seed.
    """
    hush()
    prompts = read_prompts(protocol.prompts, protocol.images)
    measures = Measures(protocol)
    generate = served(bundle, manifest, best_device())
    _begin(output, {"model": manifest.digest, "seed": protocol.seed})
    files = _make(protocol, prompts, generate, output / "images", watch)
    scores = measures.of(files, prompts, output, watch)
    latency, counted = latencies_ms({"": generate}, prompts[0])[""], gflops({"": generate}, prompts[0])[""]
    row = Row(None, protocol.name, manifest.name, None, None, None, latency, len(files), gflop=counted, scores=scores)
    facts = {"protocol": protocol.model_dump(mode="json"), "model": manifest.digest, "row": asdict(row)}
    (output / RESULT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf8")
    return row


def read_prompts(section: CaptionsSection, count: int) -> list[str]:
    """The first `count` prompts of a file. Raises NotFound, InvalidRequest; both name the file."""
    path = Path(section.path)
    if not path.is_file():
        raise NotFound(f"protocol.prompts.path: there is no file {str(path)!r}")
    try:
        found = _READERS[section.format](path.read_text(encoding="utf8"), section.column)
    except (ValueError, KeyError, TypeError) as error:
        allowed = f"a file of format {section.format!r} ({type(error).__name__}: {error})"
        raise InvalidRequest("protocol.prompts.path", str(path), allowed) from error
    if len(found) < count:
        raise InvalidRequest("protocol.images", count, f"at most {len(found)}: {path} has no more prompts")
    return found[:count]


def _lines(text: str, _: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _jsonl(text: str, column: str) -> list[str]:
    return [str(json.loads(line)[column]) for line in text.splitlines() if line.strip()]


def _coco(text: str, _: str) -> list[str]:
    """The caption with the lowest id of each image, in the order of the images' ids."""
    first: dict[int, str] = {}
    for entry in sorted(json.loads(text)["annotations"], key=lambda entry: (entry["image_id"], entry["id"])):
        first.setdefault(entry["image_id"], " ".join(entry["caption"].split()))
    return list(first.values())


_READERS: dict[str, Callable[[str, str], list[str]]] = {"text": _lines, "jsonl": _jsonl, "coco": _coco}


def _begin(output: Path, facts: dict[str, Any]) -> None:
    """Note what the images are of. Raises InvalidRequest when `output` holds others."""
    output.mkdir(parents=True, exist_ok=True)
    path, mine = output / BEGUN, json.dumps(facts, indent=1) + "\n"
    for name, value in (json.loads(path.read_text(encoding="utf8")) if path.exists() else {}).items():
        if facts.get(name) != value:
            raise InvalidRequest("output", str(output), f"a new folder: it holds images of another {name} ({value})")
    path.write_text(mine, encoding="utf8")


def _make(
    protocol: Protocol, prompts: list[str], generate: Callable[[list[str], list[int]], Images], folder: Path, watch: Watch
) -> list[Path]:
    """A file for each prompt; those that are there are kept. A file appears whole or not at all."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number:06}-{digest(prompt)[:8]}.png" for number, prompt in enumerate(prompts)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        watch("images", len(files) - len(missing) + start, len(files), {})
        images = generate([prompts[number] for number in batch], [protocol.seed + number for number in batch])
        for number, image in zip(batch, images, strict=True):
            part = files[number].with_suffix(".part")
            Image.fromarray(image).save(part, "PNG")
            part.replace(files[number])
    watch("images", len(files), len(files), {} if missing else {"reused": 1.0})
    return files


class Measures:
    """A protocol's metrics, its networks loaded and its reference found."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol, device = protocol, best_device()
        wants_clip = "clip_score" in protocol.metrics or protocol.features == "clip"
        self.clip = ClipFeatures(_named(protocol, "clip", CLIP_ALLOWED), device) if wants_clip else None
        self.real = _real_files(protocol)
        self.network: ImageFeatures | None = self._network(device) if protocol.reference else None
        self.statistics = self._statistics()

    def _network(self, device: str) -> ImageFeatures:
        """In whose eyes real and generated images are compared."""
        if self.protocol.features == "inception":
            return InceptionFeatures(Path(_named(self.protocol, "inception", INCEPTION_ALLOWED)), device)
        if self.protocol.features == "judge":
            return embedded_judge(_named(self.protocol, "judge", "the world of an embedded judge"))
        assert self.clip is not None
        return self.clip

    def _statistics(self) -> Gaussian | None:
        reference = self.protocol.reference
        return Gaussian.load(Path(reference.statistics)) if reference and reference.statistics else None

    def of(self, files: list[Path], prompts: list[str], output: Path, watch: Watch) -> dict[str, float]:
        """The scores of generated images; keys as in `Row.scores`."""
        found: dict[str, float] = {}
        if self.network:
            made_NF = self._features(self.network, files, "measuring", watch)
            found = self._against_statistics(made_NF) if self.statistics else self._against_images(made_NF, output, watch)
        if self.clip and "clip_score" in self.protocol.metrics:
            found["clip_score"] = self.clip.fit(self._features(self.clip, files, "CLIP", watch), prompts)
        return {name: round(value, 5) for name, value in found.items()}

    def _against_statistics(self, made_NF: np.ndarray) -> dict[str, float]:
        assert self.statistics is not None
        if self.statistics.mean_F.shape != made_NF.shape[1:]:
            allowed = f"statistics of {made_NF.shape[1]} features, as {self.protocol.features} has"
            raise InvalidRequest("protocol.reference.statistics", f"of {len(self.statistics.mean_F)} features", allowed)
        return {f"frechet_{self.protocol.features}": gaussian_distance(self.statistics, Gaussian.of(made_NF))}

    def _against_images(self, made_NF: np.ndarray, output: Path, watch: Watch) -> dict[str, float]:
        assert self.network is not None
        real_NF, name = self._features(self.network, self.real, "real images", watch), self.protocol.features
        real = Gaussian.of(real_NF)
        real.save(output / REFERENCE)
        found: dict[str, float] = {}
        if "fid" in self.protocol.metrics:
            found[f"frechet_{name}"] = gaussian_distance(real, Gaussian.of(made_NF))
        if "kid" in self.protocol.metrics:
            found[f"kid_{name}"] = kernel_distance(real_NF, made_NF)[0]
        if "precision_recall" in self.protocol.metrics:
            found[f"precision_{name}"], found[f"recall_{name}"] = precision_recall(real_NF, made_NF)
        return found

    def _features(self, network: ImageFeatures, files: list[Path], stage: str, watch: Watch) -> np.ndarray:
        parts = []
        for start in range(0, len(files), BATCH):
            watch(stage, start, len(files), {})
            parts.append(
                network.features(np.stack([square(file, self.protocol.size) for file in files[start : start + BATCH]]))
            )
        watch(stage, len(files), len(files), {})
        return np.concatenate(parts)


def square(file: Path, size: int) -> np.ndarray:
    """An image as uint8 (size, size, 3): the shorter side scaled to `size` (antialiased bicubic), the middle cut out."""
    with Image.open(file) as image:
        rgb = image.convert("RGB")
    if rgb.size != (size, size):
        scale = size / min(rgb.size)
        width, height = (max(size, round(side * scale)) for side in rgb.size)
        left, top = (width - size) // 2, (height - size) // 2
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(rgb)


def _named(protocol: Protocol, network: str, allowed: str) -> str:
    source = getattr(protocol.networks, network)
    if source is None:
        raise InvalidRequest(f"protocol.networks.{network}", None, allowed)
    return str(source)


def _real_files(protocol: Protocol) -> list[Path]:
    """Images of the reference folder, in the order of their names. Raises NotFound, InvalidRequest."""
    if protocol.reference is None or protocol.reference.images is None:
        return []
    folder = Path(protocol.reference.images)
    if not folder.is_dir():
        raise NotFound(f"protocol.reference.images: there is no folder {str(folder)!r}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) <= NEIGHBOURS:
        raise InvalidRequest("protocol.reference.images", str(folder), f"more than {NEIGHBOURS} images; it has {len(files)}")
    return files
