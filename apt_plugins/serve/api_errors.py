"""What goes wrong with a request, in the form in which OpenAI's protocol says it."""

from __future__ import annotations

from typing import Any

from apt_core import ConfigError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with this ``status``, told with the name of the parameter that it concerns and a
    ``code`` for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "")
        return {
            "error": {
                "message": self.message,
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }

    @classmethod
    def of(cls, error: ConfigError, names: dict[str, str]) -> ApiError:
        """A 400 that has every problem of ``error``, each under its name among ``names``."""
        named = [(names.get(problem.key, problem.key), problem) for problem in error.problems]
        lines = [
            f"{f'{name}: ' if name else ''}{problem.message}"
            f"{f' ({problem.hint})' if problem.hint else ''}"
            for name, problem in named
        ]
        return cls(400, "; ".join(lines)[:2000], param=named[0][0] or None, code="invalid_value")
