"""Promise: one of each. The rules that keep the house small hold for every file as it stands.

Each rule is a function of the tree that returns its violations; a second test breaks every rule
in a tree of two or three files, so that none of them holds because it cannot fail.
"""

import ast
import graphlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch

import tcpa

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "tcpa", "train", "bench")
"""Bottom to top: a layer imports itself and what is below."""
INSIDE_TRAIN = {
    "data": {"engine", "jobs", "demo", "report", "inspect"},
    "engine": {"jobs", "demo", "report", "inspect"},
    "report": {"jobs", "demo"},
}
"""Folder of train -> the folders that it must not import."""
KERNEL_IMPORTS = {"torch", "triton", "numpy", "tcpa"} | sys.stdlib_module_names
OPTIMIZER_STEPS = {
    "train/engine/step.py": "the one step",
    "train/demo/pretrain.py": "the demo's backbone trains all its weights, once",
    "train/jobs/meta_prompt.py": "DAM-VP's meta-training sums gradients over datasets",
    "tcpa/golden.py": "repeats the official code's step, in the library alone",
}
LINES = {"library": 33_500, "tests": 18_100}
"""What there is now: only lower it. Goals: 29,000 and 15,000."""
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 330, 60, 110
LONG_FILES: dict[str, str] = {
    "bench/tune.py": "one command",
    "bench/tune_cases.py": "the candidate launches, most of it data",
    "kernels/launch.py": "a third of it is the launch table",
    "tcpa/methods/tcpa.py": "a method is one file",
    "tcpa/ops.py": "three public operations; half of it is their specification",
    "tcpa/model.py": "all public methods of the model; a third of it is their docstrings",
}
LONG_FUNCTIONS: dict[str, str] = {}
"""Places that may exceed the limits, and why."""
PYTHON_CALLS = 800


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    path: str
    name: str
    nodes: list[ast.AST]
    runtime_nodes: list[ast.AST]
    """Without what is done for type checkers alone."""
    lines: int

    @property
    def layer(self) -> str:
        return self.path.partition("/")[0]

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{node.lineno}"


