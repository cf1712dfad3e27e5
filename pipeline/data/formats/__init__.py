"""The built-in row formats; importing this package registers them. docs/data.md says how to add a format."""

# The order of import is the order of precedence: a row with messages may also hold the problem behind them.
from pipeline.data.formats import chat, problem, question_answer  # noqa: F401  isort: skip
from pipeline.data.formats.registry import Conversation, Format, Target, ask, load_formats, read_row, register

__all__ = ["Conversation", "Format", "Target", "ask", "load_formats", "read_row", "register"]
