"""The rules of the house (docs/architecture.md), held by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import REPOSITORY

PACKAGE = REPOSITORY / "exporter" / "matexport"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PLUGINS = sorted((REPOSITORY / "plugins" / "matexport_plugins").rglob("*.py"))

# from the ground up; a module may import what stands below it, and its own layer's package
LAYERS = [
    {"errors", "version"},
    {"dims", "tensors", "gpus"},
    {"pickles", "slice_table", "hub"},
    {"checkpoint"},
    {"planning"},
    {"streaming", "manifest", "journal", "pareto", "tokenizer"},
    {"card", "staging", "graph"},
    {"writer"},
    {"families", "targets"},
    {"runtimes"},
    {"onnx", "tensorrt"},
    {"parity", "hf", "calibration"},
    {"api"},
    {"engines"},
    {"cli", "__init__"},
]
HEAVY = {"torch", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx"}
MAY_IMPORT_HEAVY = {"oracle.py", "modeling.py", "hf.py"}


def layer_of(module: str) -> int:
    """`matexport.onnx.export` -> the layer of `onnx`."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def module_of(path: Path) -> str:
    return ".".join(["matexport", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def imports(source: str, *, nested: bool = True) -> list[str]:
    """The modules that a source imports; without `nested`, only those that loading it imports."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if nested or not (inside or typing):
                yield child
                yield from walk(child)

    found = []
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.append(node.module or "")
            if node.module in ("matexport", "matexport.families.matmamba"):
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(own: str, source: str) -> list[str]:
    """The imports of module `own` that do not go downwards."""
    found = []
    for name in imports(source):
        if name.split(".")[0] == "matexport" and name != "matexport":
            beside = layer_of(own) == layer_of(name) and "." in own and name.split(".")[1] != own.split(".")[1]
            if layer_of(own) < layer_of(name) or beside:
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_downwards_only(path: Path) -> None:
    assert violations(module_of(path), path.read_text()) == []


def test_the_rules_can_fail() -> None:
    assert violations("matexport.planning", "def f():\n    import matexport.writer") == ["matexport.writer"]
    assert violations("matexport.card", "from matexport.writer import x") == ["matexport.writer"]
    assert violations("matexport.writer", "from matexport.planning import Plan") == []
    assert imports("try:\n    import torch\nexcept ImportError:\n    pass", nested=False) == ["torch"]
    assert imports("def f():\n    import torch", nested=False) == []


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_families_do_not_know_each_other(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if parts[0] == "families" and len(parts) > 2:
        for name in imports(path.read_text()):
            words = name.split(".")
            if words[:2] == ["matexport", "families"] and len(words) > 2:
                assert words[2] in (parts[1], "rows", "loaders")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    if path.name not in MAY_IMPORT_HEAVY:
        assert not HEAVY & {name.split(".")[0] for name in imports(path.read_text(), nested=False)}


@pytest.mark.parametrize("path", PLUGINS, ids=str)
def test_plugins_never_import_the_toolkit(path: Path) -> None:
    assert "matexport" not in {name.split(".")[0] for name in imports(path.read_text())}


def test_no_module_is_named_like_a_public_function() -> None:
    import matexport

    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not modules & set(matexport.__all__)


@pytest.mark.parametrize("path", [*SOURCES, *PLUGINS], ids=str)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("arguments", [["--help"], ["slices", "--help"], ["slice", "-h"], ["--version"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom matexport.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "print('loaded', sorted({'torch', 'onnx', 'onnx_ir', 'transformers', 'onnxruntime'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded [] 0"


def test_the_package_imports_without_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import matexport as mx, tempfile, pathlib\n"
        f"plan = mx.plan({str(REPOSITORY / 'examples/digits/checkpoint')!r}, 'eighth')\n"
        "plan.write(pathlib.Path(tempfile.mkdtemp(), 'out'))\nprint(plan.plan.parameters)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "26922"
