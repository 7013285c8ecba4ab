"""What the benchmarks share: options, exports, measurements in fresh processes, result files."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ccam_deploy.engines.tensorrt.library import FLAVOURS
from ccam_deploy.files import write_file
from ccam_deploy.latency.conditions import gpu, machine

ROOT = Path(__file__).parents[1]
PHOTOGRAPH = ROOT / "ccam_deploy" / "examples" / "photographs" / "flower.jpg"


def argument_parser(
    documentation: str | None,
    *,
    rounds: int,
    networks: Sequence[str] = (),
    output: str = "a folder",
) -> argparse.ArgumentParser:
    """Make a parser of the options that benchmarks share.

    Args:
        documentation: The benchmark's docstring; its first line is the description.
        rounds: The default of --rounds.
        networks: The default of --networks; without any, the benchmark has no such option.
        output: What --output names.

    Returns:
        A parser with --rounds, --output and, where there are networks, --networks and the hidden
        --bundle, with which a benchmark measures one bundle; see measure_in_process.
    """
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="the least number of rounds")
    parser.add_argument("--output", type=Path, help=output)
    if networks:
        parser.add_argument("--networks", default=",".join(networks), help="recipes of export/")
        parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    return parser


def command_line(module: str, options: Mapping[str, object]) -> str:
    """Write the command that runs a benchmark, as it stands beside its results.

    Args:
        module: The benchmark, such as "bench.bench_table2".
        options: Values by option, without dashes; options that are None are left out.

    Returns:
        One line for a shell.
    """
    return shlex.join(["python", "-m", module, *_words(options)])


def describe_run(
    module: str, options: argparse.Namespace, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Put the results of several networks beside how they were measured.

    Args:
        module: The benchmark, such as "bench.bench_overhead".
        options: Its parsed options: networks, rounds and output.
        results: What was measured of each network.

    Returns:
        What the benchmark writes: command, conditions and results.
    """
    words = {name: getattr(options, name) for name in ("networks", "rounds", "output")}
    return {
        "command": command_line(module, words),
        "conditions": conditions(),
        "results": results,
    }


def recipe_path(network: str) -> Path:
    """The recipe of a network that export/ has."""
    return ROOT / "export" / f"{network}.toml"


def export_command(network: str, folder: Path, *options: str, backend: str = "auto") -> list[str]:
    """Make the command that exports a network's recipe, in a process without this one's state.

    Args:
        network: The name of a recipe in export/.
        folder: Where the bundle goes.
        options: Further options of `ccam-deploy export`.
        backend: The engine that will run the bundle; plans are built where it runs those.

    Returns:
        The words of the command.
    """
    command = [sys.executable, "-m", "ccam_deploy", "export"]
    command += ["--recipe", str(recipe_path(network)), *options, "--output", str(folder)]
    if backend in FLAVOURS:
        command += ["--build", "--no-kernels", "--library", backend]
    return command


def export(network: str, folder: Path, *options: str, backend: str = "auto") -> Path:
    """Export a network's recipe in its own process, whose PyTorch threads end with it.

    It takes what export_command takes, and returns the folder.

    Raises:
        SystemExit: The export failed; the message is what it wrote to stderr.
    """
    run(export_command(network, folder, *options, backend=backend))
    return folder


def measure_in_process(module: str, options: Mapping[str, object]) -> dict[str, Any]:
    """Run a benchmark in its own process, where it prints one result as its last line.

    Args:
        module: The benchmark, such as "bench.bench_table2".
        options: Values by option, without dashes, with the bundle.

    Returns:
        The result that it printed as JSON.

    Raises:
        SystemExit: It failed; the message is what it wrote to stderr.
    """
    lines = run([sys.executable, "-m", module, *_words(options)]).splitlines()
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def run(command: Sequence[str]) -> str:
    """Run a command from the repository's root, and show what it writes to stderr.

    Args:
        command: A program and its arguments.

    Returns:
        What it printed to stdout.

    Raises:
        SystemExit: It failed; the message is what it wrote to stderr.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stderr.strip()}\nfailed: {shlex.join(command)}")
    sys.stderr.write(done.stderr)
    return done.stdout


def conditions(*, with_gpu: bool = False) -> dict[str, Any]:
    """Describe versions and machine.

    Args:
        with_gpu: Whether to describe the GPU too, as "gpu"; None where there is none.

    Returns:
        Plain values for JSON.
    """
    facts: dict[str, Any] = msgspec.to_builtins(machine())
    return {**facts, "gpu": msgspec.to_builtins(gpu())} if with_gpu else facts


def device_line(facts: Mapping[str, Any]) -> str:
    """Name the GPU, or else the processor and its cores, of some conditions."""
    card = facts.get("gpu")
    return f"{card['name'] if card else facts['processor']}, {facts['cores']} cores"


def write_results(file: Path, result: Mapping[str, Any], markdown: str) -> None:
    """Write a result as JSON, and beside it the same as Markdown.

    Args:
        file: The JSON file; the Markdown file has its name with another suffix.
        result: Plain values.
        markdown: What a reader sees.

    Raises:
        OutputError: A file cannot be written.
    """
    write_file(file, f"{json.dumps(result, indent=2)}\n".encode())
    write_file(file.with_suffix(".md"), markdown.encode())


def publish(file: Path | None, result: Mapping[str, Any], markdown: str) -> None:
    """Print a result's tables, and write it where a file is asked for.

    Args:
        file: A JSON file; None to print only.
        result: See write_results.
        markdown: The result's tables.
    """
    print(markdown)
    if file:
        write_results(file, result, markdown)


def _words(options: Mapping[str, object]) -> list[str]:
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return [word for pair in pairs for word in pair]
