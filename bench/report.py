"""python bench/report.py RESULTS.json [--readme README.md]: the targets beside the figures, every time, memory, error.

Prints Markdown and writes it and a plot beside the JSON file; with --readme also the first table into that file,
between its two benchmark marks.  Ratios are medians of ratios taken round by round, with their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_targets

ORDER = (
    "eager", "permute", "compile", "chunked", "deterministic", "flex", "sdpa_masked", "efficient_masked",
    "cudnn_masked", "math_masked", "sdpa", "flash", "efficient", "cudnn", "math", "faiss", "faiss_blas", "hivilt_fp32",
    "hivilt_bf16", "hivilt_int8", "hivilt", "floor", "gemm", "copy",
)  # fmt: skip
FLOORS = ("floor", "gemm", "copy")  # parts of an operation, or as many bytes
# first words of titles
FAMILIES = ("topk_attention", "scale_fusion", "interpolate_add", "segformer", "token_pool", "bank_retrieval",
            "contrastive_loss", "HiViT", "HiViLT")  # fmt: skip
MARKS = "<!-- {}: {} -->", "<!-- end of benchmarks -->"

# What the kernels are to reach on two cores: shape -> (forward, forward+backward) -> times faster than (eager, sdpa).
SHAPES = {
    "B8-H12-Q196-N64-D64-top16": ((7, 1.3), (5, 3.2)),
    "B4-H12-Q1024-N512-D64-top32": ((12, 1.5), (14, 4)),
    "B1-H12-Q2048-N2048-D64-top64": ((13, 1.6), (15, 4.5)),
}
DIRECTIONS = "forward", "forward+backward"
TIMES_THE_FLOOR = 1.3  # on the last two shapes
FUSION_SHAPES = ("B8-56x56-C96-S3", "B8-56x56-C192-S3", "B16-28x28-C256-S3")
# (title without dtype, against whom, the goal: times faster, or at most so many times as long as the floor)
FUSION_TARGETS = (
    *((f"scale_fusion {direction} {shape}", rival, goal)
      for direction, rival, goals in (
          ("inference", "eager", (1.8, 2.2, 1.6)), ("training forward", "eager", (2.5, 3, 2.5)),
          ("forward+backward", "eager", (2, 2, 1.8)), ("inference", "gemm", (1.5, 1.3, 1.2)))
      for shape, goal in zip(FUSION_SHAPES, goals, strict=True)),
    ("interpolate_add inference B4-n784-N3136-C192", "eager", 3),
    ("interpolate_add forward+backward B4-n784-N3136-C192", "eager", 3),
    *((f"segformer {direction} B1-{model}-512x512-fusion", "eager", goal)
      for direction, goal in (("inference", 8), ("forward+backward", 3)) for model in ("B0", "B5")),
    ("token_pool inference B8-N3136-C192", "eager", 3), ("token_pool forward+backward B8-N3136-C192", "eager", 3),
    ("contrastive_loss forward+backward B4096-C512", "eager", 1.3),
)  # fmt: skip
BANK_SHAPES = ("B64-M10000-C192-top100", "B256-M100000-C192-top100", "B1024-M100000-C256-top100")
# (direction, who of us, against whom, the goal of each shape; at most so many times as long against the floor)
BANK_TARGETS = (
    ("forward", "hivilt", "eager", (3, 3.3, 3.2)), ("forward+backward", "hivilt", "eager", (5, 5, 5)),
    ("forward", "hivilt", "faiss", (3, 10, 1.6)), ("forward", "hivilt", "faiss_blas", (1.5, 1.6, 1.6)),
    ("forward", "hivilt", "floor", (1.35, 0.62, 0.62)), ("forward", "hivilt_fp32", "floor", (1.12, 1.12, 1.12)),
)  # fmt: skip
BF16_VS_FP32 = 1.6
OVERHEAD_US = 10


class Results:
    """The benchmarks of one file by (group, rival)."""

    def __init__(self, path: Path):
        data = json.loads(path.read_text(encoding="utf-8"))
        self.machine: dict[str, Any] = data["machine_info"].get("hivilt", {})
        self.commit, self.date = data["commit_info"], data["datetime"][:10]
        self.groups: dict[str, dict[str, dict]] = {}
        for bench in data["benchmarks"]:
            rival = bench["params"].get("rival", bench["name"])
            self.groups.setdefault(bench["group"], {})[rival] = bench

    def fact(self, group: str, rival: str, name: str) -> Any:
        return self.groups.get(group, {}).get(rival, {}).get("extra_info", {}).get(name)

    def median(self, group: str, rival: str) -> float | None:
        bench = self.groups.get(group, {}).get(rival)
        return bench["stats"]["median"] if bench else None

    @property
    def device(self) -> str:
        return "cuda" if self.machine.get("gpu") else "cpu"

    @property
    def like_gpu(self) -> bool:
        return self.device == "cuda" or bool(self.machine.get("rehearsal"))

    @property
    def shapes(self) -> list[str]:
        return list(gpu_targets.names(self.machine).values()) if self.like_gpu else list(SHAPES)

    @property
    def dtype(self) -> str:
        """That of the races of the shapes."""
        return gpu_targets.DTYPE if self.like_gpu else "fp32"

    def describe(self) -> str:
        m = self.machine
        where = m.get("gpu") or f"{m.get('cpu')}, instruction set in use: {m.get('isa')}"
        if m.get("rehearsal"):
            where = f"A rehearsal of the GPU's benchmarks, whose figures mean nothing, on {where}"
        dirty = " with uncommitted changes" if self.commit.get("dirty") else ""
        return (
            f"{where}; {m.get('threads')} threads on {m.get('cpus')} CPUs; torch {m.get('torch')}; hivilt "
            f"{m.get('hivilt')} at {(self.commit.get('id') or 'unknown')[:12]}{dirty}; {self.date}."
        )

    def warnings(self) -> list[str]:
        busy = {g: max((self.fact(g, r, "busy_others") or 0) for r in rivals) for g, rivals in self.groups.items()}
        loud = [group for group, share in busy.items() if share > 0.1]
        if not loud:
            return []
        return [f"**The machine was busy** during {len(loud)} of {len(busy)} races: do not quote these figures."]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown whose columns are also aligned as plain text."""
    if not rows:
        return "Not measured."
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def spread(quartiles: dict[str, float] | None, inverse: bool = False) -> str:
    """Median and, in brackets, the quartiles."""
    if quartiles is None:
        return "-"
    q1, median, q3 = (quartiles[name] for name in ("q1", "median", "q3"))
    if inverse:
        q1, median, q3 = 1 / q3, 1 / median, 1 / q1
    return f"{median:.2f} ({q1:.2f} .. {q3:.2f})"


