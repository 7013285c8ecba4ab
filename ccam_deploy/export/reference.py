"""The exported classifier in PyTorch, behind the calls that methods make of engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Activations
from ccam_deploy.errors import OptionError
from ccam_deploy.export.autodiff import GuidedRecorder, Recorder
from ccam_deploy.export.excitation import ExcitationRecorder, why_not
from ccam_deploy.export.layers import TargetLayer
from ccam_deploy.export.program import Program


class TorchClassifier:
    """A traced classifier run by PyTorch with autograd, to compare engines with; see Classifier."""

    def __init__(self, program: Program, layers: Sequence[TargetLayer]) -> None:
        self._program = program
        self._layers = layers
        self._nodes = [layer.node for layer in layers]

    def backbone(self, images: Floats) -> Activations:
        """Run a batch of images; the images themselves serve as residuals."""
        with torch.no_grad():
            logits, features = self._run(torch.from_numpy(images))
        return Activations(
            logits.numpy(), tuple(value.numpy() for value in features), {"images": images}
        )

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        """Gradients of the feature maps by autograd."""
        images = torch.from_numpy(activations.residuals["images"]).requires_grad_()
        logits, features = self._run(images)
        gradients = torch.autograd.grad(logits, features, torch.from_numpy(output_gradient))
        return tuple(gradient.numpy() for gradient in gradients)

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        """Gradient of the images by autograd."""
        recorder = (GuidedRecorder if guided else Recorder)(self._program.graph, ())
        values = torch.from_numpy(images).requires_grad_()
        (logits,) = recorder.run(values)
        (gradient,) = torch.autograd.grad(logits, values, torch.from_numpy(output_gradient))
        return gradient.numpy()

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        """Winning probabilities by autograd with other rules.

        Raises:
            OptionError: The network has an operator without a rule; see why_not.
        """
        if reason := why_not(self._program, self._layers):
            raise OptionError(f"the network has no excitation: {reason}")
        recorder = ExcitationRecorder(self._program, self._layers)
        (logits,) = recorder.run(torch.from_numpy(images).requires_grad_())
        maps = recorder.maps(logits, torch.from_numpy(winners), torch.from_numpy(duals))
        return tuple(value.numpy() for value in maps)

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        """Logits of images times masks, multiplied before the model sees them."""
        with torch.no_grad():
            (logits,) = self._program.graph(torch.from_numpy(images[owner] * masks[:, None]))
        return logits.numpy()  # type: ignore[no-any-return]

    def head_logits(self, features: Floats) -> Floats:
        """Logits of feature maps put in the place of the last layer's, of images of zeros."""
        values = torch.from_numpy(features)
        images = torch.zeros(len(values), *self._program.input_shape)
        interpreter = fx.Interpreter(self._program.graph)
        with torch.no_grad():
            (logits,) = interpreter.run(images, initial_env={self._nodes[-1]: values})
        return logits.numpy()  # type: ignore[no-any-return]

    def _run(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        recorder = Recorder(self._program.graph, self._nodes)
        (logits,) = recorder.run(images)
        return logits, [recorder.kept[node] for node in self._nodes]
