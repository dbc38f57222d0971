"""Go over a dataset once and decide which rows are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.data import images as image_cells
from diffalign.data.dataset import LoadReport, build_group, lazy_cell
from diffalign.data.images import ImagePlaces, Undecoded
from diffalign.data.judgements import classify_row
from diffalign.data.schema import Layout

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow

_BATCH = 256
_SHOW_PROGRESS_FROM = 20_000  # rows


def check_image(image: Undecoded, verify: str) -> None:
    """Check that an image can be used.

    Args:
        image: As `diffalign.data.images.resolve` returns it.
        verify (`str`): `header` opens it, `full` decodes it, `none` trusts it.

    Raises:
        BrokenImage: It cannot be used.
    """
    if verify == "full":
        image_cells.decode(image)
    elif verify == "header":
        image_cells.header(image)


def usable_rows(
    dataset: datasets.Dataset, layout: Layout, report: LoadReport, places: ImagePlaces, verify: str
) -> np.ndarray:
    """Find the rows to use, and count all others in the report.

    Prompts, labels and scores of every row are read. Images are read only to be
    verified, as views of the Arrow table, so a header check of embedded images does not
    read their pixels from disk.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        layout (`Layout`): How its columns are read.
        report (`LoadReport`): Gets the counts.
        places (`ImagePlaces`): Where image cells may point to.
        verify (`str`): `header`, `full` or `none`, see `check_image`.

    Returns:
        `np.ndarray`: Row ids, int64, ascending.
    """
    import numpy as np
    from tqdm.auto import tqdm

    columns = layout.mapping if verify != "none" else layout.light_columns | _lists(layout)
    tables = dataset.select_columns(list(dict.fromkeys(columns.values()))).with_format("arrow")
    row_ids: list[int] = []
    with tqdm(
        total=len(dataset),
        desc="checking rows",
        unit="row",
        disable=len(dataset) < _SHOW_PROGRESS_FROM,
    ) as bar:
        for table in tables.iter(batch_size=_BATCH):
            light = {
                role: table[column].to_pylist() for role, column in layout.light_columns.items()
            }
            for offset in range(len(table)):
                row_id = report.rows
                report.rows += 1
                verdict = classify_row(
                    layout, {role: values[offset] for role, values in light.items()}
                )
                if not report.admit(row_id, verdict):
                    continue
                try:
                    if verify == "none":
                        _check_length(table, layout, offset, len(verdict.prompts))
                    else:
                        cells = {
                            role: lazy_cell(table[column][offset])
                            for role, column in layout.image_columns.items()
                        }
                        for image in build_group(layout, verdict, row_id, cells, places).images:
                            check_image(image, verify)
                except image_cells.BrokenImage as error:
                    report.add_broken(row_id, str(error))
                    continue
                row_ids.append(row_id)
            bar.update(len(table))
    report.kept = len(row_ids)
    return np.asarray(row_ids, dtype=np.int64)


def _lists(layout: Layout) -> dict[str, str]:
    return {role: column for role, column in layout.image_columns.items() if role == "images"}


def _check_length(table: pyarrow.Table, layout: Layout, offset: int, expected: int) -> None:
    """Refuse a ranked row whose images and scores differ in number.

    This is checked even where images are trusted.
    """
    for column in _lists(layout).values():
        images = table[column][offset]
        count = len(images.values) if images.is_valid else 0
        if count != expected:
            raise image_cells.BrokenImage(f"has {count} images and {expected} scores")
