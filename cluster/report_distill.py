"""A report's figures of a distillation: losses, discriminator, regions, drift."""

from __future__ import annotations

import base64

from cluster import plots

STUDENT = {
    "error/final": "|y2 - teacher|²",
    "error/first": "|y1 - teacher|²",
    "distillation": "|student - teacher|² (velocity)",
}
DRIFT = {
    "drift/contrast_ratio": "contrast",
    "drift/sharpness_ratio": "sharpness",
    "drift/motion_ratio": "motion",
}


def svg(data: bytes) -> str:
    """A drawing as an address that a page can hold."""
    return "data:image/svg+xml;base64," + base64.b64encode(data).decode()


def distill_figures(train: plots.Rows, evaluations: plots.Rows) -> list[tuple[str, str]]:
    """Title and drawing of all that the run has numbers for."""
    figures: list[tuple[str, str]] = []

    def add(title: str, rows: plots.Rows, names: dict[str, str], label: str) -> None:
        present = {k: name for k, name in names.items() if any(k in row for row in rows)}
        if present:
            figures.append((title, svg(plots.curves(rows, present, label))))

    add("Student and teacher", train, STUDENT, "mean square")
    for judged, name in (("final", "sample"), ("first", "step 1")):
        prefix = f"discriminator/{judged}"
        accuracy = {f"{prefix}/accuracy/real": "real", f"{prefix}/accuracy/fake": "fake"}
        add(f"Discriminator accuracy, {name}", train, accuracy, "share")
        add(f"Discriminator logit gap, {name}", train, {f"{prefix}/logit_gap": "gap"}, "gap")
    regions = {key.split("/")[1]: key for row in train for key in row if key.startswith("region/")}
    discrepancy = {f"region/{name}/discrepancy": name for name in regions}
    add("Discrepancy by region", train, discrepancy, "relative loss")
    add("Draws by region", train, {f"region/{name}/q": name for name in regions}, "probability")
    parts = {"regions/seen": "seen", "regions/unseen": "never seen"}
    add("Seen and unseen regions", train, parts, "relative loss")
    add("Student's media over the teacher's", evaluations, DRIFT, "ratio")
    recursion = {k: k.split("/")[-1] for row in evaluations for k in row if "variance_ratio" in k}
    add("Own samples: variance against the start", evaluations, recursion, "ratio")
    return figures
