"""Every source and layout, read from real files."""

import io
import json
import tarfile

import datasets
import pytest

from diffalign.data import load_preferences
from diffalign.errors import ConfigError, UserError


def load(source, **kwargs):
    return load_preferences(source, **{"verbose": False} | kwargs)


@pytest.fixture
def pickapic(png):
    """Row 0 prefers the first (red) image, 1 the second (blue); 2 ties, 3 has none."""
    labels = [(1.0, 0.0, True), (0.0, 1.0, True), (0.5, 0.5, True), (1.0, 0.0, False)]
    return [
        {
            "caption": f"p{i}",
            "jpg_0": png("red"),
            "jpg_1": png("blue"),
            "label_0": a,
            "label_1": b,
            "has_label": has,
        }
        for i, (a, b, has) in enumerate(labels)
    ]


@pytest.fixture
def pairs(png):
    return [
        {
            "prompt": f"p{i}",
            "chosen": {"bytes": png("red"), "path": None},
            "rejected": {"bytes": png("blue"), "path": None},
        }
        for i in range(3)
    ]


@pytest.fixture
def image_pairs(pairs):
    return (
        datasets.Dataset.from_list(pairs)
        .cast_column("chosen", datasets.Image())
        .cast_column("rejected", datasets.Image())
    )


def test_pickapic_drops_ties_and_unlabelled_and_swaps(pickapic, colors):
    data = load(pickapic)
    assert (len(data), data.kind, data.layout.name) == (2, "pair", "pickapic")
    assert [group.row_id for group in data] == [0, 1]
    assert [colors(group) for group in data] == [["red", "blue"], ["blue", "red"]]
    assert data[1].prompts == ("p1", "p1")
    report = data.report
    assert (report.rows, report.kept, report.ties, report.unlabelled, report.broken_count) == (
        4,
        2,
        1,
        1,
        0,
    )
    assert (report.first_wins, report.second_wins) == (1, 1)


def test_kept_ties_weigh_nothing(pickapic):
    data = load(pickapic, ties="keep")
    assert [(group.row_id, group.weight) for group in data] == [(0, 1.0), (1, 1.0), (2, 0.0)]
    assert "1 ties kept with weight 0" in data.report.summary()


def test_the_report_is_printed_once(pickapic, capsys):
    load_preferences(pickapic)
    printed = capsys.readouterr().out
    assert (
        "layout pickapic (prompt = caption, jpg_0, jpg_1, label_0, label_1, has_label), kind pair; "
        "2 of 4 rows used" in printed
    )
    assert "1 ties dropped" in printed and "1 rows without a label dropped" in printed
    assert json.dumps(load(pickapic).report.as_dict())


def test_parquet_file_and_folders(image_pairs, tmp_path, colors):
    for name in (
        "file.parquet",
        "flat/train-00000-of-00001.parquet",
        "hub/data/train-00000-of-00001.parquet",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image_pairs.to_parquet(path)
        data = load(path if name == "file.parquet" else tmp_path / name.split("/")[0])
        assert [colors(group) for group in data] == [["red", "blue"]] * 3


def test_images_stay_undecoded(image_pairs, png):
    assert load(image_pairs)[0].images[0] == {"bytes": png("red"), "path": None}


def test_save_to_disk_and_dataset_dict(image_pairs, tmp_path, colors):
    image_pairs.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict(train=image_pairs, test=image_pairs.select([0]))
    splits.save_to_disk(tmp_path / "two")
    assert colors(load(tmp_path / "one")[2]) == ["red", "blue"]
    assert len(load(tmp_path / "two", split="test")) == len(load(splits, split="test")) == 1
    with pytest.raises(UserError, match="split 'dev' does not exist; there are train, test"):
        load(splits, split="dev")


def test_rows_keep_the_order_of_a_shuffled_dataset(pickapic):
    shuffled = datasets.Dataset.from_list(pickapic).select([3, 1, 0])
    assert [(group.row_id, group.prompts[0]) for group in load(shuffled)] == [(1, "p1"), (2, "p0")]


def test_jsonl_paths_are_relative_to_the_file(save, tmp_path, colors):
    save("set/a.png", "red")
    save("elsewhere/b.png", "blue")
    row = {"prompt": "p", "chosen": "a.png", "rejected": "../elsewhere/b.png"}
    (tmp_path / "set/rows.jsonl").write_text(json.dumps(row) + "\n")
    assert colors(load(tmp_path / "set/rows.jsonl", allow_outside_paths=True)[0]) == ["red", "blue"]
    assert colors(load(tmp_path / "set", allow_outside_paths=True)[0]) == ["red", "blue"]
    assert colors(load(tmp_path / "set", data_dir=tmp_path / "elsewhere/../elsewhere/..")[0]) == [
        "red",
        "blue",
    ]


def test_csv_and_data_dir(save, tmp_path, colors):
    save("images/a.png", "red")
    save("images/b.png", "blue")
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\np,a.png,b.png\n")
    assert colors(load(tmp_path / "rows.csv", data_dir=tmp_path / "images")[0]) == ["red", "blue"]
    with pytest.raises(UserError, match="data.train_data_dir: there is no folder"):
        load(tmp_path / "rows.csv", data_dir=tmp_path / "nowhere")


def test_splits_of_a_folder_of_tables(save, tmp_path):
    save("a.png", "red")
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "p", "image": "a.png"}\n' * count)
    assert (len(load(tmp_path)), len(load(tmp_path, split="test"))) == (2, 1)
    with pytest.raises(UserError, match="no file is named after the split 'dev'"):
        load(tmp_path, split="dev")


