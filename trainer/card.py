"""A bundle's card: what it is, how it scored, where it ends. Written after evaluation, then the bundle is sealed with its metrics."""

from __future__ import annotations

import json
from pathlib import Path

from sdxs import bundle
from sdxs.bundle import Manifest
from trainer.evaluate import HEADINGS, Row
from trainer.recipe import DistillRecipe

EVALUATION = "evaluation.json"

CARD = """# {name}

A one-step text-to-image bundle of the `{world}` world, {size:.1f} MB in float16, distilled from `{teacher}` by the recipe in `recipe.json`;
the loss curves of every stage are in `training.txt`. It also loads in diffusers' StableDiffusionPipeline (one step, guidance 0).

{table}

- **Rows**: `vae` is real images through the teacher's autoencoder, the ceiling; `teacher` takes {steps} steps with guidance; `kd` is the
  shrunk student sampled like the teacher; `naive` the same student in one step; `warmup` after feature matching; `final` is this bundle.
- **top-1, top-5**: how often the nearest real image, in the judge's features, is the one that was asked for. **Frechet**: distance of the
  judge's features to those of real images. The judge gets {accuracy:.1%} of real renders right.
- **Latency**: one image, batch 1, one CPU thread, text embedding cached; compare the ratios, not the machines.
- **Limits**: it knows the words of its captions; other words mean nothing to it. Small details are soft.
- **Licence**: Apache-2.0, as what the teacher learnt from.
"""


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def metrics(rows: list[Row]) -> dict[str, float]:
    """The final row's scores for the manifest, by split."""
    found: dict[str, float] = {}
    for row in rows:
        if row.row == "final":
            found |= {f"{row.split}_top1": row.top1, f"{row.split}_frechet": row.frechet}
            if row.top5 is not None:
                found[f"{row.split}_top5"] = row.top5
    return found


def read_rows(folder: Path) -> list[Row]:
    """The evaluation that a bundle carries; none when it was never evaluated."""
    path = folder / EVALUATION
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf8"))] if path.is_file() else []


def add_card(folder: Path, recipe: DistillRecipe, rows: list[Row], judge_accuracy: float) -> Manifest:
    """Write README.md and evaluation.json into the bundle and seal it again, now with its metrics."""
    sealed = bundle.read(folder)
    size = sum(entry.size for name, entry in sealed.files.items() if name.endswith(".safetensors")) / 1e6
    steps = recipe.evaluation.teacher_steps
    text = CARD.format(
        name=recipe.name, world=recipe.world, size=size, teacher=recipe.teacher, table=table(rows), steps=steps,
        accuracy=judge_accuracy,
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf8")
    lines = ",\n ".join(json.dumps(row.as_dict()) for row in rows)
    (folder / EVALUATION).write_text(f"[{lines}]\n", encoding="utf8")
    return bundle.seal(folder, sealed.name, recipe_hash=sealed.recipe_hash, lineage=sealed.lineage, metrics=metrics(rows))
