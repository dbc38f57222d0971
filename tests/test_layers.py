"""No circle of files, also counting imports inside functions and for type checkers.

`lint-imports` checks that a room imports only rooms below it.
"""

from __future__ import annotations

from graphlib import TopologicalSorter

import grimp


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph("diffalign", cache_dir=None)
    imports = {
        module: graph.find_modules_directly_imported_by(module) - {module}
        for module in graph.modules
    }
    order = list(TopologicalSorter(imports).static_order())  # a CycleError names the circle
    assert len(order) == len(graph.modules) > 150
