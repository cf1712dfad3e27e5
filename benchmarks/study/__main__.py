"""`python -m benchmarks.study [all|run|tune|select|confirm|finalists|cost|report]`: see docs/study.md.

select, confirm and finalists belong to a study of forms (`--configs configs/study_forms --work runs/study_forms`).
all (the default): run every arm, measure the costs, write tables and figures. Exit 0 done, 2 bad input. Two processes
may run two seeds at once (`run --seeds 1` and `run --seeds 2`), because each uses one thread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERBS = ["all", "run", "tune", "select", "confirm", "finalists", "cost", "report"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("verb", nargs="?", default="all", choices=VERBS)
    parser.add_argument("--configs", type=Path, default=ROOT / "configs" / "study")
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where study.md and study/ are")
    parser.add_argument("--seeds", type=int, nargs="+", help="of these seeds only (default: study.yaml's)")
    parser.add_argument("--arms", nargs="+", help="run or report these arms only")
    args = parser.parse_args(arguments)
    from so8t_core.errors import InputError

    try:
        return _do(args)
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2


def _do(args: argparse.Namespace) -> int:
    from benchmarks.study.arms import load_study

    study, arms = load_study(args.configs)
    seeds = args.seeds or study.seeds
    if args.verb != "report":
        from benchmarks.study.runs import Workshop, run_all, tune
        from pipeline.progress import Reporter

        shop = Workshop(study, arms, args.work, Reporter())
        if args.verb == "tune":
            tune(shop)
        if args.verb in ("select", "confirm", "finalists"):
            from benchmarks.study.selection import confirm, evaluate_finalists, select

            done = {"select": select, "confirm": confirm, "finalists": evaluate_finalists}[args.verb](shop)
            print(done or "done")
        if args.verb in ("all", "run"):
            run_all(shop, seeds, args.arms or list(arms))
        if args.verb in ("all", "cost"):
            from benchmarks.study.cost import measure_cost

            measure_cost(shop)
    if args.verb in ("all", "report"):
        from benchmarks.study.report import write_report

        write_report(study, arms, args.work, args.docs, seeds, args.arms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
