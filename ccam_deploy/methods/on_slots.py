"""What all that explains on a GPU's slots knows: the slots, and the bundle's facts."""

from __future__ import annotations

from ccam_deploy.bundle.manifest import Manifest
from ccam_deploy.engines.cuda.graph_replay import CudaGraphs
from ccam_deploy.engines.cuda.slots import Slots


class OnSlots:
    """Slots, what methods need to explain on them, and what does not work there.

    Args:
        slots: The slots to run on.
        manifest: The bundle's.
        gradient_scale: The factor of the gradient graph's input.
        batch_size: The most images, and the most pairs, that a slot takes at a time.
        cuda_graphs: Whether work that is repeated at the same sizes is replayed as CUDA graphs;
            the results are the same.

    Attributes:
        notes: A line for each option that does not work here.
    """

    def __init__(
        self,
        slots: Slots,
        manifest: Manifest,
        gradient_scale: float,
        batch_size: int,
        cuda_graphs: CudaGraphs = True,
    ) -> None:
        self.slots = slots
        self.manifest = manifest
        self.gradient_scale = gradient_scale
        self.batch_size = batch_size
        self.cuda_graphs = cuda_graphs
        self.notes: tuple[str, ...] = ()

    def note(self, line: str) -> None:
        """Add a line to the notes, unless it is there."""
        if line not in self.notes:
            self.notes = (*self.notes, line)
