"""Measure how time and memory grow with layers, width, vocabulary, context and files; extrapolate to large models.

python -m benchmarks.scaling [--out benchmarks/results] [--job "train step" ...]

Times are CPU seconds of one thread. There are two fits. The exponent of each axis is the slope of log seconds against
log size by least squares, with the 95 % interval of Student's t. The cost model of each job is a sum of terms that the
algorithm implies (products of a layer's weights with tokens, of the vocabulary with tokens, bytes to copy ...), with
coefficients of at least zero, fitted to all points of the job by their relative error; it gives the numbers for 3.8B
and 70B. Its largest error over the measured points stands beside it; beyond these points it is an extrapolation. The
output is scaling-DATE-MACHINE, as JSON and as a page.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import t as student

from benchmarks.scaling_jobs import JOBS, Point, Shape, measure

PHI35 = Shape(32, 3072, 8192, 3072, 32064, 2048, 2)
LLAMA70 = Shape(80, 8192, 28672, 1024, 128256, 2048, 30)
SCORED_CHUNKS, CHUNK = 12, 512  # the defaults of `so8t verify`
DAY = 86400.0

# Terms of each job's cost model, in units that give readable coefficients.
_TIME: dict[str, dict[str, Callable[[Shape], float]]] = {
    "train step": {
        "s a layer": lambda s: s.layers,
        "s a GFLOP of the layers": lambda s: 4e-9 * s.context * s.layers * s.layer_weights,  # no gradient of weights
        "s a GFLOP of the head": lambda s: 4e-9 * s.context * s.vocab * s.width,
        "s a million attention products": lambda s: 1e-6 * s.layers * s.context**2 * s.width,
        "s a million activations": lambda s: 1e-6 * s.context * (s.vocab + s.layers * s.width),
    },
    "bake": {
        "s a run": lambda s: 1.0,
        "s a file": lambda s: s.files,
        "s a layer": lambda s: s.layers,
        "s a GB copied": lambda s: 2e-9 * s.weights,
        "s a million weights folded": lambda s: 1e-6 * s.layers * s.width**2,
    },
    "verify": {
        "s a run": lambda s: 1.0,
        "s a file": lambda s: s.files,
        "s a GFLOP": lambda s: 4e-9 * s.context * (1 + s.files) * s.layers * s.layer_weights,
        "s a GFLOP of the head": lambda s: 2e-9 * s.context * (1 + s.files) * s.vocab * s.width,
        "s a million logits": lambda s: 1e-6 * s.context * s.vocab * (1 + s.files),
        "s a million weights loaded": lambda s: 1e-6 * s.files * s.weights,
    },
    "quantise": {
        "s a run": lambda s: 1.0,
        "s a million weights": lambda s: 1e-6 * s.weights,
        "s a thousand tokens of the vocabulary": lambda s: 1e-3 * s.vocab,
    },
}
_MEMORY: dict[str, dict[str, Callable[[Shape], float]]] = {
    "train step": {
        "MB a run": lambda s: 1.0,
        "bytes a weight": lambda s: 1e-6 * s.weights,
        "bytes a token, channel and layer": lambda s: 1e-6 * s.context * s.layers * s.width,
        "bytes a logit": lambda s: 1e-6 * s.context * s.vocab,
    },
    "bake": {
        "MB a run": lambda s: 1.0,
        "bytes a weight of the largest o_proj": lambda s: 1e-6 * s.width**2,
        "bytes a weight": lambda s: 1e-6 * s.weights,
    },
    "verify": {
        "MB a run": lambda s: 1.0,
        "bytes a weight": lambda s: 1e-6 * s.weights,
        "bytes a logit": lambda s: 1e-6 * s.context * s.vocab,
    },
    "quantise": {"MB a run": lambda s: 1.0, "bytes a weight": lambda s: 1e-6 * s.weights},
}


class Exponent(NamedTuple):
    """Slope of log y against log x."""

    slope: float
    low: float
    high: float


class Model(NamedTuple):
    """A fitted cost model."""

    coefficients: dict[str, float]
    largest_error: float  # relative, over the measured points

    def __call__(self, terms: dict[str, Callable[[Shape], float]], shape: Shape) -> float:
        return sum(self.coefficients[name] * term(shape) for name, term in terms.items())


def exponent(x: list[float], y: list[float]) -> Exponent:
    """Least squares on logarithms with the slope's 95 % interval; infinite for two points."""
    u, v = np.log(x), np.log(y)
    slope, cut = np.polyfit(u, v, 1)
    free = len(x) - 2
    if free < 1:
        return Exponent(float(slope), -math.inf, math.inf)
    error = math.sqrt(float(np.sum((v - cut - slope * u) ** 2)) / free / float(np.sum((u - u.mean()) ** 2)))
    half = float(student.ppf(0.975, free)) * error
    return Exponent(float(slope), float(slope) - half, float(slope) + half)