def test_hpdv2(save, tmp_path, colors):
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        save(f"test/{name}.png", color)
    rows = [{"prompt": "p", "image_path": ["a.png", "b.png", "c.png"], "rank": [2, 3, 1]}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    data = load(tmp_path / "test.json")
    assert (data.kind, data.layout.name, data[0].scores) == ("ranked", "hpdv2", (-2, -3, -1))
    assert data[0].prompts == ("p", "p", "p")
    assert colors(data.as_kind("pair")[0]) == ["green", "blue"]
    assert data.as_kind("pair")[0].scores == (-1, -3)
    assert (
        colors(data.as_kind("single")[0])
        == colors(data.as_kind("pair").as_kind("single")[0])
        == ["green"]
    )


def test_dcpo(png, colors):
    row = {
        "caption_0": "zero",
        "caption_1": "one",
        "jpg_0": png("red"),
        "jpg_1": png("blue"),
        "label_0": 0.0,
    }
    group = load([row])[0]
    assert (group.prompts, colors(group)) == (("one", "zero"), ["blue", "red"])


def test_canonical_with_two_prompts_and_weight(pairs, colors):
    row = pairs[0] | {"chosen_prompt": "good", "rejected_prompt": "bad", "weight": 0.5}
    group = load([row])[0]
    assert (group.prompts, group.weight, colors(group)) == (("good", "bad"), 0.5, ["red", "blue"])


def test_ranked(png, colors):
    images = [png("red"), png("blue"), png("green")]
    rows = [
        {"prompt": "p", "images": images, "scores": [0.1, 0.3, 0.2]},
        {"prompt": "tie", "images": images, "scores": [1.0, 1.0, 1.0]},
        {"prompt": "short", "images": images[:2], "scores": [1.0, 2.0, 3.0]},
    ]
    data = load(rows, max_broken_fraction=0.5)
    assert colors(data[0]) == ["red", "blue", "green"]
    assert colors(data.as_kind("pair")[0]) == ["blue", "red"]
    assert (data.report.ties, data.report.broken) == (1, [(2, "has 2 images and 3 scores")])
    assert (
        load(rows, max_broken_fraction=0.5, verify_images="none").report.broken
        == data.report.broken
    )
    kept = load(rows, max_broken_fraction=0.5, ties="keep", kind="pair")
    assert [group.weight for group in kept] == [1.0, 0.0]
    assert colors(kept[1]) == [
        "red",
        "green",
    ]  # two different images, though their scores are equal


def test_imagefolder_with_metadata(save, tmp_path, colors):
    save("train/a.png", "red")
    save("train/b.png", "blue")
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"}]
    (tmp_path / "train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(None, data_dir=tmp_path)
    assert (data.kind, [group.prompts for group in data]) == ("single", [("one",), ("two",)])
    assert colors(data[1]) == ["blue"]


def test_pairs_in_an_imagefolder(save, tmp_path, colors):
    save("train/chosen/a.png", "red")
    save("train/rejected/a.png", "blue")
    row = {
        "chosen_file_name": "chosen/a.png",
        "rejected_file_name": "rejected/a.png",
        "prompt": "p",
    }
    (tmp_path / "train/metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert colors(load(tmp_path)[0]) == ["red", "blue"]


@pytest.mark.parametrize(("chosen", "rejected"), [("chosen", "rejected"), ("w", "l")])
def test_pair_folders(save, tmp_path, colors, chosen, rejected):
    for stem in ("a", "b", "c"):
        save(f"{chosen}/{stem}.png", "red")
        save(f"{rejected}/{stem}.png", "blue")
    save(f"{chosen}/lonely.png", "red")
    (tmp_path / chosen / "a.txt").write_text("from text\n")
    (tmp_path / "captions.json").write_text(json.dumps({"a": "unused", "b": "from json"}))
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"file_name": "c.png", "prompt": "from jsonl"}) + "\n"
    )
    data = load(tmp_path, max_broken_fraction=0.5)
    assert [group.prompts[0] for group in data] == ["from text", "from json", "from jsonl"]
    assert colors(data[0]) == ["red", "blue"]
    assert data.report.broken == [(3, "prompt is None, expected text")]


