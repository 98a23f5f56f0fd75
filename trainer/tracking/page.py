"""The pictures and the page of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2

PANELS = ("loss", "gradient_norm", "images_per_second", "teacher_wait")
"""Drawn first, and in this order; a stage's other metrics follow."""
PAGE = """<!doctype html><meta charset="utf-8"><title>{{ recipe.name }}</title>
<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}
td,th{padding:.1em .8em;text-align:right}
pre{background:#f4f4f4;padding:1em;overflow:auto}figure{margin:1em 0}</style>
<h1>{{ recipe.name }}</h1>
<p><a href="recipe.json">recipe</a>, <a href="versions.json">versions</a>; event files: <code>tensorboard --logdir tensorboard</code></p>
{% for stage in stages %}<h2>{{ stage.name }}</h2>
<table><tr>{% for name in stage.last %}<th>{{ name }}{% endfor %}<tr>{% for value in stage.last.values() %}<td>{{ "%.4g" | format(value) }}
{% endfor %}</table>
<figure><img src="curves/{{ stage.name }}.png" alt="curves of {{ stage.name }}"></figure>
<p><a href="curves/{{ stage.name }}.jsonl">numbers</a></p>
{% for sample in stage.samples %}<figure><img src="samples/{{ sample.file }}" alt="samples of {{ stage.name }}">
<figcaption>after {{ sample.step }} steps</figcaption></figure>{% endfor %}{% endfor %}
<h2>versions</h2><pre>{{ versions }}</pre>
"""


def draw_curve(stage: str, rows: list[dict[str, float]], path: Path) -> None:
    """Every metric of a stage over its steps, a panel each."""
    from matplotlib.figure import Figure

    found = {name for row in rows for name in row} - {"step"}
    names = [*(name for name in PANELS if name in found), *sorted(found - set(PANELS))]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * lines), layout="constrained")
    for number, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, number + 1)
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.suptitle(stage, fontsize=10)
    figure.savefig(path, dpi=100)


def write_page(folder: Path, curves: dict[str, list[dict[str, float]]]) -> None:
    """`index.html`, whose links are relative."""
    stages = [{"name": stage, "last": rows[-1], "samples": _samples(folder, stage)} for stage, rows in curves.items() if rows]
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf8"))
    text = (folder / "versions.json").read_text(encoding="utf8")
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(recipe=recipe, versions=text, stages=stages)
    (folder / "index.html").write_text(page, encoding="utf8")


def _samples(folder: Path, stage: str) -> list[dict[str, object]]:
    files = sorted((folder / "samples").glob(f"{stage}-*.png"))
    return [{"file": path.name, "step": int(path.stem.rpartition("-")[2])} for path in files]