def targets(results: Results) -> str:
    """One row per target: what was measured, what was to be reached, whether it was."""
    rows = []

    def row(what: str, shape: str, time: float | None, quartiles: dict | None, target: float, at_most: bool) -> None:
        if quartiles is None:
            return
        median = 1 / quartiles["median"] if at_most else quartiles["median"]
        reached = median <= target if at_most else median >= target
        sign = "at most " if at_most else ""
        rows.append(
            [what, shape, f"{ms(time)} ms", spread(quartiles, at_most), f"{sign}{target:g}", "yes" if reached else "no"]
        )

    if results.like_gpu:
        rows = gpu_targets.rows(results, ms, spread)
    for i, direction in enumerate(DIRECTIONS):
        for rival, name in (("eager", "eager"), ("sdpa", "dense SDPA")):
            for shape, goals in SHAPES.items():
                group = f"topk_attention {direction} {shape}-fp32-{results.device}"
                ratio = results.fact(group, "hivilt", f"ratio_vs_{rival}")
                target = goals[i][rival == "sdpa"]
                row(
                    f"{direction}: times faster than {name}",
                    shape,
                    results.median(group, "hivilt"),
                    ratio,
                    target,
                    False,
                )
    for shape in list(SHAPES)[1:]:
        group = f"topk_attention forward {shape}-fp32-{results.device}"
        ratio = results.fact(group, "hivilt", "ratio_vs_floor")
        what = "forward: times the Q K^T product alone"
        row(what, shape, results.median(group, "hivilt"), ratio, TIMES_THE_FLOOR, True)
    for shape in SHAPES:
        group = f"topk_attention forward {shape}-bf16-{results.device}"
        ratio = results.fact(group, "hivilt", "ratio_vs_hivilt_fp32")
        row(
            "forward in bf16: times faster than in fp32",
            shape,
            results.median(group, "hivilt"),
            ratio,
            BF16_VS_FP32,
            False,
        )
    for title, rival, goal in FUSION_TARGETS:
        group = f"{title}-fp32-{results.device}"
        ratio = results.fact(group, "hivilt", f"ratio_vs_{rival}")
        what, shape = title.rsplit(" ", 1)
        what += ": times its matrix products alone" if rival == "gemm" else ": times faster than eager"
        row(what, shape, results.median(group, "hivilt"), ratio, goal, rival == "gemm")
    for direction, ours, rival, goals in () if results.like_gpu else BANK_TARGETS:  # a GPU has goals of its own
        for shape, goal in zip(BANK_SHAPES, goals, strict=True):
            group = f"bank_retrieval {direction} {shape}-fp32-{results.device}"
            who = {"faiss": "FAISS", "faiss_blas": "FAISS with BLAS"}.get(rival, rival)
            what = "times the fp32 product alone" if rival == "floor" else f"times faster than {who}"
            what = f"bank_retrieval {direction}{', fp32' if ours == 'hivilt_fp32' else ''}: {what}"
            ratio = results.fact(group, ours, f"ratio_vs_{rival}")
            row(what, shape, results.median(group, ours), ratio, goal, rival == "floor")
    for direction in ("no-grad", "grad"):
        group = f"overhead {direction} {results.device}"
        beyond = results.fact(group, "hivilt", "us_beyond_mul")
        if beyond:
            reached = "yes" if beyond["median"] < OVERHEAD_US else "no"
            what = f"call overhead, {direction}: microseconds beyond torch.mul"
            time = results.median(group, "hivilt")
            rows.append(
                [what, "one query, one key", f"{1e6 * time:.1f} us", spread(beyond), f"below {OVERHEAD_US}", reached]
            )
    return table(["what", "shape", "hivilt", "measured (quartiles)", "target", "reached"], rows)


