"""The table of runs/demo.sh: every row over several seeds, with the spread, as Markdown.

python -m demo.table --seeds 21 22 23 24 25
"""

import argparse
import statistics

from common.errors import cli
from common.files import read_json
from demo.chain import records, roots, tokens_to_reach

ROWS = {
    "base": "base (where all start)",
    "clm": "CLM",
    "random": "random 60 %",
    "slm": "**SLM k 0.6**",
    "mixed1": "CLM, curated set mixed in once",
    "mixed8": "CLM, curated set mixed in eight times",
    "ref": "the reference itself",
    "clm-tuned": "CLM, then fine-tuned as the reference was",
    "slm-tuned": "SLM, then fine-tuned as the reference was",
}
SOLUTION = "solution"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", required=True, help="seeds whose runs are finished"
    )
    seeds = parser.parse_args().seeds

    def summary(name, seed):
        return read_json(
            roots(seed)[1] / name / "summary.json", f"{name} of seed {seed}, made by runs/demo.sh"
        )

    def solution_loss(record):
        return (record.get("val_loss_by_kind") or {}).get(SOLUTION)

    print("Validation loss / exact match on 1,000 problems:\n")
    print(
        "| | "
        + " | ".join(f"seed {s}" for s in seeds)
        + " | mean ± sd |\n|---|"
        + "---|" * (len(seeds) + 1)
    )
    for name, label in ROWS.items():
        cells = [(summary(name, s)["val_loss"], summary(name, s)["exact_match"]) for s in seeds]
        spread = [
            f"{statistics.mean(v):.3f} ± {statistics.stdev(v) if len(v) > 1 else 0:.3f}"
            for v in zip(*cells)
        ]
        print(
            f"| {label} | "
            + " | ".join(f"{loss:.3f} / {em:.3f}" for loss, em in cells)
            + f" | {' / '.join(spread)} |"
        )

    print("\nTimes fewer tokens than CLM that a run needs for CLM's final validation loss:\n")
    print(
        "| | "
        + " | ".join(f"seed {s}" for s in seeds)
        + " | median |\n|---|"
        + "---|" * (len(seeds) + 1)
    )
    for name in ("slm", "random"):
        for label, loss in (
            ("all tokens", lambda r: r.get("val_loss")),
            ("correct solutions only", solution_loss),
        ):
            ratios = []
            for s in seeds:
                out = roots(s)[1]
                final = records(out / "clm")[-1]
                reached = tokens_to_reach(out / name, loss(final), loss)
                ratios.append(final["tokens_seen"] / reached if reached else None)
            shown = [f"{r:.1f}" if r else "never" for r in ratios]
            median = statistics.median(r or 0 for r in ratios)
            print(
                f"| {ROWS[name]}, loss on {label} | {' | '.join(shown)} | {f'{median:.1f}' if median else 'never'} |"
            )

    print(
        "\nShare kept of each kind by SLM, last 100 steps, mean over seeds:\n\n| kind | kept |\n|---|---|"
    )
    kept = {}
    for s in seeds:
        last = records(roots(s)[1] / "slm")[-100:]
        for kind in last[-1]["kept"]:
            kept.setdefault(kind, []).extend(r["kept"][kind] for r in last if kind in r["kept"])
    for kind, shares in sorted(kept.items(), key=lambda item: -statistics.mean(item[1])):
        print(f"| {kind} | {statistics.mean(shares):.0%} |")


if __name__ == "__main__":
    cli(main)
