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
    """A traced classifier run by PyTorch with autograd, to compare engines with; see Classifier.

    All arrays are float32 but owners, which are int64.

    Args:
        program: The classifier.
        layers: Its target layers, from the shallowest to the deepest.

    Attributes:
        program: The classifier.
    """

    def __init__(self, program: Program, layers: Sequence[TargetLayer]) -> None:
        self.program = program
        self._layers = layers

    def backbone(self, images: Floats) -> Activations:
        """Run a batch of images.

        Args:
            images: [B, C, H, W], preprocessed.

        Returns:
            Logits [B, classes], feature maps [B, C, h, w] and what else the last one's tensor
            holds; the images serve as residuals.
        """
        with torch.no_grad():
            logits, recorder = self._run(torch.from_numpy(images))
        features = tuple(value.numpy() for value in recorder.features())
        rest = recorder.kept_rest[self._layers[-1].node]
        return Activations(
            logits.numpy(), features, {"images": images}, None if rest is None else rest.numpy()
        )

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        """Differentiate with respect to the feature maps by autograd.

        Args:
            activations: Of B images, from `backbone`.
            output_gradient: [B, classes], the gradient of the logits.

        Returns:
            [B, C, h, w] for each target layer.
        """
        images = torch.from_numpy(activations.residuals["images"]).requires_grad_()
        logits, recorder = self._run(images)
        upstream = torch.from_numpy(output_gradient)
        gradients = torch.autograd.grad(logits, recorder.features(), upstream)
        return tuple(gradient.numpy() for gradient in gradients)

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        """Differentiate with respect to the images by autograd.

        Args:
            images: [B, C, H, W], preprocessed.
            output_gradient: [B, classes], the gradient of the logits.
            guided: Let ReLUs pass back positive gradients only.

        Returns:
            [B, C, H, W].
        """
        recorder = (GuidedRecorder if guided else Recorder)(self.program.graph, ())
        values = torch.from_numpy(images).requires_grad_()
        (logits,) = recorder.run(values)
        (gradient,) = torch.autograd.grad(logits, values, torch.from_numpy(output_gradient))
        return gradient.numpy()

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        """Pass winning probabilities down by autograd with other rules (Zhang et al. 2018).

        Args:
            images: [B, C, H, W], preprocessed.
            winners: [B, classes], the probability that each class is the winner.
            duals: [B, classes], the same for classes whose weights in the last layer have the
                opposite sign.

        Returns:
            [B, h, w] for each target layer, summed over channels.

        Raises:
            OptionError: The network has an operator without a rule; see why_not.
        """
        if reason := why_not(self.program, self._layers):
            raise OptionError(f"the network has no excitation: {reason}")
        recorder = ExcitationRecorder(self.program, self._layers)
        (logits,) = recorder.run(torch.from_numpy(images).requires_grad_())
        maps = recorder.maps(logits, torch.from_numpy(winners), torch.from_numpy(duals))
        return tuple(value.numpy() for value in maps)

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        """Run images times masks, multiplied before the model sees them.

        Args:
            images: [B, C, H, W], preprocessed.
            masks: [N, H, W] in [0, 1].
            owner: [N], the image of each mask.

        Returns:
            Logits [N, classes].
        """
        with torch.no_grad():
            (logits,) = self.program.graph(torch.from_numpy(images[owner] * masks[:, None]))
        return logits.numpy()  # type: ignore[no-any-return]

    def head_logits(self, features: Floats, rest: Floats | None = None) -> Floats:
        """Run images of zeros with other feature maps in the place of the last layer's.

        Args:
            features: [N, C, h, w].
            rest: What else the last layer's tensor holds, N rows; see Activations.

        Returns:
            Logits [N, classes].
        """
        layer = self._layers[-1]
        others = None if rest is None else torch.from_numpy(rest)
        value = layer.tensor(torch.from_numpy(features), others)
        images = torch.zeros(len(features), *self.program.input_shape)
        interpreter = fx.Interpreter(self.program.graph)
        with torch.no_grad():
            (logits,) = interpreter.run(images, initial_env={layer.node: value})
        return logits.numpy()  # type: ignore[no-any-return]

    def _run(self, images: Tensor) -> tuple[Tensor, Recorder]:
        recorder = Recorder(self.program.graph, self._layers)
        (logits,) = recorder.run(images)
        return logits, recorder
