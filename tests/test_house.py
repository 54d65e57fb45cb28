"""The house: imports point downwards, faces are kept, and the private core stands alone."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dpjax"

# A room is a package or a module of `dpjax/` itself. Rooms import from the rooms that are named
# for them, all of which stand above them here.
_GROUND = {"dp", "config", "metrics", "files"}
_STEP = _GROUND | {"models", "data", "runtime", "step"}
ROOMS = {
    "dp": set(),
    "files": set(),
    "metrics": set(),
    "config": {"files"},
    "guide": set(),
    "models": _GROUND,
    "data": _GROUND,
    "runtime": _GROUND,
    "step": _STEP - {"step"},
    "build": _STEP,
    "heads": _STEP,
    "training": _STEP | {"build"},
    "search": _STEP | {"build"},
    "audit": _STEP | {"build", "training"},
    "commands": _STEP | {"build", "heads", "training", "search", "audit"},
    "train": {"commands"},
    "__main__": {"commands"},
}
CORE_IMPORTS = {"jax", "numpy", "optax", "dp_accounting", "scipy", "dpjax"}  # scipy is jax's own
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(source: str) -> set[tuple[str, str]]:
    """Pairs (module, name) that a module imports; the name is empty for `import module`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def rooms(source: str) -> set[str]:
    """The rooms from which a module imports."""
    ours = [(module, name) for module, name in imported(source) if module.split(".")[0] == "dpjax"]
    return {room_of(module) or name for module, name in ours} - {"__version__"}


def modules(source: str) -> set[str]:
    """The modules of ours that a module imports, a package standing for its face."""
    named = {(f"{module}.{name}", module) for module, name in imported(source)}
    return {one if one in MODULES else other for one, other in named} & set(MODULES)


def offered(module: str) -> set[str]:
    """What a module or a face lists in `__all__`."""
    return set(getattr(importlib.import_module(module), "__all__", ()))


def behind_a_face(source: str, room: str) -> set[str]:
    """Names that a module of `room`, or of no room, takes from others but their faces do not list.

    A face lists names, or modules with lists of their own. Commands have no face.
    """
    found = set()
    for module, name in imported(source):
        parts = module.split(".")
        if parts[0] != "dpjax" or len(parts) == 1 or parts[1] in (room, "commands"):
            continue
        listed = len(parts) == 2 or (len(parts) == 3 and parts[2] in offered(f"dpjax.{parts[1]}"))
        if not listed or name not in offered(module):
            found.add(f"{module}.{name}")
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules in a circle of imports, and those that need them; none if there is no circle."""
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_dpjax_itself_holds_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_imports_point_downwards():
    upwards = {}
    for module, path in MODULES.items():
        if module != "dpjax":
            room = room_of(module)
            upwards[module] = rooms(path.read_text()) - ROOMS[room] - {room}
    assert {module: found for module, found in upwards.items() if found} == {}


def test_rooms_stand_in_order():
    names = list(ROOMS)
    assert set(names) == {room_of(module) for module in MODULES} - {""}
    for room, below in ROOMS.items():
        assert below <= set(names[: names.index(room)]) | {"files", "config", "metrics"}


def test_no_module_imports_itself_over_others():
    assert circle({name: modules(path.read_text()) for name, path in MODULES.items()}) == []


def test_what_a_face_does_not_list_stays_inside():
    files = [*MODULES.values(), *sorted((ROOT / "experiments").rglob("*.py"))]
    found = {}
    for path in files:
        inside = path.is_relative_to(PACKAGE) and path.parent != PACKAGE
        room = path.relative_to(PACKAGE).parts[0] if inside else ""
        found[str(path.relative_to(ROOT))] = behind_a_face(path.read_text(), room)
    assert {path: names for path, names in found.items() if names} == {}


def test_core_needs_little():
    core = [path for module, path in MODULES.items() if room_of(module) == "dp"]
    assert len(core) > 20
    for path in core:
        source = path.read_text()
        roots = {module.split(".")[0] for module, _ in imported(source)}
        assert roots - set(sys.stdlib_module_names) <= CORE_IMPORTS, path
        assert rooms(source) <= {"dp"}, path


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


def test_what_was_checked_when_it_was_made_cannot_change():
    for path in (PACKAGE / "dp").rglob("*.py"):
        assert all(map(frozen, dataclass_decorators(path.read_text()))), path


def test_offenses_are_seen():
    for call in ("dataclass", "dataclass()", "dataclass(frozen=False)", "dataclass(kw_only=True)"):
        (decorator,) = dataclass_decorators(f"@dataclasses.{call}\nclass A: pass")
        assert not frozen(decorator)
    assert rooms("from dpjax import step\nfrom dpjax.models.nets import x") == {"step", "models"}
    assert ("flax", "linen") in imported("def f():\n    from flax import linen")
    assert modules("from dpjax.build import data, Run") == {"dpjax.build.data", "dpjax.build"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    for line in ("models.nets.vit import _Block", "models.nets import SIZES",
                 "dp.noise import gaussian", "runtime import _dumps",
                 "runtime.sharding import _spread"):  # fmt: skip
        assert behind_a_face(f"from dpjax.{line}", "build") != set()
        assert behind_a_face(f"from dpjax.{line}", line.split(".")[0].split(" ")[0]) == set()
    for line in ("runtime import Workdir, sharding", "runtime.sharding import Layout",
                 "step import Hyper", "commands.cli import main"):  # fmt: skip
        assert behind_a_face(f"from dpjax.{line}", "build") == set()


def test_importing_the_core_loads_nothing_heavy():
    code = (
        "import sys, dpjax.dp; "
        "print([m for m in ('flax', 'grain', 'tensorflow_datasets', 'ml_collections', 'orbax', "
        "'matplotlib', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
