"""The forms in which models write their thinking: one class a form, found by name in `registry`."""
