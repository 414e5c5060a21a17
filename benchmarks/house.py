"""How easily an idea is found in this code: `python benchmarks/house.py` counts what `tests/test_layout.py` holds.

Everything is read from the files' syntax trees and from no import, so that the figures are the same on every machine.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "teachers", "students", "distill")  # each imports only those to its left
# Rooms and files of `distill/` from the ground up: one imports none of a floor above its own; the rest is on the top
FLOORS = (
    ("config",),
    ("objective",),
    ("training",),
    ("demo", "teacher", "student"),
    ("caching", "evaluation"),
)
MOST_FILES = 14  # in a folder
RESULTS = ROOT / "benchmarks" / "results"  # one of each benchmark's name, as many as there are
MOST_ARGUMENTS = 10  # of a function or a constructor
MOST_LINES = 40  # of a function, its docstring apart
PLACES = {  # by idea: the calls that only its home makes
    "atomic write": {"os.replace", "os.rename", "os.link", ".rename", "shutil.move"},
    "hash of a file": {"hashlib.file_digest"},
    "lock": {"fcntl.flock", "fcntl.lockf"},
}
READERS = ("read", "read_bytes", "readinto")  # a function that reads and hashes hashes a file

BRITISH = re.compile(
    r"\b\w*(?:quanti|normali|tokeni|initiali|seriali|optimi|minimi|maximi|recogni|summari|organi|synchroni|"
    r"randomi|speciali|regulari|generali|characteri|prioriti)s(?:e|es|ed|er|ers|ing|ation|ations)\b"
    r"|\b\w*(?:behaviour|colour|favour|neighbour|catalogue|licence|artefact|judgement)\w*",
    re.IGNORECASE,
)


def python_files(*folders: str) -> list[Path]:
    """The Python files of some folders of the repository, all of its packages where none is named."""
    return sorted(path for folder in folders or PACKAGES for path in (ROOT / folder).rglob("*.py"))


@cache
def parse(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(path: Path) -> str:
    """A file as the repository names it."""
    return str(path.relative_to(ROOT))


def count_files() -> dict[str, int]:
    """By folder of the packages, the tests, the benchmarks and the documents: how many files lie in it."""
    counts: dict[str, int] = defaultdict(int)
    for folder in (*PACKAGES, "tests", "benchmarks", "docs", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.parent != RESULTS:
                counts[place_of(path.parent)] += 1
    return dict(counts)


def functions_of(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of a file with the name by which it is found."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}.{child.name}" if hasattr(child, "name") and prefix else getattr(child, "name", prefix)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, child
            yield from walk(child, name if isinstance(child, ast.ClassDef | ast.FunctionDef) else prefix)

    yield from walk(parse(path), "")


def count_arguments(function: ast.FunctionDef) -> int:
    """The arguments of a function that a caller may give, `self` and `cls` apart."""
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def find_long_signatures() -> dict[str, int]:
    """Functions and constructors of more than `MOST_ARGUMENTS` arguments."""
    return {f"{place_of(path)}::{name}": number for path in python_files() for name, function in functions_of(path)
            if (number := count_arguments(function)) > MOST_ARGUMENTS}  # fmt: skip


def find_wide_records() -> dict[str, int]:
    """Dataclasses and named tuples of more than `MOST_ARGUMENTS` fields: their constructors are written by nobody.

    They are counted apart: what a config, a manifest or a file says field by field cannot be made shorter by a cut.
    """
    wide = {}
    for path in python_files():
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ClassDef):
                continue
            makers = " ".join(map(ast.unparse, (*node.decorator_list, *node.bases)))
            fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and "ClassVar" not in ast.unparse(f)]
            if re.search(r"\b(dataclass|NamedTuple)\b", makers) and len(fields) > MOST_ARGUMENTS:
                wide[f"{place_of(path)}::{node.name}"] = len(fields)
    return wide


def find_british_words() -> list[str]:
    """Words of the packages and documents that are spelled as in Britain, where this code spells as in America.

    Not `labelled`: configs, caches and manifests' users have written that word.
    """
    texts = [*python_files(), *ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [f"{place_of(path)}: {word}" for path in texts for word in BRITISH.findall(path.read_text())]


def count_lines(function: ast.FunctionDef) -> int:
    """The lines of a function without its docstring and decorators."""
    first = function.body[0]
    is_said = ast.get_docstring(function, clean=False) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if is_said else 0)


def find_long_functions() -> dict[str, int]:
    """Functions of more than `MOST_LINES` lines."""
    return {f"{place_of(path)}::{name}": lines for path in python_files() for name, function in functions_of(path)
            if (lines := count_lines(function)) > MOST_LINES}  # fmt: skip


def measure_docstrings() -> tuple[int, int]:
    """How many public modules, classes and functions have a docstring, of how many."""
    said = total = 0
    for path in python_files():
        tree = parse(path)
        named = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))]
        named = [node for node in named if not getattr(node, "name", "").startswith("_")]
        if path.name == "__init__.py" and not tree.body:
            continue
        total += len(named)
        said += sum(ast.get_docstring(node) is not None for node in named)
    return said, total


def find_cut_sentences() -> list[str]:
    """Arguments whose docstring begins in the middle of a sentence: `folder: of the run`."""
    pattern = re.compile(r"(?m)^ {8}(\w+): of ")
    return [f"{place_of(path)}: {name}" for path in python_files() for name in pattern.findall(path.read_text())]


def imported_names(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules that a file names: at its top, inside a function, and as a string that is a module's whole name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & modules) or {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            names.add(node.value.partition(":")[0])
    return names & modules


def import_graph() -> dict[str, set[str]]:
    """By module of the packages: those it imports, in whatever way."""
    files = {module_name(path): path for path in python_files()}
    return {name: imported_names(parse(path), set(files)) - {name} for name, path in files.items()}


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which is reached from each other one (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                circles.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return circles


def find_climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports in `distill/` of a higher floor than its own.

    On the ground is what imports nothing of `distill` but the ground: names and formulas that a config has its choices
    from.
    """
    height = {f"distill.{room}": number for number, floor in enumerate(FLOORS) for room in floor}

    @cache
    def is_ground(name: str) -> bool:
        return all(is_ground(other) for other in graph[name] if other.startswith("distill"))

    def floor_of(name: str) -> int:
        room = ".".join(name.split(".")[:2])
        return height.get(room, len(FLOORS)) if name.startswith("distill.") and not is_ground(name) else -1

    return [f"{name} → {other}" for name, others in sorted(graph.items()) if floor_of(name) >= 0
            for other in sorted(others) if floor_of(other) > floor_of(name)]  # fmt: skip


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name and its attributes; nothing of what else an expression may be."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def called_names(function: ast.AST) -> set[str]:
    """Dotted names of what a piece of code calls; of a method of whatever object, `.name`."""
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {dotted(call) for call in calls} | {f".{call.attr}" for call in calls if isinstance(call, ast.Attribute)}


