"""The forms of a report for people and CI: HTML, Markdown, JUnit, terminal, GitHub."""
