import pytest
from torch.utils.data import DataLoader

from diffalign.data import PreferenceDataset, load_preferences
from diffalign.errors import UserError


@pytest.fixture
def rows(png):
    labels = [1.0, 0.5, 0.0, 1.0, None]
    rows = [
        {"caption": f"p{i}", "jpg_0": png("red"), "jpg_1": png("blue"), "label_0": label}
        for i, label in enumerate(labels)
    ]
    return rows


def stream(rows, **kwargs):
    return load_preferences(rows, streaming=True, verbose=False, **kwargs)


def test_yields_the_groups_of_the_map_style_dataset(rows, colors):
    streamed, loaded = stream(rows), load_preferences(rows, verbose=False)
    assert isinstance(streamed, PreferenceDataset)
    for _ in range(2):  # the report counts every pass afresh
        groups = list(streamed)
        assert [(g.row_id, g.prompts, g.image_hashes()) for g in groups] == [
            (g.row_id, g.prompts, g.image_hashes()) for g in loaded
        ]
        assert (
            streamed.report.rows,
            streamed.report.kept,
            streamed.report.ties,
            streamed.report.unlabelled,
        ) == (5, 3, 1, 1)
    assert [colors(group) for group in groups] == [
        ["red", "blue"],
        ["blue", "red"],
        ["red", "blue"],
    ]
    assert [g.prompts for g in streamed.as_kind("prompt")] == [("p0",), ("p2",), ("p3",)]


def test_has_no_length_and_no_index(rows):
    with pytest.raises(TypeError, match="no length; set train.max_steps"):
        len(stream(rows))
    with pytest.raises(TypeError, match="no index"):
        stream(rows)[0]


def test_workers_share_the_rows(rows):
    import datasets

    shards = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    loader = DataLoader(load_preferences(shards, verbose=False), batch_size=None, num_workers=2)
    groups = list(loader)
    assert sorted(group.prompts[0] for group in groups) == ["p0", "p2", "p3"]
    assert len({group.row_id for group in groups}) == 3


def test_broken_rows_are_counted_and_limited(rows):
    rows[0] |= {"jpg_1": b"not an image"}
    data = stream(rows, max_broken_fraction=0.5)
    assert [group.row_id for group in data] == [2, 3]
    assert data.report.broken[0][0] == 0
    with pytest.raises(UserError, match="1 of 5 rows are broken"):
        list(stream(rows))


def test_all_ties(rows):
    with pytest.raises(UserError, match="all 1 rows are ties"):
        list(stream(rows[1:2]))
