"""Every error that this package raises on purpose.

CcamError                what the command line prints as one line, with exit code 2
├── OptionError          an option or argument that is unknown or out of range
├── ImageError           an image that cannot be read or used
├── TargetError          a class that the classifier does not have
├── DatasetError         a data set that is not laid out as it should be
├── OutputError          a result that cannot be written
├── BundleError          a bundle that cannot be read or written
│   ├── ManifestError    a manifest that breaks the schema, or leads outside its bundle
│   └── IntegrityError   a file whose content is not what the manifest records
├── ExportError          a model that cannot become a bundle
│   ├── SourceError      a model file or module that cannot be loaded or traced
│   ├── LayerError       a target layer that is unknown or unusable
│   ├── LoweringError    an operator that the graphs cannot hold
│   └── ToleranceError   a graph that does not agree with PyTorch
└── BackendError         an engine that is missing, or that cannot do what was asked
"""

from __future__ import annotations


class CcamError(Exception):
    """The root: catch it to handle every error of this package."""


class OptionError(CcamError, ValueError):
    """An option or argument is unknown or out of range."""


class ImageError(CcamError, ValueError):
    """An image cannot be read or used."""


class DatasetError(CcamError, ValueError):
    """A data set is not laid out as it should be."""


class OutputError(CcamError):
    """A result cannot be written."""


class TargetError(CcamError, ValueError):
    """A class is not one of the classifier's."""


class BundleError(CcamError):
    """A bundle cannot be read or written."""


class ManifestError(BundleError):
    """A manifest breaks the schema or leads outside its bundle."""


class IntegrityError(BundleError):
    """A file's content is not what the manifest records."""


class BackendError(CcamError):
    """An engine is missing or cannot do what was asked."""


class ExportError(CcamError):
    """A model cannot become a bundle."""


class SourceError(ExportError):
    """A model file or module cannot be loaded or traced."""


class LayerError(ExportError):
    """A target layer is unknown or unusable."""


class LoweringError(ExportError):
    """An operator cannot be expressed in the graphs."""


class ToleranceError(ExportError):
    """An exported graph does not agree with PyTorch."""


def brief(error: BaseException, limit: int = 200) -> str:
    """The first line of another library's error, shortened, for use inside a message.

    Where that ends in a colon, the next one too.
    """
    lines = [words for words in map(str.strip, str(error).splitlines()) if words]
    count = 2 if lines and lines[0].endswith(":") else 1
    line = " ".join(lines[:count]) or type(error).__name__
    return line if len(line) <= limit else line[: limit - 1] + "…"
