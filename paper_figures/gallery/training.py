"""Lines of the results table: training with approximate gradients, and factors for real heads."""

from __future__ import annotations

import numpy as np

from lora_limits.diagnose import report
from paper_figures import (
    batch_and_rank,
    crossing,
    factors,
    finetune,
    outlier_free,
    pilot,
    sensitivity,
)
from paper_figures.gallery.saying import Line, Rows, listed, plain, points, span, spread, times

LONGEST = 4096


def _accuracy(found: finetune.Runs, method: str) -> tuple[float, float]:
    """Points of accuracy over exact training's, seed by seed: mean and 95 % half-width."""
    return batch_and_rank.interval(finetune.over_exact(found, method))


def _verdict(rows: Rows, found: finetune.Runs, method: str) -> str:
    """Beside the margin that was set beforehand."""
    told = finetune.verdict(rows, finetune.over_exact(found, method))
    return f"{told} {plain(finetune.margin(rows))} points"


def long_steps(rows: Rows) -> list[Line]:
    """A step at the longest sequences, and where the training ends."""
    found = finetune.runs(rows, "long", "digits")
    timed = finetune.steps(rows, "long", "digits")
    lines = []
    for method in (name for name in found if name != "exact"):
        memory = timed[method]["temporary"] / timed["exact"]["temporary"]
        told = f"{times(timed['exact'], timed[method])} as fast, {plain(memory)} times the memory; "
        told += f"accuracy {spread(*_accuracy(found, method))} points over exact training's, "
        told += f"{_verdict(rows, found, method)} ({len(found[method])} seeds)"
        lines.append((f"a training step at L = {LONGEST}, heads of width 4: {method}", told))
    return lines


def short_runs(rows: Rows) -> list[Line]:
    """Degree 4 at 64 tokens: accuracy by task, cosine of the gradient, time of a step."""
    told, cosines, slower, count = [], [], [], 0
    for task in finetune.TASKS:
        found = finetune.runs(rows, "short", task)
        told.append(
            f"{task} {spread(*_accuracy(found, 'polynomial 4'))} "
            f"({_verdict(rows, found, 'polynomial 4')})"
        )
        cosines += [min(run["cosine"]) for run in found["polynomial 4"].values()]
        count = len(found["polynomial 4"])
        timed = finetune.steps(rows, "short", task)
        slower.append(timed["polynomial 4"]["seconds"] / timed["exact"]["seconds"])
    return [
        (f"accuracy over exact training's, degree 4, L = 64, points ({count} seeds)", listed(told)),
        ("lowest cosine of the gradient along those runs", plain(min(cosines), 3)),
        ("a step of exact training there is faster by", f"{span(slower)} times"),
    ]


def noise(rows: Rows) -> list[Line]:
    """The rule of thumb: error against the noise of the batch, and within each kind of norms."""
    lines = []
    for below, label in ((True, "below"), (False, "above")):
        told = []
        for norms in (None, *batch_and_rank.NORMS):
            loss = batch_and_rank.rule(rows, "loss", 0, below=below, norms=norms)
            if loss is not None:
                told.append(f"{spread(*loss[:2])} {norms or 'all'} ({loss[2]} kinds of run)")
        if told:
            what = f"gradient error {label} the noise of the batch: loss over exact training's"
            lines.append((what, listed(told)))
    told = []
    for norms in batch_and_rank.NORMS:
        line = batch_and_rank.regression(rows, norms)
        if line is not None:
            told.append(f"{spread(*line[:2])} {norms}")
    if told:
        lines.append(("loss over exact training's for ten times the error / noise", listed(told)))
    return lines + _followed(rows)