def test_pair_folders_beside_another_dataset_are_refused(save, tmp_path):
    save("mine/chosen/a.png", "red")
    save("mine/rejected/a.png", "blue")
    (tmp_path / "mine/chosen/a.txt").write_text("a")
    assert load(tmp_path / "mine").report.source.endswith("mine (folders chosen/ and rejected/)")
    assert len(load(None, data_dir=tmp_path / "mine")) == 1
    with pytest.raises(UserError, match="train_data_dir: .*mine' is a dataset of its own"):
        load(tmp_path, data_dir=tmp_path / "mine")
    row = {"prompt": "p", "chosen": "chosen/a.png", "rejected": "rejected/a.png"}
    (tmp_path / "table.jsonl").write_text(json.dumps(row) + "\n")
    assert len(load(tmp_path / "table.jsonl", data_dir=tmp_path / "mine")) == 1


def _tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset(png, tmp_path, colors, streaming):
    members = {}
    for i in range(2):
        members |= {
            f"{i:03}.chosen.png": png("red"),
            f"{i:03}.rejected.png": png("blue"),
            f"{i:03}.prompt.txt": b"p%d" % i,
        }
    _tar(tmp_path / "pairs.tar", members)
    groups = list(load(tmp_path / "pairs.tar", streaming=streaming))
    assert [group.prompts[0] for group in groups] == ["p0", "p1"]
    assert colors(groups[1]) == ["red", "blue"]


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_with_json(png, tmp_path, colors, streaming):
    label = json.dumps({"caption": "p", "label_0": 0.0}).encode()
    (tmp_path / "shards").mkdir()
    _tar(
        tmp_path / "shards/train-000.tar",
        {"0.jpg_0.png": png("red"), "0.jpg_1.png": png("blue"), "0.json": label},
    )
    groups = list(load(tmp_path / "shards", streaming=streaming))
    assert [colors(group) for group in groups] == [["blue", "red"]]


