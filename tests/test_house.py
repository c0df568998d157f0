"""The house stays as it is meant: arrows point down, no circles, a family in one folder."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "liftplace_jax"
LEVELS = (
    {"losses", "diffusion", "conditioning", "compress", "host"},
    {"nn", "data", "weights"},
    {"families", "encoders", "training"},
    {"evaluation"},
    {"experiment"},
    {"main", "evaluate", "convert", "encode", "benchmark", "suites", "__main__"},
)
"""From the ground up. A room may know those below it, and beside it if that makes no circle."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
GROUND = LEVELS[0] - {"host"}  # mathematics: these know no other room but the host
NAMES_FAMILIES = {"families/registry.py"}
"""Where families are named, beside their own folders, configs/ and the cases of suites/."""


class Module:
    """A file of the package and what it imports of the package."""

    def __init__(self, path):
        self.path = path.relative_to(PACKAGE)
        parts = self.path.with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.room = parts[0]
        self.tree = ast.parse(path.read_text())
        self.typing = {
            id(node)
            for branch in ast.walk(self.tree)
            if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
            for node in ast.walk(branch)
        }

    def imports(self, late=True):
        """Names of modules of the package; `late`: also those inside functions."""
        nodes = ast.walk(self.tree) if late else self.tree.body
        for node in nodes:
            if id(node) in self.typing:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("liftplace_jax"):
                for alias in node.names:
                    yield f"{node.module}.{alias.name}".removeprefix("liftplace_jax").lstrip(".")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("liftplace_jax."):
                        yield alias.name.removeprefix("liftplace_jax.")


MODULES = [Module(path) for path in sorted(PACKAGE.rglob("*.py"))]
INSIDE = [module for module in MODULES if module.name]
FAMILIES = sorted(p.name for p in (PACKAGE / "families").iterdir() if (p / "family.py").exists())


def room_arrows():
    """(room, room it knows) -> a module that makes it so."""
    found = {}
    for module in INSIDE:
        for name in module.imports():
            room = name.split(".")[0]
            if room in LEVEL and room != module.room:
                found[module.room, room] = f"{module.path} imports {name}"
    return found


def find_circle(arrows):
    """A path that comes back to where it began, or None."""
    graph = {}
    for one, other in arrows:
        graph.setdefault(one, set()).add(other)
    done = set()

    def walk(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for following in sorted(graph.get(node, ())):
            if circle := walk(following, [*path, node]):
                return circle
        done.add(node)
        return None

    return next((circle for node in sorted(graph) if (circle := walk(node, []))), None)


def test_only_commands_stand_at_the_door():
    here = {
        path.stem if path.suffix else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    unknown = sorted(here - LEVEL.keys() - {"__init__"})
    assert not unknown, (
        f"{unknown} have no place in the house: put a module into the room it belongs to "
        "(CONTRIBUTING.md has the questions), or give a new room its level in LEVELS"
    )


def test_arrows_point_down():
    for (room, other), what in room_arrows().items():
        assert LEVEL[other] <= LEVEL[room], (
            f"{what}: {room} lies below {other}. Move what is needed down, or hand it in"
        )
        assert room not in GROUND or other == "host", (
            f"{what}: {room} is mathematics and knows the host alone. Hand it in as an argument"
        )


def test_no_circles():
    circle = find_circle(room_arrows())
    assert circle is None, f"rooms know each other in a circle: {' -> '.join(circle)}"
    names = {module.name for module in INSIDE}
    arrows = set()
    for module in INSIDE:
        for name in module.imports(late=False):
            # A name of a package's door is that of the module behind it where there is one.
            target = name if name in names else name.rpartition(".")[0]
            if (
                target in names
                and target != module.name
                and not (module.name + ".").startswith(target + ".")
            ):
                arrows.add((module.name, target))
    circle = find_circle(arrows)
    assert circle is None, f"modules import each other in a circle: {' -> '.join(circle)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_named_in_its_folder_alone(family):
    own = Path("families") / family
    config = next(
        node.name
        for module in INSIDE
        if module.path == own / "config.py"
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    )
    for module in INSIDE:
        if own in module.path.parents or module.path.as_posix() in NAMES_FAMILIES:
            continue
        advice = (
            "nothing but its folder, families/registry.py and configs/ may name a family: ask "
            "its `Family`, its config or a contract instead"
        )
        for name in module.imports():
            assert not name.startswith(f"families.{family}"), (
                f"{module.path} imports {name}: {advice}"
            )
        # diffusers may call a folder of its pipelines as a family of ours is called.
        parts = {
            id(argument)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Format"
            for argument in node.args[1:2]
        }
        for node in ast.walk(module.tree):
            # Benchmarks' cases are named like configs, variants of losses after families.
            named = module.room in ("suites", "losses") or id(node) in parts
            if isinstance(node, ast.Constant) and not named:
                assert node.value != family, (
                    f"{module.path}:{node.lineno} says {family!r}: {advice}"
                )
            if isinstance(node, ast.Name):
                assert node.id != config, f"{module.path}:{node.lineno} knows {config}: {advice}"


def test_the_tests_above_can_fail():
    assert find_circle([("a", "b"), ("b", "c"), ("c", "b")]) == ["b", "c", "b"]
    assert find_circle([("a", "b"), ("a", "c"), ("b", "c")]) is None
    assert len(room_arrows()) > 20 and {"unet", "dit"} <= set(FAMILIES)