def by_family(results: Results, one: Callable[[Results, str, Callable[[str], str]], str]) -> str:
    """A table for each family that raced, of ``one(its races, what precedes the head, title -> label)``."""
    tables = []
    for family in FAMILIES:
        part = copy.copy(results)
        part.groups = {g: r for g, r in results.groups.items() if g.split()[0] == family and " data " not in g}
        if part.groups:
            before = "" if family == FAMILIES[0] else f"{family}, "
            tables.append(one(part, before, lambda group, family=family: group.removeprefix(f"{family} ")))
    return "\n\n".join(tables) or table([], [])


def times(results: Results) -> str:
    """Median milliseconds of every rival of every race."""

    def one(part: Results, before: str, label: Callable[[str], str]) -> str:
        names = [name for name in ORDER if any(name in rivals for rivals in part.groups.values())]
        rows = [[label(group), *(ms(part.median(group, name)) for name in names)] for group in part.groups]
        return table([f"{before}median ms", *names], rows)

    return by_family(results, one)


def others(results: Results) -> str:
    """Races with rivals of their own: overheads in microseconds, kinds of data in milliseconds."""
    rows = []
    for group, rivals in results.groups.items():
        if group.startswith("overhead"):
            rows += [[group, name, f"{1e6 * results.median(group, name):.1f} us"] for name in rivals]
        elif group.startswith("topk_attention data"):
            title = group.removeprefix("topk_attention ")
            rows += [[title, name, f"{ms(results.median(group, name))} ms"] for name in rivals]
    return table(["race", "rival", "median"], rows)


def present(results: Results) -> list[str]:
    """The rivals of these races that compute the whole operation, in a fixed order."""
    names = [name for name in ORDER if name not in (*FLOORS, "hivilt_fp32")]
    return [name for name in names if any(name in r for r in results.groups.values())]


