"""The documentation is true: its Python runs, its commands and options exist, its links lead on."""

import os
import re
import shlex
from pathlib import Path

import click
import pytest

from mnet_kernels import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name if page.parent == ROOT else f"docs/{page.name}" for page in PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:torchrun .*-m mnet_kernels|mnet-kernels) (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", ["installing.md", "swapping.md"])
def test_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other."""
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in blocks(ROOT / "docs" / page, "python"):
        exec(compile(block, page, "exec"), scope)
    if "fast" in scope:
        assert (tmp_path / "decisions.json").exists()
        assert scope["y"].shape == (1, 32, 28, 28)


def test_the_activation_stands_in_the_tree_as_the_page_shows_it():
    page = ROOT / "docs" / "new-activation.md"
    files = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "mnet_kernels").rglob("*.py")]
    tree = {line.strip() for path in files for line in path.read_text().splitlines()}
    shown = [line.strip() for kind in ("python", "cpp") for text in blocks(page, kind)
             for line in text.splitlines()]  # fmt: skip
    assert shown and not [line for line in shown if line not in tree]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_options_exist(page):
    for block in blocks(page, ""):
        for line in COMMAND.findall(block.replace("\\\n", " ")):
            words = shlex.split(line.partition(" #")[0])
            command = cli.cli.commands[words[0]]
            context = click.Context(command)
            command.make_parser(context).parse_args(words[1:])  # UsageError where it does not


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        path = page if not target else Path(os.path.normpath(page.parent / target))
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"`((?:csrc|mnet_kernels|tests|benchmarks|docs)/[\w./-]+)`", page.read_text()
    )
    missing = [name for name in named if not (ROOT / name.rstrip(".")).exists()]
    made = {"benchmarks/README.md", "benchmarks/results/gpu.json", "benchmarks/results/"}
    assert set(missing) <= made