def find_homes() -> dict[str, list[str]]:
    """By idea of `PLACES`: the files in which its work is done."""
    homes: dict[str, set[str]] = {idea: set() for idea in PLACES}
    for path in python_files():
        for idea, calls in PLACES.items():
            if called_names(parse(path)) & calls:
                homes[idea].add(place_of(path))
        for _, function in functions_of(path):
            called = called_names(function)
            makes_digest = any(name.startswith("hashlib.") for name in called)
            if makes_digest and called & {f".{reader}" for reader in READERS}:
                homes["hash of a file"].add(place_of(path))
    return {idea: sorted(places) for idea, places in homes.items()}


def list_config_fields() -> list[str]:
    """The dotted names of all fields of a config, from the classes' own text."""
    trees = [parse(path) for path in python_files()]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}

    def fields_of(name: str) -> list[ast.AnnAssign]:
        return [node for node in classes[name].body if isinstance(node, ast.AnnAssign)]

    names = []
    for outer in fields_of("Config"):
        kind = ast.unparse(outer.annotation)
        is_section = kind in classes
        names += [f"{outer.target.id}.{f.target.id}" for f in fields_of(kind)] if is_section else [outer.target.id]
    return names


def texts_that_use_fields() -> dict[str, str]:
    """Recipes, documents and benchmarks by place; not the reference, which is made from the fields."""
    patterns = ("configs/*.yaml", "configs/mixtures/*.yaml", "docs/*.md", "README.md", "benchmarks/**/*.py", "Makefile")
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return {place_of(path): path.read_text() for path in paths if path.name not in ("reference.md", "house.py")}


