"""The documentation says what is so: its names, figures, commands, links and limits."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import ccam_deploy as ccam
from ccam_deploy.cli.main import main
from tests.command import all_commands, success
from tests.helpers import RECIPES, ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
API = DOCS / "api"
NOTEBOOK = DOCS / "notebooks" / "tour.ipynb"
RESULTS = ROOT / "bench" / "results"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "engines/*.md", "export/*.md")
    for page in ROOT.glob(pattern)
)
TYPED_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^]\[]*\]\(([^)\s]+)\)")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def between(page: Path, name: str) -> str:
    """The part of a page between <!-- name --> and the next <!-- end -->."""
    part = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text_of(page), re.DOTALL)
    assert part, f"{page_id(page)} has no part between <!-- {name} --> and <!-- end -->"
    return part[1]


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in TYPED_BLOCK.findall(text_of(page)) if name == language]


def test_readme_is_short() -> None:
    lines = text_of(README).splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


def test_public_names_are_the_documented_ones() -> None:
    documented = re.findall(r"`(\w+)`", between(API / "index.md", "public names"))
    assert documented == sorted(documented)
    assert documented == ccam.__all__


@pytest.mark.parametrize("name", ccam.__all__)
def test_public_names_have_an_entry(name: str) -> None:
    """By a directive of their own, or one for all of the module that they come from."""
    directives = set(re.findall(r"^::: (\S+)$", "\n".join(map(text_of, API.glob("*.md"))), re.M))
    home = f"ccam_deploy.{ccam._HOMES[name]}"
    assert directives & {f"ccam_deploy.{name}", home}


@pytest.mark.parametrize("network", ["digits", "efficientnet_lite0"])
def test_quality_is_the_measured_one(network: str) -> None:
    measured = json.loads((RESULTS / f"quality-{network}.json").read_text())
    table = between(DOCS / "evaluation.md", f"quality of {network}").splitlines()
    metrics = [word.strip(" ,%↓↑") for word in table[0].split("|")[2:-2]]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table[2:]}
    assert set(rows) == set(measured["results"]["Methods"])
    for method, cells in rows.items():
        values = [measured["results"]["Methods"][method][name]["mean"] for name in metrics]
        milliseconds = measured["ms"][method]["median"]
        expected = [*(f"{value:.1f}" for value in values), f"{milliseconds:.0f}"]
        assert [cell.strip() for cell in cells] == expected


def test_readme_shows_the_measured_overhead() -> None:
    table, _, _ = text_of(RESULTS / "overhead-cpu.md").partition("\n\n")
    assert between(README, "overhead").strip() == table


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    prose = TYPED_BLOCK.sub("", text_of(page))
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page_id(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page_id(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown page's headings get, on a forge and on the site alike."""
    headings = re.findall(r"^#+ (.+)$", TYPED_BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_architecture_names_files_that_exist() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("ccam_deploy/**/*.py")}
    files |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/*.py")}
    for name in re.findall(r"[\w/]+\.py\b", text_of(ROOT / "ARCHITECTURE.md")):
        assert any(f"/{file}".endswith(f"/{name}") for file in files), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_are_python(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_have_the_options_shown(page: Path) -> None:
    for name, arguments in shown_commands(page):
        if isinstance(main.commands.get(name), click.Group):
            name, arguments = f"{name} {arguments[0]}", arguments[1:]
        command = all_commands().get(name)
        assert command, f"{page_id(page)} shows {name}"
        options = {word: option for option in command.params for word in option.opts}
        options |= {word: option for option in command.params for word in option.secondary_opts}
        context = click.Context(command)
        try:
            values, _, _ = command.make_parser(context).parse_args(arguments)
            for option in options.values():
                if isinstance(option.type, click.Choice) and values.get(option.name or ""):
                    option.type_cast_value(context, values[option.name or ""])
        except click.UsageError as error:
            pytest.fail(f"{page_id(page)}: {name} {shlex.join(arguments)}: {error.message}")


def shown_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The command and arguments of each line `ccam-deploy …` in a page's shell blocks."""
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["ccam-deploy"] and not words[1].startswith("-"):
                yield words[1], words[2:]


@pytest.mark.slow
def test_tutorial_runs(lite0_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python, and the commands that explain and compare, in the order of the page."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "efficientnet_lite0").symlink_to(lite0_bundle)
    (tmp_path / "export").symlink_to(RECIPES)
    monkeypatch.chdir(tmp_path)
    tutorial = DOCS / "tutorial.md"
    for name, arguments in shown_commands(tutorial):
        if name in ("info", "explain", "compare"):
            success(name, *arguments)
    names: dict[str, object] = {}
    for code in blocks(tutorial, "python"):
        exec(compile(code, str(tutorial), "exec"), names)


def test_notebook_was_executed_without_errors() -> None:
    """In order, from the first cell to the last, with nothing in it of the machine."""
    text = text_of(NOTEBOOK)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"execute_result", "stream"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert not re.search(r"/(home|tmp|work|root|usr)\b|/Users\b|site-packages", text)
