"""Planted faults, and what the gate says of each: the gate's own detection power."""
