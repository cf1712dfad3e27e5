"""The refusal of a request, in OpenAI's error form."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that is not answered: HTTP status and OpenAI's error object. Never holds text of a generation."""

    def __init__(
        self,
        status: int,
        kind: str,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code
        self.message, self.param, self.retry_after = message, param, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error form."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value", status: int = 422) -> Refusal:
    """The refusal of a request that its sender must change."""
    return Refusal(status, "invalid_request_error", code, message, param=param)
