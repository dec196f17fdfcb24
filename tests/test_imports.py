"""Who may know whom: the imports of every module, read and not run, against the plan of the house."""

import ast

from tests.support import ROOT

# Rooms of lora_limits from the ground up. A room may import itself and the rooms named, no other.
GROUND = {"checks", "linalg", "problem", "problem_checks", "polynomial", "rotary"}
MAY_IMPORT = {
    "checklist": set(),
    "arguments": set(),
    "checks": set(),
    "linalg": set(),
    "polynomial": {"checks", "linalg"},
    "problem_checks": {"checks"},
    "rotary": {"checks", "linalg"},
    "problem": {"checks", "linalg", "problem_checks", "rotary"},
    "coordinates": GROUND,
    "heads": GROUND | {"coordinates"},
    "norms": GROUND | {"coordinates", "heads"},
    "synthetic": GROUND | {"instruments"},
    "method": GROUND,
    "instruments": GROUND,
    "certificate": GROUND | {"coordinates"},
    "estimate": GROUND | {"coordinates"},
    "factors": GROUND | {"coordinates", "estimate", "heads", "method"},
    "gradients": GROUND | {"coordinates", "certificate", "estimate", "factors", "heads", "method"},
    "nn": GROUND | {"coordinates", "factors", "gradients", "heads", "method", "norms"},
    "hardness": GROUND | {"gradients", "method"},
    "training": GROUND | {"gradients", "instruments", "method", "nn"},
    "pilot": GROUND | {"factors", "gradients", "instruments", "method", "nn", "training"},
    "ledger": GROUND | {"gradients", "hardness", "instruments", "method", "norms"},
    "diagnose": GROUND | {"checklist", "factors", "gradients", "instruments", "method", "norms"},
}
NEVER = [
    ("certificate", "estimate"),
    ("estimate", "certificate"),
    ("factors", "gradients"),
    ("gradients", "nn"),
    ("gradients", "hardness"),
    ("gradients", "ledger"),
    ("gradients", "diagnose"),
    *(
        (a, b)
        for a in ("nn", "hardness", "diagnose")
        for b in ("nn", "hardness", "diagnose")
        if a != b
    ),
]
SHARED_BY_EXPERIMENTS = {"attacks", "contenders", "problems", "runner", "training"}
SHARED_BY_FIGURES = {"command", "drawing", "gallery", "numbers"}


def modules(package):
    """{dotted name of a module: its file}, packages under their own names."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path):
    """Dotted names of everything a file imports, wherever in the file; of `from a import b`, a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(name):
    """The folder or module of a package that a dotted name lies in: lora_limits.nn.lora -> nn."""
    return name.split(".")[1] if "." in name else ""


def rooms_of(path, package):
    """Rooms of `package` that a file imports from."""
    prefix = package + "."
    return {room(name) for name in imported(path) if name.startswith(prefix)}


LIBRARY = modules("lora_limits")
EXPERIMENTS = modules("experiments")
FIGURES = modules("paper_figures")
FRONT_DOORS = {"", "_moved", "cli"}  # they open everything, when asked


def test_a_module_of_the_library_imports_lower_rooms_only():
    too_high = {}
    for name, path in LIBRARY.items():
        if room(name) not in FRONT_DOORS:
            wrong = rooms_of(path, "lora_limits") - MAY_IMPORT[room(name)] - {room(name)}
            too_high |= {name: wrong} if wrong else {}
    assert not too_high


def test_no_two_rooms_may_import_each_other_and_the_nevers_hold():
    assert {room(name) for name in LIBRARY} <= MAY_IMPORT.keys() | FRONT_DOORS
    assert not [(a, b) for a in MAY_IMPORT for b in MAY_IMPORT[a] if a in MAY_IMPORT[b]]
    assert not [(a, b) for a, b in NEVER if b in MAY_IMPORT[a]]


def test_the_library_knows_nothing_of_experiments_and_figures():
    upper = ("experiments", "paper_figures", "tests")
    assert not [
        name for name, path in LIBRARY.items() if any(n.startswith(upper) for n in imported(path))
    ]


def test_an_experiment_imports_no_other_no_figure_and_no_ledger():
    wrong = {}
    for name, path in EXPERIMENTS.items():
        others = rooms_of(path, "experiments") - SHARED_BY_EXPERIMENTS - {"Refused", room(name)}
        others |= rooms_of(path, "lora_limits") & {"ledger"} | rooms_of(path, "paper_figures")
        wrong |= {name: others} if others else {}
    assert not wrong


def test_a_figure_imports_no_other():
    wrong = {}
    for name, path in FIGURES.items():
        if room(name) not in SHARED_BY_FIGURES | {"", "__main__"}:
            others = rooms_of(path, "paper_figures") - SHARED_BY_FIGURES
            wrong |= {name: others} if others else {}
    assert not wrong


def test_no_module_has_the_name_of_a_public_function():
    import lora_limits as ll

    functions = {name for name in ll.__all__ if callable(getattr(ll, name))}
    assert not {f"lora_limits.{name}" for name in functions} & LIBRARY.keys()
