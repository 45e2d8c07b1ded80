"""The house rules that a machine can check, on the package as it stands."""

import ast
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

import omnifm
from omnifm import config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "omnifm"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LONGEST_FILE = 400
LONGEST_FUNCTION = 60

BLOCK_NETWORK = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"network call while importing: {event} {args}")
sys.addaudithook(refuse)
"""


def sources(*folders: str) -> list[Path]:
    """Python files of the given folders of the repository that git could hold."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "environments" not in path.parts)


def package_tree() -> Iterator[tuple[str, ast.Module]]:
    """Each file of the package, parsed, with its path for messages."""
    for path in sources("omnifm"):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call in `tree` with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules that `tree` imports (`from a import b` gives `a` and `a.b`), with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for keyword `name`, or None."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


# Each finder names offences in one parsed file; the cases below it show that it can.


def draws_outside_seeds(tree: ast.AST) -> list[int]:
    of_torch = r"torch(\.cuda|\.random)?\.(manual_seed|seed|manual_seed_all)"
    of_numpy = r"((np|numpy)\.random\.)(?!Generator$)\w+|default_rng"
    lines = [call.lineno for name, call in calls(tree) if re.fullmatch(f"{of_torch}|{of_numpy}", name)]
    return lines + [line for module, line in imported(tree) if module in {"random", "secrets"}]


def unsafe_loads(tree: ast.AST) -> list[int]:
    picklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    lines = [line for module, line in imported(tree) if module.split(".")[0] in picklers]
    for name, call in calls(tree):
        lines += [call.lineno] if name == "torch.load" and keyword(call, "weights_only") is not True else []
        lines += [call.lineno] if name in {"np.load", "numpy.load"} and keyword(call, "allow_pickle") is not False else []
        lines += [call.lineno] if name in {"eval", "exec"} else []
    return lines


def loose_habits(tree: ast.AST) -> list[int]:
    lines = [call.lineno for name, call in calls(tree) if name == "hasattr"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Global) or (isinstance(node, ast.ExceptHandler) and node.type is None):
            lines.append(node.lineno)
        elif dotted(node) == "sys.path":
            lines.append(node.lineno)  # type: ignore[attr-defined]
    return lines


def long_functions(tree: ast.AST) -> list[int]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.lineno for f in functions if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION]


def concrete_tasks(tree: ast.AST) -> list[int]:
    return [line for module, line in imported(tree) if re.match(r"omnifm\.tasks\.(?!base\b)", module)]


@pytest.mark.parametrize(
    ("finder", "bad", "good"),
    [
        (draws_outside_seeds, "torch.manual_seed(0)", "generator(0, 'a')"),
        (draws_outside_seeds, "np.random.default_rng(0)", "def f(g: np.random.Generator): ..."),
        (draws_outside_seeds, "np.random.rand(3)", "rng.random(3)"),
        (draws_outside_seeds, "import random", "from omnifm import seeds"),
        (unsafe_loads, "import pickle", "import json"),
        (unsafe_loads, "torch.load(p)", "torch.load(p, weights_only=True)"),
        (unsafe_loads, "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=False)"),
        (concrete_tasks, "from omnifm.tasks import vqa", "from omnifm.tasks import base"),
        (concrete_tasks, "import omnifm.tasks.vqa", "from omnifm.tasks.base import Task"),
        (loose_habits, "try: f()\nexcept: pass", "try: f()\nexcept OSError: pass"),
        (loose_habits, "import sys\nsys.path.append('x')", "import sys\nsys.exit(0)"),
        (loose_habits, "hasattr(a, 'b')", "isinstance(a, B)"),
        (long_functions, "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION, "def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)),
    ],
)
def test_the_finders_find(finder: Callable[[ast.AST], list[int]], bad: str, good: str) -> None:
    assert finder(ast.parse(bad)) != []
    assert finder(ast.parse(good)) == []


def offences(finder: Callable[[ast.AST], list[int]], *exempt: str) -> list[str]:
    return [f"{path}:{line}" for path, tree in package_tree() if path not in exempt for line in finder(tree)]


def test_randomness_comes_from_seeds_alone() -> None:
    assert offences(draws_outside_seeds, "omnifm/seeds.py") == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert offences(unsafe_loads) == []


def test_no_hasattr_global_bare_except_or_sys_path() -> None:
    assert offences(loose_habits) == []


def test_functions_are_short() -> None:
    assert offences(long_functions) == []


def test_files_are_short() -> None:
    files = sources("omnifm", "tests", "benchmarks")
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_every_folder_of_code_is_a_package() -> None:
    # The import contract sees packages only: a folder without __init__.py would escape it.
    assert [str(p.relative_to(ROOT)) for p in {s.parent for s in sources("omnifm")} if not (p / "__init__.py").exists()] == []


