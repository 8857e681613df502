"""Pages of HTML that hold their tables and pictures: the demo's, and a study's."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from contrastseg_fast.experiments.files import replace_text
from contrastseg_fast.experiments.tables import ONE_PATIENT, study_tables, tables

PICTURES = {
    "learning_curves.png": "Learning curves. The held-out Dice is watched, and decides nothing.",
    "slices.png": (
        "Held-out slices: ground truth, predictions, and the uncertainty u (Eq. 9) in the first UAFS module."
    ),
    "tsne.png": (
        "t-SNE of hidden vectors of the held-out slices at stride 4, coloured by the most frequent class "
        "of their patches."
    ),
    "affinity.png": (
        "Affinity w (Eq. 3, with the class distance 'tv') of the vectors of one held-out slice at stride 4, "
        "sorted by class and ratio, and the cosines of the same vectors."
    ),
    "time_and_memory.png": "Loss and gradient of one image over N. The reference holds N x N matrices.",
}
STUDY_PICTURES = {
    "slices.png": (
        "Patches of test cases: ground truth, predictions, and the uncertainty u (Eq. 9) in the first UAFS "
        "module, as in the paper's Fig. 6."
    ),
    "tsne.png": (
        "t-SNE of hidden vectors of test cases, coloured by the most frequent class of their patches, as in "
        "the paper's Fig. 7."
    ),
    "affinity.png": (
        "Affinity w (Eq. 3, with the class distance 'tv') of the vectors of one test case, sorted by class "
        "and ratio, and the cosines of the same vectors."
    ),
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.3rem 0 0.3rem 1.6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; border-bottom-color: #888; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
p, figcaption { max-width: 48rem; }
figcaption, .small { color: #555; font-size: 0.9rem; }
figure { margin: 1.8rem 0; }
img { max-width: 100%; height: auto; }
.notice { border-left: 4px solid #ee7733; padding-left: 0.9rem; }
code { font-size: 0.9em; background: #f3f3f3; padding: 0.1em 0.3em; }
"""


def write(results: dict[str, Any], out: Path) -> None:
    """Write `results.json`, and `index.html` with its tables and the pictures that lie in `out`."""
    replace_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    replace_text(out / "index.html", _page(results, out))


def _page(results: dict[str, Any], out: Path) -> str:
    settings = results["settings"]
    table = {name: table.html() for name, table in tables(results).items()}
    picture = {name: _figure(out / name, text) for name, text in PICTURES.items() if (out / name).exists()}
    time_and_memory = picture.pop("time_and_memory.png", "")
    facts = ", ".join(f"{name}: {value}" for name, value in results["machine"].items())
    return _document(
        "demo",
        f"""<p>A U-Net segments the axial slices of a CT scan into {len(settings["class_names"])} classes: as
it is, with the contrastive loss PDCR, with the gate UAFS in its encoder, and with both. It learns from
{settings["train_slices"]} slices and is scored on slices {settings["first_test_slice"]} to
{settings["last_test_slice"]}, with {settings["gap"]} unused slices between the two on either side.</p>
<p class="notice">{ONE_PATIENT}</p>
{"" if results["finished"] else '<p class="notice">Not finished: this page shows what was done.</p>'}
{table.get("scores", "")}{table.get("classes", "")}{"".join(picture.values())}
{table.get("steps", "")}{table.get("comparison", "")}{time_and_memory}
<h2>How this was made</h2>
<p class="small"><code>{escape(settings["command"])}</code></p>
<p class="small">{escape(facts)}. {results["seconds"]:.0f} seconds in all. All numbers:
<a href="results.json">results.json</a>.</p>""",
    )


def write_study(record: dict[str, Any], out: Path) -> None:
    """Write `index.html` of a study: its tables, and the pictures that lie in `out`."""
    shown = "".join(table.html() for table in study_tables(record))
    pictures = [_figure(out / name, text) for name, text in STUDY_PICTURES.items() if (out / name).exists()]
    unfinished = "" if record["finished"] else '<p class="notice">Not finished: this shows what was done.</p>'
    facts = ", ".join(f"{name}: {value}" for name, value in record["machine"].items())
    commit = f" Commit {escape(record['commit'])}." if record["commit"] else ""
    body = f"""{unfinished}{shown}{"".join(pictures)}
<h2>How this was made</h2>
<p class="small"><code>{escape(record["command"])}</code></p>
<p class="small">{escape(facts)}.{commit} All numbers, of every seed: results.json.</p>"""
    replace_text(out / "index.html", _document(record["study"], body))


def _document(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>contrastseg_fast: {escape(title)}</title><style>{STYLE}</style></head><body>
<h1>contrastseg_fast: {escape(title)}</h1>
{body}
</body></html>
"""


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
