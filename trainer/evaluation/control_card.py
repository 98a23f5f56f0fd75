"""The card of a ControlNet in a bundle, beside its weights: what it is, how it scored, where it ends."""

from __future__ import annotations

import json
from pathlib import Path

from sdxs import bundle
from sdxs.bundle import Manifest
from trainer.evaluation.card import EVALUATION
from trainer.evaluation.control import BENT, STUDENT, shares
from trainer.evaluation.rows import Row, markdown
from trainer.recipe import ControlRecipe

CARD = """# {name}

A ControlNet for this bundle's one-step U-Net, {size:.1f} MB in float16, for control images of the kinds {kinds}. It was distilled from
`{controlnet}`, the ControlNet of `{teacher}`, by the recipe in `recipe.json`; the loss curves of every stage are in `training.txt`.

{table}

{shares}
- **Rows**: `teacher` and `teacher+control` take {steps} steps with guidance; `final` is the bundle without a control image;
  `warmup+control` the ControlNet before its last stage, where there was one; `final+control` what is here. All begin with the same noise.
- **Control images** are extracted from {source}; `sketch` is a sketch in a shaky hand, the same for all rows.
{bent}- **edge F1**: Canny's edges of the image against the lines of the control image, which may be one pixel off at 64 pixels, more in
  larger images. A sketch leaves parts out, so that no image has all its edges in it. **colour error**: of 8 x 8 blocks, in levels of 255.
- {judged}
- **ms per image**: batch 1, {device}, text embedding cached, the control image given; **with map**: extracted from a photo too.
  **times faster**: than the teacher with its ControlNet.
"""
JUDGED = """**top-1, top-5**: how often the nearest real image, in the judge's features, is the one that was asked for. **Frechet**: its
  features against those of real images. The judge gets {accuracy:.1%} of real renders right."""
BENT_SPLIT = """- **-bent**: control images of the same images turned, stretched, mirrored, shifted and bent, so that only they say how.
  `bent images` are those images themselves; without a control image nobody can draw them.
"""
UNJUDGED = "**No judge**: nothing says here whether an image shows what was asked for."


def control_metrics(name: str, rows: list[Row]) -> dict[str, float]:
    """The scores of one step with the ControlNet, for the manifest: `controlnet/<name>/<split>_<condition>_<metric>`."""
    found: dict[str, float | None] = {}
    for row in rows:
        if row.row == STUDENT:
            named = {"top1": row.top1, "top5": row.top5, "frechet": row.frechet, **row.scores}
            named = {metric: value for metric, value in named.items() if metric not in ("ms_with_map", "times_faster")}
            found |= {f"controlnet/{name}/{row.split}_{row.condition}_{metric}": value for metric, value in named.items()}
    return {key: value for key, value in found.items() if value is not None}


def add_control_card(
    folder: Path, name: str, recipe: ControlRecipe, rows: list[Row], judge_accuracy: float | None, notes: list[str]
) -> Manifest:
    """Write README.md and evaluation.json beside the weights of the ControlNet `name` of a bundle and seal the bundle again, now with its
    metrics too; `notes` say what was not measured."""
    sealed, own = bundle.read(folder), folder / "controlnet" / name
    text = _text(recipe, own, rows, judge_accuracy) + "".join(f"- **Note**: {note}.\n" for note in notes)
    (own / "README.md").write_text(text, encoding="utf8")
    lines = ",\n ".join(json.dumps(row.as_dict()) for row in rows)
    (own / EVALUATION).write_text(f"[{lines}]\n", encoding="utf8")
    before = {key: value for key, value in sealed.metrics.items() if not key.startswith(f"controlnet/{name}/")}
    metrics = before | control_metrics(name, rows)
    return bundle.seal(folder, sealed.name, recipe_hash=sealed.recipe_hash, lineage=sealed.lineage, metrics=metrics)


def _text(recipe: ControlRecipe, own: Path, rows: list[Row], judge_accuracy: float | None) -> str:
    judged = judge_accuracy is not None
    return CARD.format(
        name=recipe.control_name,
        size=sum(path.stat().st_size for path in own.glob("*.safetensors")) / 1e6,
        kinds=", ".join(recipe.conditions),
        controlnet=recipe.controlnet,
        teacher=recipe.teacher,
        table=markdown(rows),
        shares="\n".join(f"- {line}." for line in shares(rows)),
        steps=recipe.evaluation.teacher_steps,
        source="the captions' real images" if judged else "the teacher's samples of the prompts from other noise",
        bent=BENT_SPLIT if any(row.row == BENT for row in rows) else "",
        judged=JUDGED.format(accuracy=judge_accuracy) if judged else UNJUDGED,
        device="one CPU thread" if judged else "on the machine that trained it",
    )