def fit(shapes: list[Shape], values: list[float], terms: dict[str, Callable[[Shape], float]]) -> Model:
    """Coefficients of at least zero with the smallest sum of squared relative errors."""
    rows = np.array(
        [[term(shape) / value for term in terms.values()] for shape, value in zip(shapes, values, strict=True)]
    )
    scale = rows.max(axis=0)
    found, _ = nnls(rows / scale, np.ones(len(values)))
    return Model(
        dict(zip(terms, map(float, found / scale), strict=True)), float(np.abs(rows @ (found / scale) - 1).max())
    )


def analyse(points: list[Point]) -> dict[str, Any]:
    """Exponents by job and axis, cost models by job, and the numbers for the large models."""
    jobs = list(dict.fromkeys(point.job for point in points))
    exponents: dict[str, Any] = {}
    models: dict[str, tuple[Model, Model]] = {}
    for job in jobs:
        own = [point for point in points if point.job == job]
        for axis in dict.fromkeys(point.axis for point in own):
            line = [point for point in own if point.axis == axis]
            x = [float(point.value) for point in line]
            exponents.setdefault(job, {})[axis] = {
                "seconds": exponent(x, [point.seconds for point in line])._asdict(),
                "megabytes": exponent(x, [point.megabytes for point in line])._asdict(),
            }
        shapes = [point.shape for point in own]
        models[job] = (
            fit(shapes, [point.seconds for point in own], _TIME[job]),
            fit(shapes, [point.megabytes for point in own], _MEMORY[job]),
        )
    return {
        "exponents": exponents,
        "models": {job: {"seconds": a._asdict(), "megabytes": b._asdict()} for job, (a, b) in models.items()},
        "extrapolated": extrapolate(models) if set(JOBS) <= set(models) else {},
    }


