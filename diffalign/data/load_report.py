"""The report on how a dataset was read: what was used, and what was left out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign.data.judgements import Verdict
from diffalign.errors import UserError

if TYPE_CHECKING:
    pass

LISTED_BROKEN_ROWS = 20


@dataclass
class LoadReport:
    """Record what was read from a source and what was left out.

    A run stores it in its configuration and its model card.

    Attributes:
        source (`str`): Name, path or type of the source.
        layout (`str`): The recognised layout.
        kind (`str`): The kind of its rows.
        mapping (`dict[str, str]`): Role -> column.
        rows (`int`): Rows of the source.
        kept (`int`): Groups that can be used.
        ties (`int`): Tied rows.
        ties_kept (`bool`): Whether ties are among `kept`, with weight 0.
        unlabelled (`int`): Rows dropped because nobody judged them.
        broken_count (`int`): Unusable rows.
        broken (`list[tuple[int, str]]`): (row id, reason) of the first 20 of them.
        first_wins (`int`): How often a label preferred the first image column.
        second_wins (`int`): How often a label preferred the second one.
        direction (`str`): Which way the judgements are read, in words.
        unused (`list[str]`): Columns that look like judgements or images and are not
            read.
        notes (`list[str]`): What else was done to read the source.

    Example:
        >>> from diffalign.data import load_preferences
        >>> rows = [{"prompt": "a cat"}, {"prompt": "a dog"}, {"prompt": None}]
        >>> dataset = load_preferences(rows, max_broken_fraction=0.5, verbose=False)
        >>> dataset.report.rows, dataset.report.kept, dataset.report.broken
        (3, 2, [(2, 'prompt is None, expected text')])
    """

    source: str
    layout: str
    kind: str
    mapping: dict[str, str]
    rows: int = 0
    kept: int = 0
    ties: int = 0
    ties_kept: bool = False
    unlabelled: int = 0
    broken_count: int = 0
    broken: list[tuple[int, str]] = field(default_factory=list)
    first_wins: int = 0
    second_wins: int = 0
    direction: str = ""
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return one paragraph for the terminal and the model card."""
        columns = ", ".join(
            role if role == column else f"{role} = {column}"
            for role, column in self.mapping.items()
        )
        text = (
            f"dataset {self.source}: layout {self.layout} ({columns}), kind {self.kind}; "
            f"{self.kept} of {self.rows} rows used"
        )
        if self.ties:
            text += f"; {self.ties} ties {'kept with weight 0' if self.ties_kept else 'dropped'}"
        if self.unlabelled:
            text += f"; {self.unlabelled} rows without a label dropped"
        if self.broken_count:
            text += f"; {self.broken_count} broken rows skipped ({self.first_broken()})"
        for remark in (*self.notes, self.unused_columns()):
            text += f"; {remark}" if remark else ""
        return text

    def unused_columns(self) -> str:
        """Return a sentence about columns that look useful and are not read.

        It is empty where there are none.
        """
        if not self.unused:
            return ""
        names = ", ".join(self.unused)
        return (
            f"not read, although they look like judgements or images: {names} (data.columns "
            "says what a column is)"
        )

    def first_broken(self, count: int = 3) -> str:
        """Return the first broken rows with their reasons, for a message.

        Args:
            count (`int`, *optional*, defaults to `3`): Number of rows to name.
        """
        rows = "; ".join(f"row {row_id}: {reason}" for row_id, reason in self.broken[:count])
        return rows + ("; ..." if self.broken_count > count else "")

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain types, for JSON and YAML."""
        return dataclasses.asdict(self) | {"broken": [list(row) for row in self.broken]}

    def add_broken(self, row_id: int, reason: str) -> None:
        """Count an unusable row.

        Args:
            row_id (`int`): Index of the row in the source.
            reason (`str`): Why it cannot be used.
        """
        self.broken_count += 1
        if len(self.broken) < LISTED_BROKEN_ROWS:
            self.broken.append((row_id, reason))

    def admit(self, row_id: int, verdict: Verdict) -> bool:
        """Count a row by its verdict, except for `rows` and `kept`.

        Args:
            row_id (`int`): Index of the row in the source.
            verdict (`Verdict`): What its light cells say.

        Returns:
            `bool`: Whether the row's group is to be used.
        """
        if verdict.status == "broken":
            self.add_broken(row_id, verdict.reason)
        self.unlabelled += verdict.status == "unlabelled"
        self.ties += verdict.status == "tie"
        self.first_wins += verdict.second_wins is False
        self.second_wins += verdict.second_wins is True
        return verdict.status == "keep" or (verdict.status == "tie" and self.ties_kept)

    def check(self, max_broken_fraction: float) -> None:
        """Refuse a source of which too little can be used.

        Args:
            max_broken_fraction (`float`): Largest share of broken rows that is
                accepted.

        Raises:
            UserError: Too many rows are broken, or none can be used.
        """
        if self.broken_count > max_broken_fraction * self.rows:
            raise UserError(
                f"dataset {self.source}: {self.broken_count} of {self.rows} rows are broken, "
                f"more than data.max_broken_fraction = {max_broken_fraction:g} allows "
                f"({self.first_broken()})"
            )
        if self.rows == 0:
            raise UserError(f"dataset {self.source}: has no rows")
        if self.kept == 0 and self.ties == self.rows:
            raise UserError(
                f"dataset {self.source}: all {self.rows} rows are ties; nothing is left to "
                "learn from"
            )
        if self.kept == 0:
            raise UserError(
                f"dataset {self.source}: none of its {self.rows} rows can be used ({self.ties} "
                f"ties, {self.unlabelled} without a label, {self.broken_count} "
                f"broken{': ' + self.first_broken() if self.broken_count else ''})"
            )
