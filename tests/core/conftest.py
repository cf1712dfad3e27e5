"""Hypothesis without a deadline (a shared machine stalls) and with few examples (every property runs in a second)."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "core", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.differing_executors]
)
settings.load_profile("core")
