"""What people look at after a run: a contact sheet, one self-contained HTML page and `report.json`."""

from __future__ import annotations

import base64
import io
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from trainer.evaluation.judge import Judge
from trainer.evaluation.rows import Row, table

ZOOM, GAP, LABEL = 2, 8, 200
TITLES = {
    "teacher": "teacher\n25 steps, guidance", "kd": "shrunk student\n25 steps", "naive": "one step,\nuntrained for it",
    "warmup": "after warm-up", "sdi": "before the\nGAN finish", "final": "final, one step\n(served)",
    "teacher+control": "teacher + ControlNet\n25 steps, guidance", "final+control": "one step\n+ ControlNet",
}  # fmt: skip
PACKAGES = ("torch", "diffusers", "transformers", "ray", "grpcio")


def contact_sheet(columns: dict[str, np.ndarray], prompts: list[str]) -> Image.Image:
    """One row a prompt, one column a way of making it; images are uint8 (N, H, W, 3)."""
    size = next(iter(columns.values())).shape[1] * ZOOM
    width, head = LABEL + len(columns) * (size + GAP), 40
    sheet = Image.new("RGB", (width, head + len(prompts) * (size + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for x, name in enumerate(columns):
        pen.multiline_text((LABEL + x * (size + GAP), 4), TITLES.get(name, name), fill="black", font=font)
    for y, prompt in enumerate(prompts):
        top = head + y * (size + GAP)
        pen.multiline_text((8, top + size // 2 - 16), _wrap(prompt, 26), fill="black", font=font)
        for x, images in enumerate(columns.values()):
            picture = Image.fromarray(images[y]).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(picture, (LABEL + x * (size + GAP), top))
    return sheet


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word + " "
    return "\n".join(lines)


def judged(judge: Judge | None) -> str:
    """Who scored, and how far to trust it."""
    if judge is None:
        return "no judge knows these prompts"
    return f"scored by a classifier that gets {judge.accuracy:.1%} of real {judge.world.name} renders right"


@dataclass(frozen=True)
class WideTable:
    """Rows for a terminal of any width: as many tables as it takes, each beginning with what the line is, and nothing cut off."""

    rows: list[Row]
    caption: str

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        headings, lines = table(self.rows)
        leading = headings.index("row") + 1
        widths = [max(map(cell_len, column)) + 3 for column in zip(headings, *lines, strict=True)]
        parts = _parts(widths, options.max_width - 1, leading)
        for part in parts:
            shown = Table(caption=self.caption if part is parts[-1] else None)
            for index in (*range(leading), *part):
                shown.add_column(headings[index], no_wrap=True)
            for line in lines:
                shown.add_row(*line[:leading], *(line[index] for index in part))
            yield shown


def _parts(widths: list[int], room: int, leading: int) -> list[list[int]]:
    """The columns after the leading ones in order, as many together as there is room for beside those, one at least."""
    room -= sum(widths[:leading])
    parts: list[list[int]] = [[]]
    for index, width in enumerate(widths[leading:], leading):
        if parts[-1] and sum(widths[i] for i in parts[-1]) + width > room:
            parts.append([])
        parts[-1].append(index)
    return parts


def console_table(rows: list[Row], judge: Judge | None) -> WideTable:
    """The rows for a terminal, with who judged them."""
    note = "; * recorded in the bundle when it was made" if any(row.recorded for row in rows) else ""
    return WideTable(rows, judged(judge) + note)


def curves_svg(logs: dict[str, Path]) -> str:
    """Loss curves of the stages side by side, as inline SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(logs), figsize=(3.2 * len(logs), 2.4), squeeze=False)
    for axis, (stage, path) in zip(axes[0], logs.items(), strict=True):
        points = [json.loads(line) for line in path.read_text().splitlines()]
        axis.plot([p["step"] for p in points], [p["loss"] for p in points])
        axis.set_title(stage)
        axis.set_xlabel("step")
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def machine() -> dict[str, Any]:
    """The machine and the versions a number was measured on."""
    import os

    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


PAGE = Template(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>sdxs: {{ name }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
img,svg{max-width:100%}</style>
<h1>{{ name }}</h1><p>{{ summary }}</p>
{% for split, (headings, lines) in splits.items() %}<h2>{{ titles[split] }}</h2>
<table><tr>{% for heading in headings[1:] %}<th>{{ heading }}{% endfor %}</tr>
{% for line in lines %}<tr>{% for cell in line[1:] %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
<p>{{ judged }}</p>
<h2>Side by side</h2><img alt="contact sheet" src="data:image/png;base64,{{ sheet }}">
<h2>Loss curves</h2>{{ curves }}
<h2>Where the time went</h2><table>{% for stage, s in seconds.items() %}
<tr><td>{{ stage }}<td>{{ "%.0f s"|format(s) if s else "reused" }}</tr>{% endfor %}</table>
<h2>Machine</h2><p>{{ machine }}</p></html>""",
    autoescape=False,
)


def write_report(  # noqa: PLR0913
    folder: Path,
    name: str,
    rows: list[Row],
    judge: Judge | None,
    seconds: dict[str, float],
    sheet: Image.Image,
    logs: dict[str, Path],
    summary: str,
) -> None:
    """`contact_sheet.png`, `report.html` and `report.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "contact_sheet.png")
    facts = machine()
    data = {
        "name": name,
        "machine": facts,
        "judge": judge and {"world": judge.world.name, "accuracy_on_real_renders": judge.accuracy},
        "stage_seconds": seconds,
        "rows": [row.as_dict() for row in rows],
    }
    (folder / "report.json").write_text(json.dumps(data, indent=1))
    splits = {split: table([row for row in rows if row.split == split]) for split in ("train", "heldout")}
    titles = {"train": "Captions seen in training", "heldout": "Held-out captions (new compositions)"}
    page = PAGE.render(
        name=name, summary=summary, splits=splits, titles=titles, judged=judged(judge),
        curves=curves_svg(logs), seconds=seconds,
        sheet=base64.b64encode((folder / "contact_sheet.png").read_bytes()).decode(),
        machine=", ".join(f"{k} {v}" for k, v in facts.items()),
    )  # fmt: skip
    (folder / "report.html").write_text(page, encoding="utf8")
