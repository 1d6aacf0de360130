"""A picture of a training: the loss, DPO's margin and nDCG@10 by step."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qe_edge.console import note
from qe_edge.train.dev import NDCG

PICTURE = "training.png"
# What is drawn of a log, each in a panel of its own: key -> title. Their scales differ.
PANELS = {
    "loss": "loss",
    "rewards/margins": "margin of chosen over rejected",
    NDCG: "nDCG@10 on the dev queries",
}


def draw(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `training.png` into the folder; without the drawing library, say which extra brings it."""
    if find_spec("altair") is None or find_spec("vl_convert") is None:
        note(f"no {PICTURE} was drawn: pip install 'qe-edge[report]' brings what draws it")
        return
    import altair as alt

    panels = []
    for key, title in PANELS.items():
        points = [{"step": entry["step"], "value": entry[key]} for entry in history if key in entry]
        if points:
            base = alt.Chart(alt.Data(values=points), width=560, height=150)
            x = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, grid=False))
            y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
            line = base.mark_line(color="#2563a8", point=len(points) <= 60).encode(x, y)
            panels.append(line.properties(title=alt.Title(title, anchor="start", fontSize=13)))
    if panels:
        alt.vconcat(*panels, spacing=18).configure_view(stroke=None).save(str(folder / PICTURE), ppi=144)