def extrapolate(models: dict[str, tuple[Model, Model]]) -> dict[str, Any]:
    """Hours and gigabytes of each job at 3.8B and 70B on one thread of this machine, and the cost of a thousand
    candidates a day."""

    def at(job: str, shape: Shape) -> tuple[float, float]:
        seconds, megabytes = models[job]
        return seconds(_TIME[job], shape), megabytes(_MEMORY[job], shape)

    found = {}
    for name, shape in (("3.8B", PHI35), ("70B", LLAMA70)):
        rows = {job: at(job, shape) for job in ("train step", "bake", "quantise")}
        chunk = Shape(shape.layers, shape.width, shape.inner, shape.kv_width, shape.vocab, CHUNK, 0)
        reference = at("verify", chunk)[0] * SCORED_CHUNKS / 2  # the job has two chunks
        one_more = Shape(*[getattr(chunk, f) for f in ("layers", "width", "inner", "kv_width", "vocab", "context")], 1)
        rows["verify"] = at("verify", one_more)
        candidate = at("verify", one_more)[0] * SCORED_CHUNKS / 2 - reference
        alone = candidate + rows["quantise"][0]
        found[name] = {
            "weights": shape.weights,
            "train step of 2048 tokens, s": rows["train step"][0],
            "train step, GB in float32": rows["train step"][1] / 1e3,
            "bake, s": rows["bake"][0],
            "bake, GB": rows["bake"][1] / 1e3,
            "verify: the reference once, s": reference,
            "verify: one candidate more, s": candidate,
            "verify: its re-quantised oracle, s": rows["quantise"][0],
            "verify, GB": rows["verify"][1] / 1e3,
            "verify: logits on the disk, GB": 4e-9 * SCORED_CHUNKS * (CHUNK // 2 - 1) * shape.vocab,
            "1000 candidates a day, one reference: threads": (1000 * alone + reference) / DAY,
            "1000 candidates a day, a reference each: threads": 1000 * (alone + reference) / DAY,
        }
    return found


def page(document: dict[str, Any], points: list[Point]) -> str:
    """A self-contained page: log-log plots of every job, exponents, models and extrapolation."""
    from benchmarks.loglog import plot
    from benchmarks.page import STYLE

    parts = [
        f"<p>{escape(document['machine'])}; {escape(document['date'])}, {document['seconds']:.0f} s, one thread.</p>"
    ]
    for job in dict.fromkeys(point.job for point in points):
        own = [point for point in points if point.job == job]
        parts.append(f"<h2>{escape(job)}</h2><div class='two'>{plot(own, 'seconds')}{plot(own, 'megabytes')}</div>")
        for axis, found in document["exponents"][job].items():
            said = [
                f"{what} x<sup>{e['slope']:.2f}</sup> [{e['low']:.2f}, {e['high']:.2f}]" for what, e in found.items()
            ]
            parts.append(f"<p>{escape(axis)}: {', '.join(said)}</p>")
        for what, model in document["models"][job].items():
            terms = "; ".join(f"{value:.3g} {escape(name)}" for name, value in model["coefficients"].items() if value)
            parts.append(f"<p class='soft'>{what}: {terms}; largest error {model['largest_error']:.0%}</p>")
    if document["extrapolated"]:
        names, numbers = list(document["extrapolated"]), document["extrapolated"]
        rows = ""
        for key in numbers[names[0]]:
            cells = "".join(f"<td>{numbers[name][key]:.3g}</td>" for name in names)
            rows += f"<tr><td>{escape(key)}</td>{cells}</tr>"
        head = "".join(f"<th>{name}</th>" for name in names)
        parts.append(f"<h2>Extrapolated, one thread</h2><table><tr><th></th>{head}</tr>{rows}</table>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SO8T scaling</title>'
        f"<style>{STYLE}.two{{display:grid;grid-template-columns:1fr 1fr;gap:1em}}</style></head>"
        f"<body><h1>SO8T: how it scales</h1>{''.join(parts)}</body></html>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, fit, write."""
    from benchmarks.result_file import machine
    from so8t_core.files import write_text

    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--job", action="append", choices=list(JOBS), help="only this job; may be repeated")
    given = parser.parse_args(arguments)
    start, points = time.monotonic(), []
    for job in given.job or JOBS:
        for axis, values in JOBS[job][2].items():
            for value in values:
                points.append(measure(job, axis, value))
                print(f"{job}, {axis} {value}: {points[-1].seconds:.4f} s, {points[-1].megabytes:.0f} MB", flush=True)
    document = {
        "schema_version": "1.0",
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "machine": str(machine()),
        "seconds": round(time.monotonic() - start, 1),
        **analyse(points),
        "points": [point.to_dict() for point in points],
    }
    name = "-".join("".join(c if c.isalnum() else " " for c in document["machine"].lower()).split())
    path = given.out / f"scaling-{document['date'][:10]}-{name}.json"
    given.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")
    write_text(path.with_suffix(".html"), page(document, points))
    for model, numbers in document["extrapolated"].items():
        print(model, *(f"  {key}: {value:.3g}" for key, value in numbers.items()), sep="\n")
    print(f"written: {path} and .html, {document['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
