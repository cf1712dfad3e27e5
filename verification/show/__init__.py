"""A report for people: HTML, Markdown, JUnit, terminal, GitHub."""
