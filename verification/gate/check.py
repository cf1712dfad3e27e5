"""Small constructors for checks. Each has the status "not evaluated" until `decide.decide` gives it another."""

from __future__ import annotations

from verification.gate.report import Check, Divergence


def plain_check(
    name: str,
    title: str,
    value: float | int | str | None,
    *,
    subject: str = "",
    detail: str = "",
    unit: str = "",
    interval: tuple[float, float] | None = None,
    code: str = "",
    where: str = "",
) -> Check:
    """A measured value; the policy gives its bound."""
    return Check(
        name=name,
        title=title,
        subject=subject,
        status="not evaluated",
        value=value,
        detail=detail,
        unit=unit,
        interval=interval,
        code=code,
        where=where,
    )


def zero_check(
    name: str, title: str, count: int, *, subject: str = "", detail: str = "", code: str = "", where: str = ""
) -> Check:
    """A count of disagreements that must be zero."""
    return Check(
        name=name,
        title=title,
        subject=subject,
        status="not evaluated",
        value=count,
        relation="<=",
        bound=0,
        detail=detail,
        code=code,
        where=where,
    )


def divergence_checks(leg: str, d: Divergence, *, subject: str) -> list[Check]:
    """Mean KLD, top-1 and finiteness of one comparison; without finite positions the values are None: not evaluated."""
    seen = d.tokens > 0
    where = f"{d.tokens} positions in {d.chunks} chunks"
    return [
        plain_check(
            f"{leg}.mean_kld",
            "Mean KL divergence",
            d.mean_kld if seen else None,
            subject=subject,
            unit="nats",
            interval=d.mean_kld_interval if seen else None,
            detail=where,
        ),
        plain_check(
            f"{leg}.top1",
            "Same most likely token",
            d.top1 if seen else None,
            subject=subject,
            interval=d.top1_interval if seen else None,
            detail=where,
        ),
        zero_check(f"{leg}.non_finite", "Positions with NaN or Inf", d.non_finite, subject=subject),
    ]


def not_evaluated(what: str, error: Exception) -> str:
    """A line for the report about a failed measurement that decides nothing: its name, the error's type and text."""
    message = " ".join(str(error).split())[:300]
    return f"Not evaluated: {what}: {type(error).__name__}: {message}".rstrip(": ")
