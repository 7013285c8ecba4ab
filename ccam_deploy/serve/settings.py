"""How a served model explains: what its config.pbtxt holds as parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from ccam_deploy.bundle.manifest import Manifest, PrecisionName
from ccam_deploy.errors import OptionError
from ccam_deploy.methods import DEFAULT_METHOD, METHODS, CollectionCAM, Method, method_named

Kind = Literal["auto", "cpu", "gpu"]
"""Where instances of a model run; "auto" takes a GPU where the server has one."""


@dataclass(frozen=True)
class ModelSettings:
    """How a served model explains.

    Attributes:
        methods: Names of the methods that requests may ask for, the default one first; empty for
            every method that the bundle can run, Collection-CAM first.
        options: Options of methods, by the method's name; others have their defaults.
        precision: The engines' precision.
        kind: Where the model may run.
        threads: CPU threads of each instance; 0 lets the engine choose.
        require_signature: The path, on the server, of the public key that the bundle has to be
            signed with; empty where none is needed.
    """

    methods: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    precision: PrecisionName = "fp32"
    kind: Kind = "auto"
    threads: int = 0
    require_signature: str = ""

    @property
    def default(self) -> str:
        """The name of the method of requests that ask for none."""
        return self.methods[0] if self.methods else DEFAULT_METHOD

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods that requests may ask for, where the bundle can run them."""
        return self.methods or tuple(METHODS)

    @property
    def collections(self) -> CollectionCAM | None:
        """Collection-CAM with its options; None where requests cannot ask for it."""
        method = self.method(CollectionCAM.name) if CollectionCAM.name in self.names else None
        return method if isinstance(method, CollectionCAM) else None

    def method(self, name: str) -> Method:
        """Make a method with its options.

        Raises:
            OptionError: The method or an option is unknown, or a value is out of range.
        """
        kind = method_named(name)
        values = self.options.get(name, {})
        known = [option.name for option in dataclasses.fields(kind)]
        for option in values:
            if option not in known:
                raise OptionError(f'{name} has no option "{option}"; it has {", ".join(known)}')
        try:
            return msgspec.convert(values, kind)
        except msgspec.ValidationError as error:
            raise OptionError(f"an option of {name} is unusable: {error}") from error

    def to_parameters(self) -> dict[str, str]:
        """Write the settings as the parameters of a Triton model."""
        return {
            "methods": ",".join(self.methods),
            "options": json.dumps(self.options),
            "precision": self.precision,
            "kind": self.kind,
            "threads": str(self.threads),
            "require_signature": self.require_signature,
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ModelSettings:
        """Read the settings from the parameters of a Triton model, which people may have changed.

        Args:
            parameters: As `to_parameters` gives them; others are left alone, missing ones have
                their defaults.

        Raises:
            OptionError: A value cannot be used.
        """
        values: dict[str, Any] = {
            name: text
            for name, text in parameters.items()
            if name in {option.name for option in dataclasses.fields(cls)}
        }
        if "methods" in values:
            words = (word.strip() for word in values["methods"].split(","))
            values["methods"] = [word for word in words if word]
        try:
            if "options" in values:
                values["options"] = msgspec.json.decode(values["options"].encode())
            settings = msgspec.convert(values, cls, strict=False)
        except msgspec.MsgspecError as error:
            raise OptionError(f"a parameter in config.pbtxt is unusable: {error}") from error
        for name in {*settings.methods, *settings.options}:
            settings.method(name)
        return settings

    def weights_shape(self, manifest: Manifest) -> tuple[int, int] | None:
        """Give the shape of Collection-CAM's weights: layers, and the most collections of one.

        Args:
            manifest: The bundle's.

        Returns:
            None where requests cannot ask for Collection-CAM.
        """
        method = self.collections
        if method is None:
            return None
        return len(method.layers or manifest.layers), method.k_max
