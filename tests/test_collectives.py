"""No process may skip a call that all processes must make: such a run hangs.

The source is searched for collectives that depend on the number of the process.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffalign"
COLLECTIVES = {
    *("gather", "gather_object", "gather_for_metrics", "reduce", "broadcast", "scatter"),
    *("broadcast_object_list", "scatter_object_list", "wait_for_everyone", "barrier", "wait"),
    *("full_tensor", "whole", "save_state", "load_state", "check_trigger", "_shared"),
    *("clip_grad_norm_", "get_state_dict", "all_reduce", "all_gather", "shared_best_step"),
    *("save_optimizer", "load_optimizer", "lora_state"),
}
RANKS = {"is_main_process", "is_local_main_process", "process_index", "process_rank", "main"}
RANKS |= {"rank", "alone"}
ALLOWED = {
    # Its own group of futures, subprocesses or scorers, and not of processes.
    ("diffalign/cli/exit_codes.py", "wait"),
}


def names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


def is_rank_condition(test: ast.expr) -> bool:
    return bool(names(test) & RANKS)


def called(node: ast.AST) -> list[tuple[int, str]]:
    calls = []
    for n in ast.walk(node):
        if isinstance(n, ast.Call):
            function = n.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in COLLECTIVES:
                calls.append((n.lineno, name))
    return calls


def ends(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], (ast.Return, ast.Continue, ast.Break))


def guarded(body: list[ast.stmt]) -> list[tuple[int, str]]:
    """Collectives that a condition on the process decides, with their lines."""
    calls: list[tuple[int, str]] = []
    for place, statement in enumerate(body):
        if isinstance(statement, ast.If) and is_rank_condition(statement.test):
            for inner in [*statement.body, *statement.orelse]:
                calls += called(inner)
            if ends(statement.body) and not statement.orelse:
                for later in body[place + 1 :]:
                    calls += called(later)
                break
        for inner in expressions(statement):
            if isinstance(inner, ast.IfExp) and is_rank_condition(inner.test):
                calls += called(inner.body) + called(inner.orelse)
            if isinstance(inner, ast.BoolOp) and is_rank_condition(inner.values[0]):
                for value in inner.values[1:]:
                    calls += called(value)
        for field in ("body", "orelse", "finalbody"):
            nested = getattr(statement, field, None)
            if isinstance(nested, list):
                calls += guarded(nested)
        for handler in getattr(statement, "handlers", []):
            calls += guarded(handler.body)
    return calls


def expressions(statement: ast.stmt) -> list[ast.AST]:
    """Expressions of a statement, without those of the statements inside it."""
    found: list[ast.AST] = []
    for _, value in ast.iter_fields(statement):
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.expr):
                found += list(ast.walk(node))
    return found


def offences(source: str) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return sorted({call for function in functions for call in guarded(function.body)})


def test_no_collective_depends_on_the_process() -> None:
    hangs = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = str(path.relative_to(PACKAGE.parent))
        for line, name in offences(path.read_text("utf-8")):
            if (place, name) not in ALLOWED:
                hangs.append(f"{place}:{line} {name}")
    assert not hangs, hangs


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(a):\n    if a.is_main_process:\n        a.gather(1)", 1),
        ("def f(a):\n    a.gather(1)\n    if a.is_main_process:\n        print(1)", 0),
        ("def f(a, rank):\n    if rank > 0:\n        return\n    a.wait_for_everyone()", 1),
        ("def f(a, rank):\n    return a.reduce(1) if rank == 0 else 0", 1),
        ("def f(a, rank):\n    return rank == 0 and a.reduce(1)", 1),
        (
            "def f(a, rank):\n  for i in a:\n    if rank:\n      continue\n    a.barrier()",
            1,
        ),
        (
            "def f(a, rank):\n  with a:\n    if rank:\n      pass\n    a.barrier()",
            0,
        ),
        ("def f(a, rank):\n    x = a.gather(1 if rank else 2)", 0),
    ],
)
def test_the_search_finds_what_hangs(source: str, count: int) -> None:
    assert len(offences(source)) == count
