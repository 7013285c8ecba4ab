"""Select the plans of a bundle that fit a library and a GPU, or say how to get plans that do."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.bundle.manifest import WEIGHTS, Plan
from ccam_deploy.engines.tensorrt.library import TITLES, TURING, Flavour, Library
from ccam_deploy.engines.tensorrt.plans import DEFAULT_MAX_BATCH
from ccam_deploy.errors import BackendError


def current_plans(
    bundle: Bundle,
    library: Library,
    devices: Sequence[str],
    precision: str,
    max_batch: int,
) -> tuple[Plan, ...]:
    """Find the plans that a build with these settings would only repeat.

    Args:
        bundle: The bundle.
        library: The TensorRT that would build.
        devices: Compute capabilities, from `Library.targets`.
        precision: One of the bundle's, or "tf32".
        max_batch: The most images that a plan takes at a time.

    Returns:
        A plan for each graph; nothing where a graph has none.
    """
    graphs = bundle.precision(precision).graphs
    plans_by_graph = {
        plan.graph: plan
        for plan in bundle.manifest.plans
        if plan.graph in graphs
        and (plan.library, plan.version) == (library.flavour, library.version)
        and (plan.precision, plan.max_batch) == (precision, max_batch)
        and set(plan.devices) == set(devices)
        and _sources(bundle, plan) == (plan.source, plan.weights)
    }
    if len(plans_by_graph) < len(graphs):
        return ()
    return tuple(plans_by_graph[graph] for graph in graphs)


def fitting_plans(
    bundle: Bundle,
    library_flavour: Flavour,
    library_version: str,
    capability: str,
    precision: str,
    max_batch: int | None = None,
) -> dict[str, Plan]:
    """Select a plan of each graph for the installed library and the GPU of this machine.

    Of several that fit, the plan for the fewest compute capabilities is taken, then for the most
    images.

    Args:
        bundle: The bundle.
        library_flavour: Which TensorRT is installed.
        library_version: Its version.
        capability: The GPU's compute capability, such as "8.9".
        precision: One of the bundle's, or "tf32".
        max_batch: How many images a plan must take at least; None for any number.

    Returns:
        The plans by graph.

    Raises:
        BackendError: No plan fits; the message has the reason, and the command that builds one.
        OptionError: The bundle has no graphs of that precision.
    """
    conditions = _conditions(
        bundle, library_flavour, library_version, capability, precision, max_batch
    )
    plans_by_graph = {}
    for graph in bundle.precision(precision).graphs:
        plans = [plan for plan in bundle.manifest.plans if plan.graph == graph]
        for condition in conditions:
            fitting = [plan for plan in plans if condition.holds(plan)]
            if not fitting:
                raise BackendError(f"{condition.problem(plans)}: {condition.remedy}")
            plans = fitting
        plans_by_graph[graph] = min(plans, key=lambda plan: (len(plan.devices), -plan.max_batch))
    return plans_by_graph


@dataclass(frozen=True)
class _Condition:
    """A condition that a plan must meet.

    Attributes:
        holds: Whether a plan meets it.
        problem: Describes plans of which none does.
        remedy: The command that builds plans which do.
    """

    holds: Callable[[Plan], bool]
    problem: Callable[[Sequence[Plan]], str]
    remedy: str


def _conditions(
    bundle: Bundle,
    flavour: Flavour,
    version: str,
    capability: str,
    precision: str,
    max_batch: int | None,
) -> tuple[_Condition, ...]:
    """The conditions, each of which is put to the plans that meet those before it."""
    title, folder = TITLES[flavour], bundle.folder
    words = ["ccam-deploy", "build", str(folder), "--library", flavour, "--precision", precision]
    if max_batch is not None and max_batch > DEFAULT_MAX_BATCH:
        words += ["--max-batch", str(max_batch)]
    build = build_for_device = shlex.join(words)
    if flavour == "tensorrt-rtx":
        build_for_device = shlex.join([*words, "--device", capability])
    if capability == TURING:
        build = build_for_device
    return (
        _Condition(
            lambda plan: (plan.library, plan.precision) == (flavour, precision),
            lambda plans: f"{folder} has no {precision} plans for {title}",
            build,
        ),
        _Condition(
            lambda plan: _sources(bundle, plan) == (plan.source, plan.weights),
            lambda plans: _other_source(bundle, plans[0]),
            build,
        ),
        _Condition(
            lambda plan: plan.version == version,
            lambda plans: (
                f"the plans of {folder} are for {title} {_listed(p.version for p in plans)}, "
                f"{version} is installed"
            ),
            build,
        ),
        _Condition(
            lambda plan: capability in plan.devices,
            lambda plans: (
                f"the plans of {folder} are for compute capability "
                f"{_listed(d for p in plans for d in p.devices)}, the GPU here has {capability}"
            ),
            build_for_device,
        ),
        _Condition(
            lambda plan: max_batch is None or plan.max_batch >= max_batch,
            lambda plans: (
                f"the plans of {folder} take at most {max(p.max_batch for p in plans)} images, "
                f"{max_batch} were asked for"
            ),
            build,
        ),
    )


def _sources(bundle: Bundle, plan: Plan) -> tuple[str, str]:
    """The SHA-256 of a plan's graph and of the weights, as the bundle has them now."""
    files = bundle.manifest.files
    graph = bundle.precision(plan.precision).graphs[plan.graph]
    return files[graph].sha256, files[WEIGHTS].sha256


def _other_source(bundle: Bundle, plan: Plan) -> str:
    source, weights = _sources(bundle, plan)
    part, was, now = "graph", plan.source, source
    if was == now:
        part, was, now = "weights", plan.weights, weights
    return (
        f"the {plan.graph} plan of {bundle.folder} was built from the {part} {was[:8]}, "
        f"the bundle has {now[:8]}"
    )


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
