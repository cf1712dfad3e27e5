"""The study behind docs/study.md: what each adapter does to one small model, with and without PET.

`python -m benchmarks.study` (or `tox -e study`) trains every arm of `configs/study` on the same rows in the same order,
measures what was saved, and writes the tables and figures. It goes on where it was stopped.
"""