def test_the_federation_knows_tasks_by_their_base_alone() -> None:
    # The import contract lists the tasks there are; this one covers those to come.
    federation = [(path, tree) for path, tree in package_tree() if path.startswith("omnifm/federation/")]
    assert federation
    assert [f"{path}:{line}" for path, tree in federation for line in concrete_tasks(tree)] == []


def test_code_holds_no_unfinished_marks_or_paths_of_one_machine() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|(?<![\w.])/(work|root|home|opt)/\w")
    texts = [*sources("omnifm", "benchmarks"), *(ROOT / "configs").glob("*.toml"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    found = [f"{p.relative_to(ROOT)}: {m.group()}" for p in texts for m in marks.finditer(p.read_text(encoding="utf-8"))]
    assert found == []


def test_installing_names_no_registry() -> None:
    files = [ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "pyproject.toml", *(ROOT / "requirements").iterdir()]
    host = re.compile(r"https?://|index-url|find-links|--trusted-host")
    assert [p.name for p in files if host.search(p.read_text(encoding="utf-8"))] == []


def test_torchvision_is_not_installed() -> None:
    # Beside this torch it cannot be imported, and then MONAI and torchmetrics fail to import too.
    assert importlib.util.find_spec("torchvision") is None


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_lock_pins_a_version_inside_every_range() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [Requirement(text) for group in (PROJECT["project"]["dependencies"], *extras) for text in group]
    locked = pins()
    assert [str(r) for r in wanted if not r.specifier.contains(locked.get(canonicalize_name(r.name), ""), prereleases=True)] == []


def test_the_makefile_installs_the_locked_torch() -> None:
    version = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None and version.group(1) == pins()["torch"]


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE)) == set(re.findall(r"^  make (\S+)", shown, re.MULTILINE))


def test_changelog_names_the_version() -> None:
    assert f"[{omnifm.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_apache() -> None:
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["project"]["license"] == "Apache-2.0"


def documented_defaults(section: type[BaseModel]) -> dict[str, str]:
    shown: dict[str, str] = {}
    for key, field in section.model_fields.items():
        required = field.is_required() or field.default == ()
        shown[key] = "required" if required else "unset" if field.default is None else f"`{json.dumps(field.default)}`"
    return shown


@pytest.mark.parametrize(
    ("title", "section"),
    [
        ("federation", config.FederationConfig),
        ("federation.cohorts", config.CohortConfig),
        ("data", config.DataConfig),
        ("model", config.ModelConfig),
        ("optimiser", config.OptimiserConfig),
        ("engine", config.EngineConfig),
        ("security", config.SecurityConfig),
        ("privacy", config.PrivacyConfig),
        ("compression", config.CompressionConfig),
    ],
)
def test_the_docs_give_each_config_key_with_its_default(title: str, section: type[BaseModel]) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (`[^`]*`|unset|required) \|", table, re.MULTILINE))
    assert rows == documented_defaults(section)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_each_config_opens_with_command_cost_and_expected_result(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    missing = [word for word in ("omnifm ", "cost", "expect") if word not in head.lower()]
    assert missing == [], f"{path.name} is a draft: its head says nothing of {missing}"


def test_the_command_starts_without_torch_and_is_callable() -> None:
    module, function = PROJECT["project"]["scripts"]["omnifm"].split(":")
    heavy = "{'torch', 'monai', 'plotly', 'sklearn', 'nilearn', 'scipy', 'pandas'} & set(sys.modules)"
    done = run_python(f"import sys\nfrom {module} import {function}\nassert callable({function})\nassert not {heavy}, {heavy}")
    assert done.returncode == 0, done.stderr


def test_importing_everything_touches_no_network_and_warns_of_nothing() -> None:
    files = [path.relative_to(ROOT).with_suffix("") for path in sources("omnifm") if path.stem != "__main__"]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in files]
    if importlib.util.find_spec("flwr") is None:
        modules.remove("omnifm.engines.flower")
    assert modules
    done = run_python(f"{BLOCK_NETWORK}\nimport importlib\nfor name in {modules!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_the_network_block_blocks() -> None:
    done = run_python(f"{BLOCK_NETWORK}\nimport socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)")
    assert "network call while importing" in done.stderr


def test_flower_is_imported_in_one_file() -> None:
    pattern = re.compile(r"^\s*(import|from) flwr\b", re.MULTILINE)
    assert [p.name for p in sources("omnifm") if pattern.search(p.read_text(encoding="utf-8"))] == ["flower.py"]
