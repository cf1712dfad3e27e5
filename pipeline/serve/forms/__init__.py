"""The forms in which models write their thinking: one class for each form, found by name in `registry`."""
