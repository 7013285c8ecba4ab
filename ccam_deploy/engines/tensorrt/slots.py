"""Slots that run a bundle's TensorRT plans."""

from __future__ import annotations

from typing import get_args

from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.bundle.signature import is_signed
from ccam_deploy.engines.cuda.pycuda import CudaDevice
from ccam_deploy.engines.cuda.slots import Graphs, Slot, Slots, Use
from ccam_deploy.engines.tensorrt.library import Flavour, load_library, present_device
from ccam_deploy.engines.tensorrt.runtime import PlanGraph, SharedPlan
from ccam_deploy.engines.tensorrt.select import fitting_plans
from ccam_deploy.errors import BackendError


def tensorrt_slots(bundle: Bundle, flavour: Flavour, precision: str, most: int) -> Slots:
    """Make slots on a bundle's plans, which all of them share.

    Args:
        bundle: The bundle.
        flavour: Which TensorRT to use.
        precision: One of the bundle's, or "tf32".
        most: How many slots there may be at a time.

    Returns:
        The slots, one of them open.

    Raises:
        BackendError: The library does not run on the GPU, or no plan fits them; see
            `fitting_plans`.
    """
    library = load_library(flavour)
    capability = present_device()
    if reason := library.why_not_on(capability):
        raise BackendError(f"{reason}; use onnxruntime-cuda or tensorrt")
    plans_by_graph = fitting_plans(bundle, flavour, library.version, capability, precision)
    writes = not is_signed(bundle.folder)  # what is added to a signed folder breaks its signature
    first = CudaDevice()
    try:
        with first.current():
            plans = {
                graph: SharedPlan(library, bundle.path(plan.file), capability, writes)
                for graph, plan in plans_by_graph.items()
            }
    finally:
        first.close()

    def close_plans() -> None:
        for plan in plans.values():
            plan.close()

    def keep_compiled() -> None:
        for plan in plans.values():
            plan.keep_compiled()

    return Slots(lambda: plan_slot(plans), most, close_plans, keep_compiled)


def plan_slot(plans: dict[str, SharedPlan]) -> Slot:
    """Open a stream with the graphs of each plan and profile, on shared scratch memory."""
    device = CudaDevice()
    try:
        with device.current():
            names = [
                use for use in get_args(Use) if all(use in plan.profiles for plan in plans.values())
            ]
            size = max(plan.scratch_bytes(use) for plan in plans.values() for use in names)
            scratch = device.allocate(size)
            graphs: dict[Use, Graphs] = {
                use: {graph: PlanGraph(plan, device, scratch, use) for graph, plan in plans.items()}
                for use in names
            }
    except BaseException:
        device.close()
        raise
    graphs.setdefault("throughput", graphs["latency"])
    return Slot(device, graphs)
