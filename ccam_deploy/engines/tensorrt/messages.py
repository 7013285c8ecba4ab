"""TensorRT's messages, kept for this package's errors; nothing is printed.

TensorRT calls these objects from its own code, which swallows exceptions.
"""

from __future__ import annotations

from typing import Any

from ccam_deploy.errors import BackendError

_MOST_ERRORS = 8


class _Reasons:
    """Turns TensorRT's messages into errors of this package."""

    def error(self, description: str) -> BackendError:
        """Return an error with a description and TensorRT's reason."""
        return BackendError(f"{description}: {self._take_reason() or 'no reason was given'}")

    def _take_reason(self) -> str:
        raise NotImplementedError


def logger(trt: Any) -> Any:
    """Make a logger, for a builder or for a runtime that cannot be asked for its errors.

    Args:
        trt: The TensorRT package.

    Returns:
        A `trt.ILogger`. Its `first_error` is empty where there was none; `last_warning` likewise.
        Its `error` makes a BackendError of a description and the last error. Its `failure` is an
        exception that interrupted a message, such as KeyboardInterrupt, or None.
    """

    class Log(_Reasons, trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""
            self.last_error = ""
            self.last_warning = ""
            self.failure: BaseException | None = None

        def _take_reason(self) -> str:
            return self.last_error

        def log(self, severity: Any, message: str) -> None:
            try:
                if severity <= trt.ILogger.Severity.ERROR:
                    self.last_error = _one_line(message)
                    self.first_error = self.first_error or self.last_error
                elif severity == trt.ILogger.Severity.WARNING:
                    self.last_warning = _one_line(message)
            except BaseException as error:
                self.failure = error

    return Log()


def recorder(trt: Any) -> Any:
    """Make an error recorder, which keeps the errors of one context apart from those of others.

    Args:
        trt: The TensorRT package.

    Returns:
        A `trt.IErrorRecorder`. Its `error` makes a BackendError of a description and the first
        error, and forgets all of them.
    """

    class Recorder(_Reasons, trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: list[tuple[Any, str]] = []
            self._overflowed = False

        def _take_reason(self) -> str:
            reason = _one_line(self._errors[0][1]) if self._errors else ""
            self.clear()
            return reason

        def clear(self) -> None:
            self._errors.clear()
            self._overflowed = False

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return self._overflowed

        def report_error(self, code: Any, description: str) -> bool:
            if len(self._errors) < _MOST_ERRORS:
                self._errors.append((code, description))
            else:
                self._overflowed = True
            return True

    return Recorder()


def _one_line(message: str) -> str:
    return " ".join(message.split())
