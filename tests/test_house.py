"""Imports point downwards only, and the private core stands alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dpjax"

# Lowest first. A room, a package or a module of `dpjax/` directly, imports from lower levels only,
# and rooms of one level know nothing of each other.
LEVELS = (
    {"files"},
    {"dp", "config", "metrics", "guide"},
    {"models", "data", "runtime"},
    {"step"},
    {"build", "heads"},
    {"training", "search"},
    {"audit"},
    {"commands"},
    {"train"},
)  # fmt: skip

CORE_IMPORTS = {"jax", "numpy", "optax", "dp_accounting", "dpjax"}


def imported(source: str) -> set[str]:
    """Dotted names of everything a module imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts(source: str) -> set[str]:
    """Parts of our package that a module imports."""
    return {name.split(".")[1] for name in imported(source) if name.startswith("dpjax.")} - {
        "__version__"
    }


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    part = part_of(path)
    (level,) = (i for i, level in enumerate(LEVELS) if part in level)
    assert parts(path.read_text()) <= set().union(*LEVELS[:level], {part})


@pytest.mark.parametrize("path", sorted((PACKAGE / "dp").rglob("*.py")), ids=lambda p: p.name)
def test_core_needs_little(path):
    roots = {name.split(".")[0] for name in imported(path.read_text())}
    assert roots - set(sys.stdlib_module_names) <= CORE_IMPORTS
    assert parts(path.read_text()) <= {"dp"}


def frozen(decorator: ast.expr) -> bool:
    """Whether `dataclasses.dataclass(...)` is called with frozen=True."""
    if not isinstance(decorator, ast.Call):
        return False
    return any(k.arg == "frozen" and ast.unparse(k.value) == "True" for k in decorator.keywords)


def dataclass_decorators(source: str) -> list[ast.expr]:
    """Those of the public classes."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    decorators = [d for c in classes if not c.name.startswith("_") for d in c.decorator_list]
    return [d for d in decorators if ast.unparse(d).startswith("dataclasses.dataclass")]


@pytest.mark.parametrize("path", sorted((PACKAGE / "dp").rglob("*.py")), ids=lambda p: p.name)
def test_what_was_checked_when_it_was_made_cannot_change(path):
    assert all(map(frozen, dataclass_decorators(path.read_text())))


def test_the_parser_sees_offences():
    for call in ("dataclass", "dataclass()", "dataclass(frozen=False)", "dataclass(kw_only=True)"):
        (decorator,) = dataclass_decorators(f"@dataclasses.{call}\nclass A: pass")
        assert not frozen(decorator)
    assert parts("from dpjax import step\nfrom dpjax.models.nets.vit import x") == {
        "step",
        "models",
    }
    assert "flax.linen" in imported("def f():\n    from flax import linen")


def test_importing_the_core_loads_nothing_heavy():
    code = (
        "import sys, dpjax.dp; "
        "print([m for m in ('flax', 'grain', 'tensorflow_datasets', 'ml_collections', 'orbax', "
        "'matplotlib', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
