"""Write and print the results of `diffalign score`.

They are the table of scores, what is missing and why, and a summary of every column.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Hashable
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..rewards.agreement import LARGEST_COMPARED, group_members
from ..rewards.panel_file import TABLE_COLUMNS
from ..runtime.files import write_atomically
from .score_parts import Table

if TYPE_CHECKING:
    from ..rewards.panel import Combined, Panel
    from .score_source import DatasetSource, FolderSource, Record


def write_report(
    table: Table,
    panel: Panel,
    source: FolderSource | DatasetSource,
    folder: Path,
    *,
    combine_asked: bool,
) -> str:
    """Write `scores.parquet`, `errors.jsonl` and `summary.json`.

    The column `combined` is there when it was asked for, or when some prompt has
    several images. The images of one row of a pair or ranked dataset are compared, else
    the images of one prompt.

    Args:
        table (`Table`): The scores.
        panel (`Panel`): The scorers.
        source (`FolderSource` or `DatasetSource`): What was scored.
        folder (`Path`): Where the files go.
        combine_asked (`bool`): Whether `combined` was asked for.

    Returns:
        `str`: The summary to print.
    """
    groups = [_group_of(i, record, source.kind) for i, record in enumerate(table.records)]
    largest = max(map(len, group_members(groups)))
    combined = None
    if combine_asked or (panel.train_names and 1 < largest <= LARGEST_COMPARED):
        combined = panel.combine(table.columns, groups)
    better, worse = _labelled_pairs(table.records)
    summary: dict[str, Any] = {
        "source": source.name,
        "kind": source.kind,
        "rows": source.rows,
        "images": len(table.records),
        "groups": len(set(groups)),
        "skipped_rows": [list(row) for row in source.skipped],  # the first 20
        "skipped": source.skipped_count,
        "scorers": {},
    }
    for entry in panel.entries:
        spec = panel.specs[entry.name]
        values = np.asarray(table.columns[entry.name], dtype=np.float64)
        facts: dict[str, Any] = {
            "scorer": spec.key,
            "version": spec.version,
            "fingerprint": table.fingerprints[entry.name],
        }
        facts |= {
            "role": entry.role,
            "weight": entry.weight,
            "higher_is_better": spec.higher_is_better,
        }
        sign = 1 if spec.higher_is_better else -1
        summary["scorers"][entry.name] = (
            facts | _statistics(values) | _against_labels(sign * values, better, worse)
        )
    if combined is not None:
        values = combined.values.double().numpy()
        rule = {
            "method": panel.combine_config.method,
            "missing_policy": panel.combine_config.missing,
            "center": panel.combine_config.center,
        }
        summary["combined"] = rule | _statistics(values) | _against_labels(values, better, worse)
        if len(panel.names) > 1:
            summary["agreement"] = {
                k: v for k, v in combined.agreement.items() if k != "kendalls_w_per_group"
            }
    _write_errors(table, source, folder / "errors.jsonl")
    _write_scores(table, combined, folder / "scores.parquet")
    write_atomically(
        folder / "summary.json", (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode()
    )
    return _text(summary, folder)


def _group_of(i: int, record: Record, kind: str) -> Hashable:
    if kind in ("pair", "ranked"):
        return ("row", record.row)
    return ("image", i) if record.prompt is None else ("prompt", record.prompt)


def _labelled_pairs(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of (better, worse) images of one row, as people judged."""
    pairs = []
    for members in group_members([record.row for record in records]):
        for i, j in permutations(members, 2):
            first, second = records[i].label, records[j].label
            if first is not None and second is not None and first > second:
                pairs.append((i, j))
    indices = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return indices[:, 0], indices[:, 1]


def _statistics(values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    facts: dict[str, Any] = {"n": len(known), "missing": len(values) - len(known)}
    for name, function in (
        ("mean", np.mean),
        ("std", np.std),
        ("min", np.min),
        ("median", np.median),
        ("max", np.max),
    ):
        facts[name] = float(function(known)) if len(known) else None
    return facts


def _against_labels(values: np.ndarray, better: np.ndarray, worse: np.ndarray) -> dict[str, Any]:
    """Count how often the image that people preferred scores higher.

    Equal scores count one half.
    """
    if not len(better):
        return {}
    margins = values[better] - values[worse]
    margins = margins[~np.isnan(margins)]
    share = float(((margins > 0) + 0.5 * (margins == 0)).mean()) if len(margins) else None
    return {
        "agrees_with_labels": share,
        "labelled_pairs": len(margins),
        "equal_scores": int((margins == 0).sum()),
    }


def _write_errors(table: Table, source: FolderSource | DatasetSource, path: Path) -> None:
    lines = [{"row": row, "error": reason} for row, reason in source.skipped]
    for name, errors in table.errors.items():
        for i, sentence in sorted(errors.items()):
            record = table.records[i]
            lines.append(
                {
                    "scorer": name,
                    "image": record.image,
                    "row": record.row,
                    "position": record.position,
                    "error": sentence,
                }
            )
    write_atomically(
        path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    )


def _write_scores(table: Table, combined: Combined | None, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[str | int | None]] = {
        name: [getattr(record, name) for record in table.records] for name in TABLE_COLUMNS[:-1]
    }
    types = {"row": pa.int64(), "position": pa.int32()}
    arrays = {
        name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()
    }
    scores = {
        **table.columns,
        **({} if combined is None else {"combined": combined.values.tolist()}),
    }
    for name, values in scores.items():
        arrays[name] = pa.array(
            [None if math.isnan(value) else value for value in values], pa.float32()
        )
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer)
    write_atomically(path, buffer.getvalue())


def _text(summary: dict[str, Any], folder: Path) -> str:
    statistics = ("n", "missing", "mean", "std", "min", "median", "max")
    facts = {
        **summary["scorers"],
        **({"combined": summary["combined"]} if "combined" in summary else {}),
    }
    labelled = any("agrees_with_labels" in row for row in facts.values())
    label = "chosen>rejected" if summary["kind"] == "pair" else "with labels"
    rows = [["scorer", *statistics, *([label] if labelled else [])]]
    for name, row in facts.items():
        share = row.get("agrees_with_labels")
        rows.append(
            [
                name,
                *(_number(row[key]) for key in statistics),
                *(["-" if share is None else f"{share:.1%}"] if labelled else []),
            ]
        )
    text = [
        f"{summary['images']} images in {summary['groups']} groups of {summary['source']} "
        f"({summary['kind']})",
        _aligned(rows),
    ]
    agreement = summary.get("agreement")
    if agreement is not None:
        names = agreement["names"]
        text.append(f"Kendall's W of the combined scorers: {_number(agreement['kendalls_w'])}")
        matrix = [["agreement", *names]]
        matrix += [
            [name, *map(_number, row)]
            for name, row in zip(names, agreement["pairwise"], strict=True)
        ]
        text.append(_aligned(matrix))
    missing = sum(row["missing"] for row in summary["scorers"].values()) + summary["skipped"]
    if missing:
        text.append(
            f"{missing} scores or rows are missing; see {folder / 'errors.jsonl'}, and run "
            "again to try them again"
        )
    text.append(f"wrote {folder / 'scores.parquet'}, errors.jsonl and summary.json")
    return "\n".join(text)


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