def test_prompts_alone(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    data = load(tmp_path / "prompts.jsonl")
    assert (data.kind, [group.prompts for group in data], data[0].images) == (
        "prompt",
        [("a cat",), ("a dog",)],
        [],
    )


def test_a_kind_that_the_data_do_not_hold(pairs):
    data = load(pairs)
    assert [group.prompts for group in data.as_kind("prompt")] == [("p0",), ("p1",), ("p2",)]
    assert data.as_kind("prompt")[0].images == []
    with pytest.raises(
        UserError, match="the method needs ranked data, but this dataset is of kind pair"
    ):
        load(pairs, kind="ranked")
    with pytest.raises(
        UserError,
        match="expected one of pair, ranked, labelled, conditioned, single, prompt, got 'triple'",
    ):
        data.as_kind("triple")


def test_pil_images_and_column_mapping(colors):
    from PIL import Image

    rows = [
        {"t": "p", "good": Image.new("RGB", (8, 8), "red"), "bad": Image.new("RGB", (8, 8), "blue")}
    ]
    columns = {"prompt": "t", "chosen": "good", "rejected": "bad"}
    assert colors(load(rows, columns=columns)[0]) == ["red", "blue"]


def test_broken_rows_are_skipped_and_named(pairs, png):
    pairs += [
        {"prompt": None, "chosen": pairs[0]["chosen"], "rejected": pairs[0]["rejected"]},
        {
            "prompt": "p",
            "chosen": {"bytes": b"not an image", "path": None},
            "rejected": pairs[0]["rejected"],
        },
        {
            "prompt": "p",
            "chosen": {"bytes": None, "path": "gone.png"},
            "rejected": pairs[0]["rejected"],
        },
        {"prompt": "p", "chosen": pairs[0]["chosen"], "rejected": None},
    ]
    data = load(pairs, max_broken_fraction=0.6)
    assert [row_id for row_id, _ in data.report.broken] == [3, 4, 5, 6]
    reasons = [reason for _, reason in data.report.broken]
    assert (
        "cannot be opened" in reasons[1]
        and "'gone.png' does not exist" in reasons[2]
        and reasons[3] == "has no image"
    )
    assert len(data) == 3
    with pytest.raises(
        UserError,
        match=r"4 of 7 rows are broken, more than data.max_broken_fraction = 0.05 .*row 3: prompt",
    ):
        load(pairs)


def test_verification_levels(pairs, png):
    truncated = png("red", (64, 64))[:-30]
    pairs.append(pairs[0] | {"chosen": {"bytes": truncated, "path": None}})
    assert load(pairs).report.broken_count == 0
    assert load(pairs, verify_images="full", max_broken_fraction=0.5).report.broken[0][0] == 3
    with pytest.raises(UserError, match="dataset row 3: image cannot be decoded"):
        load(pairs, verify_images="none")[3].open_images()


def test_image_colour_modes():
    from PIL import Image

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    turned = Image.new("L", (6, 4), 128)
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, format="PNG", exif=exif)
    group = load([{"prompt": "p", "chosen": clear, "rejected": clear}])[0]
    assert group.open_images()[0].getpixel((0, 0)) == (255, 255, 255)
    group = load([{"prompt": "p", "image": buffer.getvalue()}])[0]
    assert (group.open_images()[0].size, group.open_images()[0].mode) == ((4, 6), "RGB")
    assert group.image_sizes() == [(6, 4)]


def test_all_ties_and_empty(png, tmp_path):
    tie = {"caption": "p", "jpg_0": png("red"), "jpg_1": png("blue"), "label_0": 0.5}
    with pytest.raises(UserError, match="all 3 rows are ties"):
        load([tie] * 3)
    with pytest.raises(UserError, match="has no rows"):
        load([])
    with pytest.raises(UserError, match="has no rows"):
        load(datasets.Dataset.from_dict({"prompt": []}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"found no chosen/ and rejected/ .* in this folder"):
        load(tmp_path / "empty")


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    for name in ("./missing", "/missing/folder", "missing.parquet", "a/b/c"):
        with pytest.raises(UserError, match="there is no such file or folder"):
            load(name)
    (tmp_path / "rows.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read .pkl files; known are .parquet"):
        load(tmp_path / "rows.pkl")
    with pytest.raises(UserError, match="expected a name, a path"):
        load(3)
    with pytest.raises(ConfigError, match="data.ties: expected one of drop, keep, got 'x'"):
        load([{"prompt": "p"}], ties="x")
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(UserError, match="bad.jsonl"):
        load(tmp_path / "bad.jsonl")


def test_a_missing_hub_dataset_names_alternatives(monkeypatch):
    asked = {}

    def missing(*args, **kwargs):
        asked.update(kwargs)
        raise datasets.exceptions.DatasetNotFoundError("404")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError) as error:
        load("yuvalkirstain/pickapic_v2", revision="abc")
    assert asked["revision"] == "abc"
    for part in (
        "no dataset on the Hub at revision 'abc'",
        "taken down",
        "open-image-preferences-v1-binarized",
        "data convert",
    ):
        assert part in str(error.value)


def test_an_unreachable_hub(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"the Hub cannot be reached \(offline\)"):
        load("owner/name")


def test_a_split_that_is_not_there(image_pairs, tmp_path):
    image_pairs.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="test"):
        load(tmp_path / "rows.parquet", split="test")
    assert len(load(tmp_path / "rows.parquet", split="train[:2]")) == 2


def test_select(pairs):
    data = load(pairs).select([2, 0])
    assert ([group.row_id for group in data], len(data)) == ([2, 0], 2)