class House:
    """The Python files below a root."""

    def __init__(self, root: Path) -> None:
        paths = [p for layer in (*LAYERS, "tests") for p in sorted((root / layer).rglob("*.py"))]
        self.modules = [self._read(root, path) for path in paths]
        self.library = [module for module in self.modules if module.layer in LAYERS]
        self.names = {module.name for module in self.modules}

    @staticmethod
    def _read(root: Path, path: Path) -> Module:
        text = path.read_text(encoding="utf-8")
        parts = [*path.relative_to(root).with_suffix("").parts]
        if parts[0] in LAYERS[:1] + LAYERS[2:]:
            parts.insert(0, "tcpa")
        name = ".".join(parts).removesuffix(".__init__")
        tree = ast.parse(text)
        nodes, runtime = list(ast.walk(tree)), list(_walk_without_type_checking(tree))
        return Module(str(path.relative_to(root)), name, nodes, runtime, text.count("\n"))

    def imports(self, module: Module) -> Iterator[tuple[ast.AST, str]]:
        """Yield each import, as a module of this tree where it is one; none for types alone."""
        package = module.name.split(".")
        if not module.path.endswith("__init__.py"):
            package.pop()
        for node in module.runtime_nodes:
            if isinstance(node, ast.Import):
                yield from ((node, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                source = ".".join([*base, *filter(None, [node.module])])
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield node, inner if inner in self.names else source


def _walk_without_type_checking(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        for child in ast.iter_child_nodes(node):
            yield from _walk_without_type_checking(child)


def _nodes(modules: list[Module], *kinds: type) -> Iterator[tuple[Module, ast.AST]]:
    for module in modules:
        yield from ((module, node) for node in module.nodes if isinstance(node, kinds))


def _texts(modules: list[Module]) -> Iterator[tuple[Module, ast.Constant]]:
    for module, node in _nodes(modules, ast.Constant):
        if isinstance(node.value, str):
            yield module, node


def class_names_are_unique(house: House) -> list[str]:
    places = defaultdict(list)
    for module, node in _nodes(house.library, ast.ClassDef):
        places[node.name].append(module.at(node))
    return [f"class {name}: {', '.join(at)}" for name, at in places.items() if len(at) > 1]


def imports_have_no_cycle(house: House) -> list[str]:
    graph = {m.name: {name for _, name in house.imports(m)} & house.names for m in house.modules}
    cycles = []
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            cycle = error.args[1]
            cycles.append(" <- ".join(cycle))
            # Without one of its imports the next search finds the next cycle.
            graph[cycle[1]].discard(cycle[0])
        else:
            return cycles


def imports_point_down(house: House) -> list[str]:
    found = []
    support = {Path(m.path).stem for m in house.modules if m.path.startswith("tests/support/")}
    for module in house.modules:
        rank = LAYERS.index(module.layer) if module.layer in LAYERS else len(LAYERS)
        here = module.path.split("/")[1]
        for node, name in house.imports(module):
            parts = name.split(".")
            top, inner = (
                (parts[1], parts[2:3]) if parts[:1] == ["tcpa"] and parts[1:] else (name, [])
            )
            layer = top if top in LAYERS else parts[0]
            upward = layer in LAYERS[rank + 1 :]
            upward |= rank < len(LAYERS) and layer in {"tests", *support}
            foreign = rank == 0 and parts[0] not in KERNEL_IMPORTS
            forbidden = INSIDE_TRAIN.get(here, set()) if module.layer == layer == "train" else set()
            if upward or foreign or forbidden.intersection(inner):
                found.append(f"{module.at(node)} imports {name}")
    return found


def methods_are_not_told_apart_by_type(house: House) -> list[str]:
    """The base of the configurations may be asked for: that is a check of an argument."""
    methods = [m for m in house.library if m.path.startswith("tcpa/methods/")]
    owned = {n.name for m, n in _nodes(methods, ast.ClassDef) if not m.path.endswith("/base.py")}
    found = []
    others = [module for module in house.library if module not in methods]
    for module, node in _nodes(others, ast.Call, ast.Compare, ast.MatchClass, ast.Dict):
        asked: list[ast.AST] = []
        if isinstance(node, ast.MatchClass):
            asked = [node.cls]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            asked = node.comparators
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = node.args[1:]
        for name in owned & {name for part in asked for name in _names(part)}:
            found.append(f"{module.at(node)} asks for {name}")
    return found


def _names(node: ast.AST) -> set[str]:
    inner = (n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute))
    return {n.id if isinstance(n, ast.Name) else n.attr for n in inner}


def a_method_is_one_file(house: House) -> list[str]:
    """What derives from the base of the methods is defined among them, and says what it is."""
    bases = {
        node.name
        for module, node in _nodes(house.library, ast.ClassDef)
        if module.path == "tcpa/methods/base.py"
    }
    found = [] if bases else ["tcpa/methods/base.py defines no base"]
    for module, node in _nodes(house.library, ast.ClassDef):
        if bases & {name for base in node.bases for name in _names(base)}:
            if not module.path.startswith("tcpa/methods/"):
                found.append(f"{module.at(node)}: {node.name} is a method outside of tcpa/methods")
            elif ast.get_docstring(node) is None:
                found.append(f"{module.at(node)}: {node.name} has no docstring")
    return found


def there_is_one_optimizer_step(house: House) -> list[str]:
    found = []
    for module, node in _nodes(house.library, ast.Call):
        if not isinstance(node.func, ast.Attribute) or module.path in OPTIMIZER_STEPS:
            continue
        owner = ast.unparse(node.func.value)
        # An operation's backward gets a gradient, a loss's does not.
        backward = node.func.attr == "backward" and not node.args and "loss" in owner.lower()
        step = node.func.attr == "step" and re.search("optim|scaler|adam|sgd", owner.lower())
        if backward or step:
            found.append(f"{module.at(node)}: {ast.unparse(node)}")
    return found


def _one_place(what: str, places: dict[str, str]) -> list[str]:
    listed = ", ".join(places.values())
    return [f"{what}: expected one module, got {len(places)}: {listed}"] if len(places) > 1 else []


def there_is_one_writer_of_each(house: House) -> list[str]:
    texts = {
        "HTML document": r"(?i)<!doctype html",
        "Markdown table": r"^-{3,}:?$|\|\s*:?-{3,}",
        "git provenance": r"^git$|\bgit (rev-parse|describe|status)\b",
    }
    calls = {
        "matplotlib style": {"rcParams", "rc_context"},
        "did you mean": {"get_close_matches"},
        "checksum of tensors": {"untyped_storage", "tobytes"},
    }
    places: dict[str, dict[str, str]] = {what: {} for what in (*texts, *calls)}
    for module, node in _texts(house.library):
        for what, pattern in texts.items():
            if re.search(pattern, node.value):
                places[what].setdefault(module.path, module.at(node))
    for module, node in _nodes(house.library, ast.Attribute, ast.alias):
        for what, names in calls.items():
            if (node.attr if isinstance(node, ast.Attribute) else node.name) in names:
                places[what].setdefault(module.path, module.at(node))
    hashing = {m.path for m in house.library if any(n == "hashlib" for _, n in house.imports(m))}
    tensors = places["checksum of tensors"]
    places["checksum of tensors"] = {p: at for p, at in tensors.items() if p in hashing}
    return [line for what, at in places.items() for line in _one_place(what, at)]


def budgets_are_kept(house: House) -> list[str]:
    lines = Counter()
    for module in house.modules:
        lines["library" if module in house.library else "tests"] += module.lines
    return [
        f"{k}: {lines[k]:,} lines, at most {most:,}" for k, most in LINES.items() if lines[k] > most
    ]


def files_and_functions_are_short(house: House) -> list[str]:
    """A function's docstring does not count."""
    found = [
        f"{module.path}: {module.lines} lines, at most {FILE_LINES}"
        for module in house.library
        if module.lines > FILE_LINES and module.path not in LONG_FILES
    ]
    for module, node in _nodes(house.library, ast.FunctionDef):
        first = node.body[1 if ast.get_docstring(node) is not None and node.body[1:] else 0]
        lines = node.end_lineno - first.lineno + 1 + node.body[0].lineno - node.lineno
        most = KERNEL_LINES if module.layer == "kernels" else FUNCTION_LINES
        if lines > most and f"{module.path}:{node.name}" not in LONG_FUNCTIONS:
            found.append(f"{module.at(node)}: {node.name} has {lines} lines, at most {most}")
    return found


RULES = [
    class_names_are_unique,
    imports_have_no_cycle,
    imports_point_down,
    methods_are_not_told_apart_by_type,
    a_method_is_one_file,
    there_is_one_optimizer_step,
    there_is_one_writer_of_each,
    budgets_are_kept,
    files_and_functions_are_short,
]


@pytest.fixture(scope="module")
def house():
    return House(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, house):
    found = rule(house)
    assert not found, f"{len(found)} places:\n" + "\n".join(found)


METHOD = {
    "tcpa/methods/base.py": "class Method: ...",
    "tcpa/methods/vp.py": 'from .base import Method\nclass VP(Method):\n    """A frame."""',
}
LONG = "def f():\n" + "    x = 1\n" * 120


def asked(text, line=1):
    expected = f"train/a.py:{line} asks for VP"
    return methods_are_not_told_apart_by_type, {"train/a.py": text}, expected


def written_twice(text, what):
    return there_is_one_writer_of_each, dict.fromkeys(("bench/a.py", "train/b.py"), text), what


BROKEN = [
    (class_names_are_unique, {"tcpa/a.py": "class A: ...", "bench/b.py": "class A: ..."}, "b.py:1"),
    (
        imports_have_no_cycle,
        {"tcpa/a.py": "import tcpa.b", "tcpa/b.py": "def f():\n import tcpa.a"},
        "a",
    ),
    (imports_point_down, {"kernels/a.py": "import timm"}, "kernels/a.py:1 imports timm"),
    (imports_point_down, {"kernels/a.py": "from ..ops import x", "tcpa/ops.py": ""}, "tcpa.ops"),
    (imports_point_down, {"tcpa/a.py": "from .train import b", "train/b.py": ""}, "tcpa/a.py:1"),
    (imports_point_down, {"train/a.py": "def f():\n import tcpa.bench.b"}, "train/a.py:2"),
    (imports_point_down, {"train/engine/a.py": "from ..report import b"}, "train/engine/a.py:1"),
    (imports_point_down, {"bench/a.py": "import trees", "tests/support/trees.py": ""}, "a.py:1"),
    asked("isinstance(x, (int, m.VP))"),
    asked("type(x) is VP"),
    asked("{VP: 1}[type(x)]"),
    asked("match x:\n case VP(): ...", line=2),
    (a_method_is_one_file, {"tcpa/a.py": "class A(Method):\n 'Text.'"}, "a.py:1: A"),
    (a_method_is_one_file, {"tcpa/methods/a.py": "class A(Method): ..."}, "A has no docstring"),
    (there_is_one_optimizer_step, {"bench/a.py": "scale(loss).backward()"}, "bench/a.py:1"),
    (there_is_one_optimizer_step, {"bench/a.py": "self._optimizer.step()"}, "bench/a.py:1"),
    written_twice("f'<!DOCTYPE html>{x}'", "HTML"),
    written_twice("x = '| --- | ---: |'", "Markdown"),
    written_twice("run(['git', 'log'])", "git"),
    written_twice("with matplotlib.rc_context(): ...", "style"),
    written_twice("from difflib import get_close_matches", "did you mean"),
    written_twice("import hashlib\nx.tobytes()", "tensors"),
    (budgets_are_kept, {"tcpa/a.py": "\n" * (LINES["library"] + 1)}, "library: "),
    (budgets_are_kept, {"tests/a.py": "\n" * (LINES["tests"] + 1)}, "tests: "),
    (files_and_functions_are_short, {"tcpa/a.py": "\n" * (FILE_LINES + 1)}, "tcpa/a.py: "),
    (files_and_functions_are_short, {"tcpa/a.py": LONG}, "a.py:1: f has 121 lines, at most 60"),
    (files_and_functions_are_short, {"kernels/a.py": LONG}, "at most 110"),
]


def write_house(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return House(root)


@pytest.mark.parametrize(
    ("rule", "files", "expected"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_rule_can_fail(rule, files, expected, tmp_path):
    assert rule(write_house(tmp_path, METHOD)) == []
    assert expected in "\n".join(rule(write_house(tmp_path, files)))


def test_imports_for_types_alone_are_free(tmp_path):
    text = "if TYPE_CHECKING:\n    from ..train import config\n"
    assert imports_point_down(write_house(tmp_path, {"kernels/a.py": text})) == []


def test_python_calls_of_a_forward_pass():
    """The project's own functions, comprehensions and generators included, after a first pass."""
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=12, num_heads=3, num_classes=5
    )
    model = tcpa.wrap(vit, tcpa.TCPAConfig.official("cub")).eval()
    folders = tuple(f"{ROOT / layer}/" for layer in LAYERS)
    called = Counter()

    def count(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            called[frame.f_code.co_qualname] += 1

    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        sys.setprofile(count)
        try:
            model(torch.randn(2, 3, 32, 32))
        finally:
            sys.setprofile(None)
    # A count that misses the blocks would be small, too.
    assert called.total() > 10 * len(vit.blocks)
    assert called.total() <= PYTHON_CALLS, f"{called.total()}: {called.most_common(20)}"


def test_what_the_library_allocates_is_poisoned():
    """By the fixture of conftest.py."""
    library = {"torch": torch, "x": torch.zeros(3), "__name__": "tcpa.kernels.some"}
    for call in ("torch.empty(9)", "torch.empty_like(x)", "x.new_empty(9)"):
        assert eval(f"{call}.isnan().all()", library), call
    assert eval("torch.empty(9, dtype=torch.int32).min()", library) == 2**31 - 1
