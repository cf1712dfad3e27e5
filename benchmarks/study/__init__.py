"""The study of docs/study.md: the effect of each adapter on one small model, with and without PET.

`python -m benchmarks.study` (or `tox -e study`) trains every arm of `configs/study` on the same rows in the same order,
measures the saved checkpoints, and writes the tables and figures. A stopped study can go on.
"""