def mentions(text: str, field: str) -> bool:
    """Whether a text names a field: whole, in its section of YAML, or as an argument of its section's class."""
    section, _, name = field.rpartition(".")
    if not section:
        return bool(re.search(rf"(?m)^{name}:|\b{name}=|`{name}`", text))
    if re.search(rf"\b{section}\.{name}\b", text) or re.search(rf"\b{section}\.\{{[^}}]*\b{name}\b", text):
        return True
    class_name = "".join(word.title() for word in section.split("_"))
    in_python = re.search(rf"\b{class_name}(?:Config)?\([^)]*\b{name}=", text)
    blocks = re.findall(rf"(?m)^( *){section}:[ \t]*(?:#.*)?\n((?:\1 +\S.*\n| *#.*\n| *\n)*)", text)
    inline = re.findall(rf"(?m)^\s*{section}: *\{{(.*?)\}}", text)
    bodies = [body for _, body in blocks] + inline
    return bool(in_python) or any(re.search(rf"\b{name}:", body) for body in bodies)


def find_unused_fields() -> list[str]:
    """Config fields that no recipe, document or benchmark names."""
    texts = texts_that_use_fields().values()
    return [field for field in list_config_fields() if not any(mentions(text, field) for text in texts)]


def count_edits() -> dict[str, int]:
    """By kind of part, the entries that the test of a toy one of it puts into dicts of ours: the lines it takes."""
    edits = {}
    paths = [path for path in python_files("tests") if "def test_a_toy_" in path.read_text()]
    for path in paths:
        for name, function in functions_of(path):
            if match := re.fullmatch(r"test_a_toy_(\w+?)_is_one_line\w*", name):
                calls = [dotted(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
                edits[match[1]] = sum(call.startswith("monkeypatch.set") for call in calls)
    return edits


def main() -> None:
    """Count everything and write the table."""
    from record import write_result

    files, graph = count_files(), import_graph()
    said, total = measure_docstrings()
    homes, edits = find_homes(), count_edits()
    most = max(files, key=files.get)
    num_functions = sum(1 for path in python_files() for _ in functions_of(path))
    found = {
        f"folders of more than {MOST_FILES} files": [f"{n}: {c}" for n, c in files.items() if c > MOST_FILES],
        f"signatures of more than {MOST_ARGUMENTS} arguments": [f"{n}: {c}" for n, c in find_long_signatures().items()],
        f"dataclasses of more than {MOST_ARGUMENTS} fields": [f"{n}: {c}" for n, c in find_wide_records().items()],
        "modules in circles": [" ↔ ".join(circle) for circle in find_circles(graph)],
        "imports that climb a floor of distill/": find_climbs(graph),
        **{f"homes of: {idea}": places for idea, places in homes.items()},
        "config fields that nothing uses": find_unused_fields(),
        "words in British spelling": find_british_words(),
        "arguments whose docstring begins with `of`": find_cut_sentences(),
        f"functions of more than {MOST_LINES} lines, docstring apart": list(find_long_functions()),
    }
    lines = ["| counted | number | which |", "|---|---:|---|"]
    lines += [f"| {name} | {len(which)} | {', '.join(which)} |" for name, which in found.items()]
    lines += [f"| lines that a further {kind} takes, beside its file | {n} | |" for kind, n in edits.items()]
    lines += [f"| docstrings of public names | {said} of {total} | |",
              f"| files in the fullest folder | {files[most]} | {most} |",
              f"| functions | {num_functions} | |"]  # fmt: skip
    figures = {"found": found, "edits": edits, "docstrings": [said, total], "files": files, "functions": num_functions}
    write_result("house", figures, "\n".join(lines))


if __name__ == "__main__":
    main()