def _followed(rows: Rows) -> list[Line]:
    """Whether a bias below the noise adds up, along runs several times as long."""
    lines = []
    every = batch_and_rank.followed(rows)
    for norms in dict.fromkeys(norms for norms, _ in every):
        found = {method: own for (kind, method), own in every.items() if kind == norms}
        told, steps, seeds = [], 0, 0
        for method, own in found.items():
            steps, seeds = own["steps"][-1], len(own["served"])
            bias = [plain(np.median(own["bias"][:, n])) for n in (0, -1)]
            lost = spread(*batch_and_rank.interval(own["served"][:, -1]))
            told.append(
                f"{lost} degree {method.split()[1]} (bias / noise {bias[0]}, then {bias[1]})"
            )
        what = f"{norms} norms, {steps} steps ({seeds} seeds): loss over exact training's, "
        lines.append((what + "under exact attention", listed(told)))
    return lines


def tasks(rows: Rows) -> list[Line]:
    """Which tasks mind."""
    told = []
    for task in sensitivity.ranked(rows):
        gain = plain(sensitivity.gain(rows, task))
        told.append(f"{task} {spread(*sensitivity.lost(rows, task))} of {gain}")
    methods = [name.split()[1] for name in sensitivity.common(rows)]
    seeds = len(sensitivity.runs_of(rows, sensitivity.tasks_of(rows)[0], "exact"))
    what = f"points of fine-tuning's gain that are lost, mean over degrees {listed(methods)}"
    return [(f"{what} ({seeds} seeds)", listed(told))]


def passing(rows: Rows) -> list[Line]:
    """When R passes ln L, by learning rate, and what holds it."""
    told, held = [], []
    found = [(p, own) for p, own in crossing.runs(rows) if (p["rank"], p["alpha"]) == (4, 8.0)]
    for p, own in sorted(found, key=lambda run: run[0]["rate"]):
        if p["case"] == "plain":
            told.append(f"{crossing.crossed(own, 'score')} at rate {p['rate']:g}")
    for case in ("plain", "weight decay", "query-key norm", "as pretrained"):
        (own,) = (own for p, own in found if (p["case"], p["rate"]) == (case, 0.01))
        highest = [max(max(layer["score"]) for layer in metrics["layers"]) for metrics in own]
        reached = batch_and_rank.interval(metrics["after"]["accuracy"] for metrics in own)
        held.append(f"{span(highest)} {case} (accuracy {spread(*reached)})")
    seeds = len({row["point"]["seed"] for row in rows})
    shrunk = rows[0]["fields"]["shrink"] if "fields" in rows[0] else None
    what = "training carries R past ln L" + (
        f", W_Q and W_K shrunk by {shrunk:g}" if shrunk else ""
    )
    return [
        (f"{what} ({seeds} seeds)", listed(told)),
        (f"highest R / ln L along training at rate 0.01 ({seeds} seeds)", listed(held)),
    ]


def outliers(rows: Rows) -> list[Line]:
    """Table 1 against the time of exact steps here."""
    steps = outlier_free.part(rows, "step")
    saved = [f"{outlier_free.step_saving(p, 'softmax_1'):+.0f} % {p['model']}" for p in steps]
    doubt = [outlier_free.uncertainty(p, "softmax_1") for p in steps]
    more = [100 * (p["operations"]["softmax_1"] / p["operations"]["softmax"] - 1) for p in steps]
    what = "Table 1 (epochs 5, 12 and 25 % shorter with softmax_1): an exact step here saves"
    told = f"{listed(saved)}, give or take {span(doubt, 1)}; {span(more, 1)} % more operations"
    return [(what, told)]


def sparse(rows: Rows) -> list[Line]:
    """Sparse plus low rank on real heads, by length, at the largest width."""
    return _on_real_heads(rows, "sparse", "SparseLowRank")


def tree(rows: Rows) -> list[Line]:
    """The block tree on real heads, by length, at the largest width."""
    return _on_real_heads(rows, "tree", "BlockTree")


