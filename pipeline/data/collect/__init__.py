"""Collect pages from the web where robots.txt and licences allow it."""
