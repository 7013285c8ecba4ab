"""Every error that this package raises on purpose.

CcamError                the root of all; the command line prints it as one line, exit code 2
├── OptionError          an option or argument that is unknown or out of range
├── ImageError           an image that cannot be read or used
├── TargetError          a class that the classifier does not have
├── RequestError         a request that a served model refuses
├── DatasetError         a data set whose folders or files are not laid out as expected
├── OutputError          a result that cannot be written
├── BundleError          a bundle that cannot be read or written
│   ├── ManifestError    a manifest that breaks the schema, or leads outside its bundle
│   ├── IntegrityError   a file that is not what the manifest records
│   └── SignatureError   a bundle that is not signed as required, or was changed since
├── ExportError          a model that cannot become a bundle
│   ├── SourceError      a model file or module that cannot be loaded or traced
│   ├── LayerError       a target layer that is unknown or unusable
│   ├── LoweringError    an operator that the graphs cannot express
│   └── ToleranceError   a graph that does not agree with PyTorch
├── ServerError          an inference server that does not start, or does not do what was asked
└── BackendError         an engine that is missing, or that cannot do what was asked
    └── NotFiniteError   values of some images that are NaN or infinite
"""

from __future__ import annotations


class CcamError(Exception):
    """The root of all errors of this package; catch it to handle every one of them."""


class OptionError(CcamError, ValueError):
    """An option or argument is unknown or out of range."""


class ImageError(CcamError, ValueError):
    """An image cannot be read or used: its file, its size, or its array's shape or values."""


class TargetError(CcamError, ValueError):
    """A class is not one of the classifier's, or its name stands for several."""


class RequestError(CcamError, ValueError):
    """A served model refuses a request: its tensors, its image, its class or its method.

    Attributes:
        reason: What is wrong in a word, for counting.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class DatasetError(CcamError, ValueError):
    """A data set's folders or files are not laid out as expected."""


class OutputError(CcamError):
    """A result cannot be written: the disk is full, or the place is not writable."""


class BundleError(CcamError):
    """A bundle cannot be read or written."""


class ManifestError(BundleError):
    """A manifest breaks the schema, or names a file outside its bundle."""


class IntegrityError(BundleError):
    """A bundle's file is missing, or its content is not what the manifest records."""


class SignatureError(BundleError):
    """A bundle is not signed with the key that is required, or was changed since it was."""


class ExportError(CcamError):
    """A model cannot become a bundle."""


class SourceError(ExportError):
    """A model file or module cannot be loaded or traced."""


class LayerError(ExportError):
    """A target layer is unknown, or has no feature maps that could be explained."""


class LoweringError(ExportError):
    """An operator of the model, or of its gradient, cannot be expressed in the graphs."""


class ToleranceError(ExportError):
    """An exported graph does not agree with PyTorch within its tolerance."""


class ServerError(CcamError):
    """An inference server does not start, cannot be reached, or does not do what was asked."""


class BackendError(CcamError):
    """An engine is missing, or cannot do what was asked."""


class NotFiniteError(BackendError):
    """An engine gives NaN or infinite values for some images; it works for others."""


def brief(error: BaseException, limit: int = 200) -> str:
    """Shorten another library's error to one line, for use inside a message.

    Args:
        error: The error.
        limit: The most characters of the line.

    Returns:
        The first line of the error's text, with the next where the first ends in a colon; the
        name of its class where it has no text.
    """
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    count = 2 if lines and lines[0].endswith(":") else 1
    summary = " ".join(lines[:count]) or type(error).__name__
    return summary if len(summary) <= limit else summary[: limit - 1] + "…"
