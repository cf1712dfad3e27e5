"""The row formats that the data step knows; importing this package registers them. Your own: docs/data.md."""

# Each registers its formats; the order is the precedence: a row of messages may hold the problem they were made from.
from pipeline.data.formats import chat, problem, question_answer  # noqa: F401  isort: skip
from pipeline.data.formats.registry import Conversation, Format, Target, ask, load_formats, read_row, register

__all__ = ["Conversation", "Format", "Target", "ask", "load_formats", "read_row", "register"]
