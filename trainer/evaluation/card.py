"""A bundle's card: what it is, how it scored, where it ends. Written after evaluation, then the bundle is sealed with its metrics."""

from __future__ import annotations

import json
from pathlib import Path

from sdxs import bundle
from sdxs.bundle import Manifest
from trainer.evaluation.rows import Row, markdown
from trainer.recipe import DistillRecipe, StyleRecipe

EVALUATION = "evaluation.json"

CARD = """# {name}

A one-step text-to-image bundle {of}, {size:.1f} MB in float16, distilled from `{teacher}` by the recipe in `recipe.json`;
the loss curves of every stage are in `training.txt`. It also loads in diffusers' StableDiffusionPipeline (one step, guidance 0).

{table}

- **Rows**: {rows}
- {judged}
- **diversity**: mean of 1 - cosine between images of one prompt, in that network's features. **GFLOP**: 10^9 FLOPs of one image, 2 per
  multiply-add. **Latency**: one image, batch 1, {device}, text embedding cached; compare the ratios, not the machines.
{limits}
"""
WORLD_ROWS = """`vae` is real images through the teacher's autoencoder, the ceiling; `teacher` takes {steps} steps with guidance; `kd` is
  the shrunk student sampled like the teacher; `naive` the same student in one step; `warmup` after feature matching; `sdi` before the GAN
  finish, where there was one; `final` is this bundle."""
OWN_ROWS = (
    "`teacher` takes {steps} steps with guidance, from other noise than what it is measured against; `final` is this bundle."
)
JUDGED = """**top-1, top-5**: how often the nearest real image, in the judge's features, is the one that was asked for. **Frechet**,
  **KID**, **precision**, **recall**: its features against those of real images. The judge gets {accuracy:.1%} of real renders right."""
UNJUDGED = "**No judge**: nothing says here whether an image shows what was asked for."
LIMITS = """- **Limits**: it knows the words of its captions; other words mean nothing to it. Small details are soft.
- **Licence**: Apache-2.0, as what the teacher learnt from."""
OWN_LIMITS = "- **Licence**: the teacher's, and that of whatever else it was distilled with."


def metrics(rows: list[Row]) -> dict[str, float]:
    """The final row's scores for the manifest, by split."""
    found: dict[str, float | None] = {}
    for row in rows:
        if row.row == "final":
            named = {"top1": row.top1, "frechet": row.frechet, "top5": row.top5, **row.scores}
            found |= {f"{row.split}_{name}": value for name, value in named.items()}
    return {name: value for name, value in found.items() if value is not None}


def read_rows(folder: Path) -> list[Row]:
    """The evaluation that a bundle carries; none when it was never evaluated."""
    path = folder / EVALUATION
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf8"))] if path.is_file() else []


def add_card(
    folder: Path,
    recipe: DistillRecipe | StyleRecipe,
    rows: list[Row],
    judge_accuracy: float | None,
    notes: list[str] | None = None,
) -> Manifest:
    """Write README.md and evaluation.json into the bundle and seal it again, now with its metrics; `notes` say what was not measured."""
    sealed = bundle.read(folder)
    size = sum(entry.size for name, entry in sealed.files.items() if name.endswith(".safetensors")) / 1e6
    text = CARD.format(
        name=recipe.name, size=size, teacher=recipe.teacher, table=markdown(rows), **_words(recipe, judge_accuracy)
    )
    text += "".join(f"- **Note**: {note}.\n" for note in notes or [])
    (folder / "README.md").write_text(text, encoding="utf8")
    lines = ",\n ".join(json.dumps(row.as_dict()) for row in rows)
    (folder / EVALUATION).write_text(f"[{lines}]\n", encoding="utf8")
    return bundle.seal(folder, sealed.name, recipe_hash=sealed.recipe_hash, lineage=sealed.lineage, metrics=metrics(rows))


def _words(recipe: DistillRecipe | StyleRecipe, judge_accuracy: float | None) -> dict[str, str]:
    """What differs between a world, whose judge scored, and prompts of one's own."""
    steps = recipe.evaluation.teacher_steps
    of = f"of the `{recipe.world}` world" if recipe.data is None else f"for the prompts of `{recipe.data.prompts}`"
    if judge_accuracy is None:
        own = {"rows": OWN_ROWS.format(steps=steps), "judged": UNJUDGED, "limits": OWN_LIMITS}
        return {"of": of, "device": "on the machine that trained it", **own}
    judged = JUDGED.format(accuracy=judge_accuracy)
    return {"of": of, "device": "one CPU thread", "rows": WORLD_ROWS.format(steps=steps), "judged": judged, "limits": LIMITS}
