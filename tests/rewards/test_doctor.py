"""`diffalign doctor` and `diffalign scorers`."""

from __future__ import annotations

import json

import pytest

from diffalign.cli.entry import run
from diffalign.rewards.testing import doctor, reference


@pytest.mark.nightly
def test_all_stored_values_are_met(capsys, tmp_path):
    assert run(["doctor", "--report", str(tmp_path / "report.json")]) == 0
    said = capsys.readouterr().out
    assert "0 wrong" in said and "WRONG" not in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        {row["scorer"] for row in report if row["ok"]}
        == set(json.loads(doctor.REFERENCE.read_text()))
        == set(reference.MODELS) | {"shapes"}
    )


def test_findings_as_json_and_the_old_form(capsys, tmp_path):
    assert run(["doctor", "--scorers", "jpeg_compressibility", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    file = tmp_path / "report.json"
    assert run(["doctor", "--scorers", "jpeg_compressibility", "--json", str(file)]) == 0
    said = capsys.readouterr()
    assert "0 wrong" in said.out and "--report FILE" in said.err
    assert json.loads(file.read_text()) == printed and printed[0]["ok"] is None


def test_values_that_differ_are_named(capsys, tmp_path, monkeypatch):
    stored = json.loads(doctor.REFERENCE.read_text())
    stored["shapes-clip"]["values"][3] += 0.01
    (tmp_path / "reference.json").write_text(json.dumps(stored))
    monkeypatch.setattr(doctor, "REFERENCE", tmp_path / "reference.json")
    assert run(["doctor", "--scorers", "shapes-clip,clip-l14"]) == 1
    said = capsys.readouterr().out
    assert (
        "WRONG  shapes-clip" in said
        and "largest difference 1.0e-02" in said
        and "2 checks, 1 wrong" in said
    )


@pytest.mark.nightly
def test_given_weights_are_loaded_and_compared(capsys, tmp_path):
    model = reference.arguments("pickscore", tmp_path)["model"]
    assert run(["doctor", "--scorers", "pickscore", "--model", f"pickscore={model}"]) == 0
    assert "drawn images: scores from" in capsys.readouterr().out
    arguments = reference.arguments("hpsv2.1", tmp_path)
    assert (
        run(["doctor", "--scorers", "hpsv2.1", "--model", f"hpsv2.1={arguments['model']}"]) == 1
    )  # a tiny file under the published size
    assert "does not fit hpsv2.1" in capsys.readouterr().out
    head = reference.arguments("aesthetic-v1", tmp_path)["model"]
    assert run(["doctor", "--scorers", "aesthetic-v1", "--model", f"aesthetic-v1={head}"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorers", "pickscoer"], "did you mean pickscore"),
        (["--model", "pickscore"], "--model: expected NAME=PATH"),
        (["--model", "nothing=here"], "unknown scorer 'nothing'"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert run(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_list_and_a_card(capsys):
    assert run(["scorers"]) == 0
    said = capsys.readouterr().out
    assert "pickscore" in said and "image+prompt" in said
    assert run(["scorers", "HPSV2.1"]) == 0
    said = capsys.readouterr().out
    assert (
        "weights: xswu/HPSv2" in said
        and "licence: Apache-2.0" in said
        and "filename: HPS_v2.1_compressed.pt" in said
    )
    assert run(["scorers", "hpsv2"]) == 2