@pytest.mark.parametrize(
    "names", [("a/cat", "b/cat"), ("a/cat.png", "b/cat.png"), ("chosen/a/cat.png", "chosen/b/cat")]
)
def test_captions_of_nested_pair_folders_are_those_of_their_path(save, tmp_path, names):
    for side, color in (("chosen", "red"), ("rejected", "blue")):
        save(f"{side}/a/cat.png", color)
        save(f"{side}/b/cat.png", color)
        save(f"{side}/c/dog.png", color)
    captions = dict(zip(names, ("of a", "of b"), strict=True)) | {"dog": "of c"}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    assert [group.prompts[0] for group in load(tmp_path)] == ["of a", "of b", "of c"]
    lines = [{"file_name": name, "text": text} for name, text in captions.items()]
    (tmp_path / "captions.json").unlink()
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [group.prompts[0] for group in load(tmp_path)] == ["of a", "of b", "of c"]


def test_one_caption_for_two_images_of_a_name_is_given_to_neither(save, tmp_path):
    for side, color in (("chosen", "red"), ("rejected", "blue")):
        for name in ("a/cat", "b/cat", "dog"):
            save(f"{side}/{name}.png", color)
    (tmp_path / "captions.json").write_text(json.dumps({"cat": "a cat", "dog": "a dog"}))
    data = load(tmp_path, max_broken_fraction=0.9)
    assert [group.prompts[0] for group in data] == ["a dog"]


def test_names_of_pair_folders_are_compared_composed_and_hidden_files_do_not_count(save, tmp_path):
    save("chosen/caf\u00e9.png", "red")
    save("rejected/cafe\u0301.png", "blue")
    (tmp_path / "chosen/._caf\u00e9.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "captions.json").write_text(json.dumps({"cafe\u0301": "a caf\u00e9"}))
    (group,) = load(tmp_path)
    assert group.prompts[0] == "a caf\u00e9"


def test_a_missing_side_names_its_file_and_one_stem_twice_is_refused(save, tmp_path):
    for number in range(3):
        save(f"chosen/{number}.png", "red")
        (tmp_path / f"chosen/{number}.txt").write_text("p")
    save("rejected/0.png", "blue")
    save("rejected/1.png", "blue")
    with pytest.raises(UserError, match=r"row 2: .*rejected/2\.png"):
        load(tmp_path)
    save("chosen/1.jpg", "red")
    with pytest.raises(UserError, match=r"1\.jpg and 1\.png are images of one pair"):
        load(tmp_path)


@pytest.fixture
def sources(image_pairs, pairs, save, tmp_path):
    """One dataset of three rows in every form that has one split."""
    image_pairs.save_to_disk(tmp_path / "saved")
    lines = []
    for number in range(3):
        for side in ("chosen", "rejected"):
            save(f"folders/{side}/{number}.png", "red" if side == "chosen" else "blue")
            save(f"table/{side}-{number}.png", "red" if side == "chosen" else "blue")
        (tmp_path / f"folders/chosen/{number}.txt").write_text(f"p{number}")
        sides = {side: f"{side}-{number}.png" for side in ("chosen", "rejected")}
        lines.append(json.dumps({"prompt": f"p{number}", **sides}) + "\n")
    (tmp_path / "table/train.jsonl").write_text("".join(lines))
    return {
        "list": pairs,
        "object": image_pairs,
        "saved": tmp_path / "saved",
        "folders": tmp_path / "folders",
        "file": tmp_path / "table/train.jsonl",
        "table": tmp_path / "table",
        "dict": datasets.DatasetDict(train=image_pairs),
    }


@pytest.mark.parametrize("form", ["list", "object", "saved", "folders", "file", "table", "dict"])
def test_parts_of_splits_are_the_same_for_every_form(sources, form):
    def prompts(split):
        return [group.prompts[0] for group in load(sources[form], split=split)]

    assert prompts("train") == ["p0", "p1", "p2"]
    assert prompts("train[:2]") == ["p0", "p1"]
    assert prompts("train[-1:]+train[:1]") == ["p2", "p0"]
    with pytest.raises(UserError, match=r"split"):
        prompts("nonsense")
    with pytest.raises(UserError, match=r"split"):
        prompts("nonsense[:2]")
    with pytest.raises(UserError, match=r"split 'train\[:x\]'"):
        prompts("train[:x]")


def test_a_table_with_tabs_is_read(save, tmp_path):
    for side, color in (("chosen", "red"), ("rejected", "blue")):
        save(f"t/{side}.png", color)
    (tmp_path / "t/pairs.tsv").write_text(
        'prompt\tchosen\trejected\nsay "hi"\tchosen.png\trejected.png\n'
    )
    for source in ("t/pairs.tsv", "t"):
        (group,) = load(tmp_path / source)
        assert group.prompts[0] == 'say "hi"'
