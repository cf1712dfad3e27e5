"""Planted faults and the gate's verdict on each, which measure the gate's detection power."""