def decoder(rows: Rows) -> list[Line]:
    """Every method on the decoder's heads, by length, at the largest width."""
    lines = []
    for length in sorted({p["length"] for p in points(rows, kind="decoder")}):
        found = points(rows, kind="decoder", length=length)
        errors: dict[str, list[float]] = {}
        for p in found:
            errors.setdefault(p["method"], []).append(factors.drawn(p["widths"][-1]["error"]))
        medians = {m: float(np.median(each)) for m, each in errors.items()}
        near = sorted((x, m) for m, x in medians.items() if x < factors.USELESS)
        told = [f"{factors.LABELS[m]} {plain(x)}" for x, m in near]
        if len(near) < len(medians):
            told.append(
                f"{len(medians) - len(near)} more above {factors.USELESS:g} or not a number"
            )
        heads, width = len(next(iter(errors.values()))), found[0]["widths"][-1]["width"]
        what = f"width {width} on {heads} heads of a decoder, L = {length}: median error"
        lines.append((what, listed(told)))
    return lines


def _on_real_heads(rows: Rows, method: str, name_of_class: str) -> list[Line]:
    lines = []
    for length in sorted({p["length"] for p in points(rows, kind="error", method=method)}):
        found = points(rows, kind="error", method=method, length=length)
        widest = [p["widths"][-1] for p in found]
        told = []
        for name in ("query", "key", "value"):
            errors = [max(w["errors"][f"{name}.{half}"] for half in "ab") for w in widest]
            told.append(f"{plain(np.median(errors))} ({plain(np.quantile(errors, 0.9))}) {name}")
        width = widest[0]["width"]
        what = f"`{name_of_class}` of width {width} on {len(found)} real heads, L = {length}"
        lines.append((f"{what}: median error (90 %)", listed(told)))
    return lines


def factor_speed(rows: Rows) -> list[Line]:
    """The block tree, narrow and wide, and the other factor against the best exact gradient."""
    lines = []
    for name in ("tree 64", "tree 256", "sparse 256"):
        told = []
        for p in sorted(points(rows, kind="time"), key=lambda p: p["length"]):
            exact = p["contenders"][p["best"]]
            told.append(f"{times(exact, p['contenders'][name])} at L = {p['length']}")
        method, width = name.split()
        label = {"tree": "BlockTree", "sparse": "SparseLowRank"}[method]
        what = f"`{label}` of width {width} over the best exact gradient, head width 32"
        lines.append((what, listed(told)))
    return lines


def failures(rows: Rows) -> list[Line]:
    """What factors without a guarantee say of themselves."""
    tried = [
        w for p in points(rows, kind="error") for w in p["widths"] if w.get("failed") is not None
    ]
    bad = [w["failed"] for w in tried if w["error"] > 1]
    good = [w["failed"] for w in tried if w["error"] < 0.3]
    told = f"{sum(bad)} of {len(bad)} errors above 1 reported as failed; "
    told += f"of {len(good)} below 0.3, {sum(good)}"
    return [("what those factors, the SVD included, say of themselves", told)]


def pilots(rows: Rows) -> list[Line]:
    """Both sides of every pilot, and its verdict."""
    lines = []
    for name, row in pilot.trained(rows).items():
        found, steps = row["metrics"]["outcome"], row["metrics"]["times"]
        worse = found["worse"]
        told = f"a step {times(steps['exact'], steps['approximate'])} as fast, held-out "
        told += f"{found['metric']} worse by {plain(worse['mean'])} "
        told += f"({plain(worse['low'])} to {plain(worse['high'])}), the estimate said stop "
        told += "never" if found["stop"] is None else f"at step {found['stop']}"
        told += f": {'go' if found['go'] else 'no-go'}"
        seeds = row["point"]["seeds"]
        count = "one seed" if seeds == 1 else f"{seeds} seeds"
        lines.append((f"pilot of {pilot.label(name)} ({count})", told))
    return lines


def diagnosis(rows: Rows) -> list[Line]:
    """The heads of a model that would gain."""
    (found,) = rows
    return [(f"`lora-limits diagnose` on {found['model']}", report.words(found)[0])]
