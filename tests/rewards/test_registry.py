"""Names: built in, registered, plug-ins, paths; what is unknown, ambiguous, taken or
untrusted."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import diffalign
from diffalign import UserError, list_scorers, load_scorer, register_scorer
from diffalign.rewards import registry
from diffalign.rewards.base import Scorer
from diffalign.rewards.spec import ScorerSpec

NAMES = [
    "imagereward", "pickscore", "hpsv2.0", "hpsv2.1", "clip-l14", "clip-h14", "aesthetic-v1",
    "aesthetic-v2", "mps",
    "jpeg_compressibility", "jpeg_incompressibility", "geneval", "vlm_judge", "remote", "shapes",
    "shapes-clip",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def images(count: int = 2):
    return [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(count)]


def test_all_scorers_are_listed_with_complete_cards():
    assert set(NAMES) <= set(list_scorers())
    for name in NAMES:
        spec = registry.get_spec(name)
        assert (
            spec.key == name
            and spec.summary
            and spec.licence
            and spec.citation
            and spec.higher_is_better
        )
        assert spec.requires and spec.preprocess and spec.text
        if spec.weights:
            assert spec.parameters or spec.key == "remote"


def test_case_and_separators_do_not_matter():
    for name in ("PickScore", "pick-score", "PICK_SCORE"):
        assert registry.get_spec(name).key == "pickscore"
    assert registry.get_spec("CLIP_L14").key == "clip-l14"
    assert registry.get_spec("JPEG-Compressibility").key == "jpeg_compressibility"


def test_ambiguous_names_are_refused_with_the_versions():
    for name, versions in {
        "hpsv2": "hpsv2.0, hpsv2.1",
        "clip": "clip-l14, clip-h14",
        "aesthetic": "aesthetic-v1",
    }.items():
        with pytest.raises(UserError, match=f"several scorers.*{versions}"):
            load_scorer(name)


def test_unknown_names_list_close_matches():
    with pytest.raises(UserError, match="unknown scorer 'imagerewrad'; did you mean imagereward"):
        load_scorer("imagerewrad")
    with pytest.raises(UserError, match="expected a name"):
        load_scorer("")


def test_a_function_with_any_leading_arguments_is_a_scorer():
    @register_scorer("red", requires=("image",))
    def red(images):
        """How red it is."""
        return [image.getpixel((0, 0))[0] for image in images]

    @register_scorer("Long-Prompt", requires=("prompt",))
    def long_prompt(images, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    @register_scorer("from_metadata", requires=("image", "metadata"))
    def from_metadata(images, prompts, metadata):
        return [extra["value"] for extra in metadata]

    assert red(images()) == [0, 60]  # still the plain function
    assert load_scorer("RED")(images()).tolist() == [0, 60]
    assert load_scorer("long_prompt")(images(), ["a", "bb"]).tolist() == [1, 2]
    assert load_scorer("from_metadata")(images(), metadata=[{"value": 3}, {"value": None}])[0] == 3
    assert registry.get_spec("red").summary == "How red it is."
    with pytest.raises(UserError, match="needs one mapping per image"):
        load_scorer("from_metadata")(images())
    assert {"red", "Long-Prompt", "from_metadata"} <= set(list_scorers())


def test_classes_are_scorers_whether_they_inherit_or_not():
    @register_scorer("scaled", requires=("image",))
    class Scaled:
        def __init__(self, factor=1.0):
            self.factor = factor

        def __call__(self, images, *, metadata):
            assert metadata == [{}] * len(images)
            return [self.factor * image.getpixel((0, 0))[0] for image in images]

    @register_scorer("own")
    class Own(Scorer):
        spec = ScorerSpec(key="own", summary="one", requires=("image",))

        def __init__(self, *, value: float = 1.0, **options):
            super().__init__(**options)
            self.value = value

        def score_batch(self, items):
            return [self.value] * len(items)

    assert load_scorer("scaled", arguments={"factor": 2.0})(images())[1] == 120
    assert load_scorer("own", value=3.0)(images()).tolist() == [3, 3]
    with pytest.raises(UserError, match="valeu: own has no option of that name; it takes .*value"):
        load_scorer("own", valeu=3.0)
    with pytest.raises(UserError, match="model: own has no option"):
        load_scorer("own", model="x")


def test_a_taken_name_needs_override():
    with pytest.raises(UserError, match="a scorer called 'pickscore' exists"):
        register_scorer("pickscore")
    with pytest.raises(UserError, match="exists"):
        register_scorer("hpsv2")

    @register_scorer("Pick-Score", override=True, requires=("image",))
    def mine(images):
        return [0.0] * len(images)

    assert load_scorer("pick_score")(images()).tolist() == [0, 0]


def test_a_function_with_other_code_has_another_fingerprint():
    @register_scorer("f", requires=("image",))
    def one(images):
        return [1.0] * len(images)

    first = load_scorer("f").fingerprint()

    @register_scorer("f", override=True, requires=("image",))
    def two(images):
        return [2.0] * len(images)

    assert load_scorer("f").fingerprint() != first


def test_two_functions_from_one_factory_do_not_share_cached_scores(tmp_path):
    def factory(value):
        def constant(images):
            return [value] * len(images)

        return constant

    found = []
    for value in (1.0, 2.0):
        register_scorer("constant", override=True, requires=("image",))(factory(value))
        found.append(load_scorer("constant", cache=tmp_path / "scores.sqlite")(images(1))[0])
    assert found == [1, 2]


def test_a_file_runs_only_when_trusted(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Mine:\n"
        "    def __call__(self, images):\n"
        "        return [7.0] * len(images)\n"
    )
    with pytest.raises(UserError, match="would run the code in .*trust_remote_code=True"):
        load_scorer(f"{file}:Mine")
    assert not (tmp_path / "ran").exists()
    assert load_scorer(f"{file}:Mine", trust_remote_code=True)(images(), ["", ""]).tolist() == [
        7,
        7,
    ]
    assert (tmp_path / "ran").exists()
    file.write_text(
        "from diffalign import register_scorer\n"
        "@register_scorer('mine-of-a-file', requires=('image',))\n"
        "def mine(images):\n"
        "    return [8.0] * len(images)\n"
    )
    for _ in range(2):  # a changed file is read anew, an unchanged one is run once
        assert load_scorer(f"{file}:mine", trust_remote_code=True)(images(), ["", ""]).tolist() == [
            8,
            8,
        ]
    with pytest.raises(UserError, match="has no 'Other'"):
        load_scorer(f"{file}:Other", trust_remote_code=True)
    with pytest.raises(UserError, match="there is no file"):
        load_scorer("./nowhere.py:Mine", trust_remote_code=True)


def test_a_class_of_an_installed_package_by_its_path():
    scorer = load_scorer("diffalign.rewards.scorers.shapes:ShapesScorer", graded=False)
    assert scorer.name == "shapes"
    with pytest.raises(UserError, match="cannot be imported"):
        load_scorer("no_such_package.scorers:Mine")


def test_plug_ins_are_found_by_entry_point_and_blamed_on_use_only(tmp_path):
    """A real distribution on sys.path, in a process of its own."""
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[diffalign.scorers]\nglow = plugin:glow\nbroken = plugin_broken:nothing\n"
    )
    (tmp_path / "plugin.py").write_text("def glow(images):\n    return [5.0] * len(images)\n")
    (tmp_path / "plugin_broken.py").write_text("raise RuntimeError('needs a licence')\n")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from PIL import Image\n"
        "from diffalign import list_scorers, load_scorer, UserError\n"
        "assert {'glow', 'broken'} <= set(list_scorers()) and 'plugin_broken' not in sys.modules\n"
        "assert load_scorer('Glow')([Image.new('RGB', (4, 4))], ['']).tolist() == [5.0]\n"
        "try:\n"
        "    load_scorer('broken')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "the plug-in 'broken' (plugin_broken:nothing) cannot be imported: needs a licence"
        in done.stdout
    )


def test_scorers_load_in_several_threads_at_once():
    prompts = ["a red circle", "a blue square"]
    expected = load_scorer("shapes-clip")(images(), prompts)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_scorer("shapes-clip")(images(), prompts), range(8)))
    assert all(torch.allclose(scores, expected, atol=1e-5) for scores in found)


def test_the_public_names_are_exported():
    assert {"load_scorer", "list_scorers", "register_scorer"} <= set(diffalign.__all__)


def test_a_scorer_that_was_written_again_in_a_notebook_is_another_scorer():
    from diffalign import load_scorer

    def cell(value: float) -> str:
        code = (
            "from diffalign import register_scorer\n"
            "@register_scorer('written_again', requires=('image',), override=True)\n"
            f"def written_again(images): return [{value}] * len(images)\n"
        )
        exec(compile(code, "/tmp/ipykernel_1/1.py", "exec"), {})
        return load_scorer("written_again").fingerprint()

    assert cell(1.0) == cell(1.0) != cell(2.0)

    class Holder:
        def __init__(self, value: float) -> None:
            self.value = value

        def __repr__(self) -> str:
            return f"Holder({self.value})"

        def score(self, images):
            return [self.value] * len(images)

    prints = []
    for value in (1.0, 2.0):
        register_scorer("held", requires=("image",), override=True)(Holder(value).score)
        prints.append(load_scorer("held").fingerprint())
    assert prints[0] != prints[1]