def memory(results: Results) -> str:
    """Peak memory of one call beyond its inputs, results included."""

    def one(part: Results, before: str, label: Callable[[str], str]) -> str:
        rows, names = [], present(part)
        for group, rivals in part.groups.items():
            if not any(part.fact(group, name, "peak_bytes") for name in rivals):
                continue
            size = next(filter(None, (part.fact(group, name, "output_bytes") for name in names)), 0)
            peaks = [part.fact(group, name, "peak_bytes") for name in names]
            cells = ["-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]
            rows.append([label(group), f"{size / 2**20:.0f}", *cells])
        return table([f"{before}peak MiB of one call", "results alone", *names], rows)

    return by_family(results, one)


def errors(results: Results) -> str:
    """Largest absolute error against float64 in the judged head: of the output, and of the worst gradient. Outputs of
    dense attention are smaller than those of top-k attention, and so are its errors in half types. Of FAISS, scores."""

    def cell(found: dict[str, float] | None) -> str:
        if not found:
            return "-"
        grads = [error for name, error in found.items() if name not in ("out", "scores", "recall")]
        return f"{found.get('out', found.get('scores', 0.0)):.1e}" + (f", {max(grads):.1e}" if grads else "")

    def one(part: Results, before: str, label: Callable[[str], str]) -> str:
        names = present(part)
        rows = [[label(group), *(cell(part.fact(group, name, "max_error")) for name in names)] for group in part.groups]
        return table([f"{before}largest error: output, worst gradient", *names], rows)

    return by_family(results, one)


def recall(results: Results) -> str:
    """Share of the right rows that each rival lists, where the race is about rows; below 1 only where asked for."""
    rows, names = [], [name for name in ORDER if name not in FLOORS]
    found = {
        (group, name): errors["recall"]
        for group in results.groups
        for name in names
        if "recall" in (errors := results.fact(group, name, "max_error") or {})
    }
    names = [name for name in names if any(name == other for _, other in found)]
    for group in dict.fromkeys(group for group, _ in found):
        rows.append([group, *(f"{found[group, name]:.4f}" if (group, name) in found else "-" for name in names)])
    return table(["recall", *names], rows)


def left_out(results: Results) -> str:
    """Rivals that did not run, or computed something else, and why."""
    rows = []
    for group, rivals in results.groups.items():
        reasons = {}
        for name in rivals:
            reasons |= results.fact(group, name, "left_out") or {}
        rows += [[group.removeprefix("topk_attention "), name, why] for name, why in reasons.items()]
    return table(["race", "rival", "why it was left out"], rows)


def possible(results: Results) -> str:
    """What the operation must at least do, how long torch's own matrix product and copy would take for as much, and how
    many times faster than that it is done."""
    m, rows = results.machine, []
    for group in results.groups:
        bench = results.groups[group].get("hivilt")
        if bench and "flops" in bench["extra_info"]:
            facts = bench["extra_info"]
            rows.append([
                group.removeprefix("topk_attention "), f"{facts['flops'] / 1e9:.2f}", f"{facts['bytes'] / 2**20:.0f}",
                ms(facts["torch_s"]), ms(results.median(group, "hivilt")), f"{facts['speed_vs_torch']:.2f}",
            ])  # fmt: skip
    said = (
        f"On this machine torch multiplies big {m.get('matmul', 'fp32')} matrices at "
        f"{m.get('gflops_of_matmul', 0):.0f} Gflop/s and copies "
        f"{m.get('gb_per_s_of_copy', 0):.0f} GB/s. Selecting is not counted as work.\n\n"
    )
    head = ["hivilt", "Gflop needed", "MiB needed", "ms at torch's speed", "measured, ms", "times torch's speed"]
    return said + table(head, rows)


def draw(results: Results, path: Path) -> bool:
    """Times and memory of attention on the three shapes as bars; False without matplotlib, or without attention."""
    if not any(group.startswith("topk_attention") for group in results.groups):
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("eager", "compile", "flash" if results.like_gpu else "sdpa", "hivilt", "floor")
    labels = ("eager", "torch.compile", "dense SDPA", "hivilt", r"$QK^T$ alone")
    colours = ("#b0b0b0", "#8c8c8c", "#5b8db8", "#d1495b", "#e8d9a0")
    panels = (("forward", "time, ms", "forward"), ("forward+backward", "time, ms", "forward+backward"),
              ("forward+backward", "MiB", "peak memory beyond the inputs, forward+backward"))  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, (direction, unit, title) in zip(axes, panels, strict=True):
        for j, (name, label, colour) in enumerate(zip(names, labels, colours, strict=True)):
            for i, shape in enumerate(results.shapes):
                group = f"topk_attention {direction} {shape}-{results.dtype}-{results.device}"
                bench = results.groups.get(group, {}).get(name)
                value = bench and (
                    1e3 * bench["stats"]["median"]
                    if unit != "MiB"
                    else (bench["extra_info"]["peak_bytes"] or 0) / 2**20
                )
                if value:
                    at = i + 0.16 * (j - 2)
                    axis.bar(at, value, 0.15, color=colour, label=label if i == 0 else None)
                    axis.text(
                        at,
                        value,
                        f"{value:.3g}" if value < 100 else f"{value:.0f}",
                        ha="center",
                        va="bottom",
                        fontsize=7,
                    )
        axis.set_yscale("log")
        axis.margins(y=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
        axis.set_xticks(
            range(len(results.shapes)),
            [shape.replace("-Q", "\nQ").replace("-D64-", "\n").replace("-", " ") for shape in results.shapes],
        )
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(results.describe().removesuffix("."), fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def shapes_only(results: Results) -> Results:
    """The races of the three shapes, on a CPU those in bf16 too, and all others in the main dtype."""
    picked = copy.copy(results)
    shapes = results.shapes
    wanted = [f"topk_attention {d} {shape}-{results.dtype}-{results.device}" for d in DIRECTIONS for shape in shapes]
    wanted += [f"topk_attention forward {shape}-bf16-{results.device}" for shape in shapes if not results.like_gpu]
    ending = f"-{results.dtype}-{results.device}"
    wanted += [g for g in results.groups if g.split()[0] in FAMILIES[1:] and g.endswith(ending)]
    picked.groups = {group: results.groups[group] for group in wanted if group in results.groups}
    return picked


def summary(results: Results) -> str:
    """Machine and targets."""
    return "\n\n".join([results.describe(), *results.warnings(), targets(results)])


def for_readme(results: Results, name: str) -> str:
    """What the README shows of a file of bench/results."""
    few, picture = shapes_only(results), Path(name).with_suffix(".png").name
    parts = [summary(results), times(few), memory(few), errors(few), f"![times and memory](bench/results/{picture})"]
    return "\n\n".join(parts)


def compose(results: Results, picture: str | None) -> str:
    parts = ["# Benchmarks", summary(results)]
    if picture:
        parts.append(f"![times and memory]({picture})")
    sections = (
        ("Times", times),
        ("Memory", memory),
        ("Errors", errors),
        ("Recall", recall),
        ("Work", possible),
        ("Others", others),
    )
    if results.like_gpu:
        sections += (("Left out", left_out),)
    for title, body in sections:
        parts += [f"## {title}", body.__doc__.split("\n\n")[0].replace("\n   ", ""), body(results)]
    return "\n\n".join(parts) + "\n"


def only_targets(results: Results, name: str) -> str:
    return summary(results)


def only_times(results: Results, name: str) -> str:
    return times(results)


FORMS = {"benchmarks": for_readme, "targets": only_targets, "times": only_times}  # what a mark in the README asks for


def marked(text: str) -> list[re.Match]:
    """Every pair of marks: (form, name of the file, what stands between)."""
    start = MARKS[0].format(f"({'|'.join(FORMS)})", "([^ ]+)")
    return list(re.finditer(f"{start}\n(.*?)\n{re.escape(MARKS[1])}", text, flags=re.DOTALL))


def into_readme(readme: Path, results: Results, name: str) -> None:
    """Fills the pair of marks that names this file; for a new file, the one of the form "benchmarks"."""
    text = readme.read_text(encoding="utf-8")
    pairs = marked(text)
    chosen = [m for m in pairs if m[2] == name] or [m for m in pairs if m[1] == "benchmarks"]
    if len(chosen) != 1:
        raise SystemExit(f"report: {readme} holds {len(chosen)} pairs of benchmark marks for {name}, expected 1")
    pair = chosen[0]
    block = f"{MARKS[0].format(pair[1], name)}\n{FORMS[pair[1]](results, name)}\n{MARKS[1]}"
    readme.write_text(text[: pair.start()] + block + text[pair.end() :], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path)
    asked = parser.parse_args()
    results = Results(asked.results)
    picture = asked.results.with_suffix(".png")
    drawn = draw(results, picture)
    text = compose(results, picture.name if drawn else None)
    asked.results.with_suffix(".md").write_text(text, encoding="utf-8")
    if asked.readme:
        into_readme(asked.readme, results, asked.results.name)
    print(text)
    print(
        f"written: {asked.results.with_suffix('.md')}"
        + (f", {picture}" if drawn else "; no plot: no attention, or no matplotlib")
    )


if __name__ == "__main__":
    main()
