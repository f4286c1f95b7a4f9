"""docs/architecture.md is true: every module stands in its layer, imports go downwards, no include
crosses from one device to the other, and what the walks name is where they say."""

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnet_kernels"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layers() -> dict[str, int]:
    """The page's layers: top-level module or package to its line, counted from the top."""
    block = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    lines = [line.partition("  ")[0].strip() for line in block[1].splitlines()]
    return {name.strip(): i for i, names in enumerate(lines) for name in names.split(",") if name}


LAYERS = layers()


def test_every_module_has_its_layer():
    there = {name.partition(".")[0] for name in MODULES} | {"_C", "_cuda"}
    assert there == LAYERS.keys()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What of the package a module imports, and whether as soon as it is imported itself; what is
    for type checkers alone does not count."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            module = child.module or "" if isinstance(child, ast.ImportFrom) else ""
            if module.split(".")[0] == "mnet_kernels":
                inside = module.removeprefix("mnet_kernels").strip(".")
                for alias in child.names:
                    full = f"{inside}.{alias.name}".strip(".")
                    yield (full if full in MODULES else inside or full), at_once
            yield from visit(child, at_once and not isinstance(child, ast.FunctionDef))

    yield from visit(ast.parse(path.read_text()), True)


def layer(name: str) -> int:
    return LAYERS[name.partition(".")[0]]


def test_imports_go_downwards():
    upwards = [
        (name, used)
        for name, path in MODULES.items()
        if name not in ("__init__", "__main__")
        for used, _ in imports(path)
        if layer(used) < layer(name)
    ]
    assert not upwards


def test_no_import_leads_back():
    """Within a layer, too: not one circle among what modules import at once."""
    used = {
        name: {n for n, at_once in imports(path) if at_once and n in MODULES} - {name}
        for name, path in MODULES.items()
    }
    while free := {name for name, needs in used.items() if not needs & used.keys()}:
        used = {name: needs for name, needs in used.items() if name not in free}
    assert not used


def included(path: Path) -> list[str]:
    return re.findall(r'#include ["<]([^">]+)[">]', path.read_text())


def test_includes_go_downwards():
    """cpu/ and cuda/ never include each other, and only what Python calls directly includes them;
    device code includes no torch header, kernels of an instruction set nothing at all."""
    csrc = ROOT / "csrc"
    for path in csrc.rglob("*.*"):
        names = included(path)
        if path.parent != csrc or path.name not in ("bindings.cpp", "direct_call.cpp"):
            assert not [n for n in names if "cpu/" in n or "cuda/" in n], path.name
        if path.suffix == ".cuh":
            assert not [n for n in names if n.startswith("torch/")], path.name
    for group in ("instruction_set.inc", "forward_kernels.inc"):
        for name in included(csrc / "cpu" / group):
            assert name.endswith(".inc") or not included(csrc / "cpu" / name), name


def test_walks_name_what_is_there():
    walked = re.findall(r"`([\w/]+\.(?:py|cpp|h|cu|cuh))`\s((?:`[\w.]+`(?:, | or )?)+)", PAGE)
    assert walked
    for file, names in walked:
        text = next(p for p in (PACKAGE / file, ROOT / "csrc" / file) if p.exists()).read_text()
        for name in re.findall(r"[\w.]+", names.replace(" or ", " ")):
            last = name.split(".")[-1]
            defined = rf"(def|class) {last}\b" if file.endswith(".py") else rf"[\w*>] ?{last}\("
            assert re.search(defined, text), f"{file}: {name}"


def test_docstrings_refer_to_what_is_there():
    for path in MODULES.values():
        for named in re.findall(r":\w+:`~?(mnet_kernels\.[\w.\s]+)`", path.read_text()):
            pkgutil.resolve_name("".join(named.split()))
