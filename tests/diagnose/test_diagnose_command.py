"""`lora-limits diagnose` without its extra: dials, what is written, what is refused, and the
diagnosis that is kept.
"""

import io
import json
import subprocess
import sys

import matplotlib
import pytest
from rich.console import Console

from lora_limits import checklist
from lora_limits.cli import main
from lora_limits.diagnose import (
    adapters,
    command,
    dials,
    loading,
    page,
    picture,
    report,
    selection,
    summary,
    texts,
)
from tests.support import ROOT


def row(**changes):
    norms = {"gamma_centred": 4.0}
    return {
        "norms": {"frozen": norms | {"gamma_centred": 1.0}, "adapted": norms},
        "dial": {"method": "Polynomial(2)", "pays_from": 700, "scale": 0.5},
        "update": {"query": 0.5},
        "rank_of_adapter": 4,
        "noise": 0.4,
        "error": 0.2,
    } | changes


def test_the_dials_of_a_head_are_what_their_definitions_say():
    got = dials.head_dials(row(), 0.1)
    # room of 2 - 1 against an update of 0.5 at rank 4; noise over error, squared
    assert got == {
        "gamma_needed": 2.0,
        "rank_allowed": 16,
        "batch_at_tolerance": 16,
        "batch_at_error": 4,
    }
    cold = dials.head_dials(row(dial={"scale": 0.2}, noise=None), 0.1)
    assert (cold["rank_allowed"], cold["batch_at_tolerance"]) == (0, None)
    assert dials.head_dials(row(dial={"scale": 1.0}), 0.1)["rank_allowed"] is None
    assert dials.head_dials(row(dial={"scale": None}), 0.1)["gamma_needed"] is None


def test_the_dials_speak_of_every_head():
    rows = [
        r | {"dials": dials.head_dials(r, 0.1)}
        for r in (row(), row(dial=row()["dial"] | {"scale": None}))
    ]
    said = dials.dials(rows, tolerance=0.1, length=512)
    assert "would pay from 700 tokens" in said["norm"]["text"]
    assert "0 of 2 heads are there. 1 would not be" in said["norm"]["text"]
    assert "In 1 of 2 heads the frozen weights alone exceed" in said["rank"]["text"]
    assert "up to 16 windows" in said["batch"]["text"]


def test_a_diagnosis_is_written_without_infinities(tmp_path):
    path = report.save({"heads": [{"error": float("inf"), "list": (1.0, float("nan"))}]}, tmp_path)
    assert json.loads(path.read_text()) == {"heads": [{"error": None, "list": [1.0, None]}]}
    assert [p.name for p in tmp_path.iterdir()] == [report.FILE]


CONFIG = {"model_type": "bert"}


@pytest.mark.parametrize(
    ("files", "options", "reason"),
    [
        (None, (), "no such folder"),
        ({}, (), "without config.json"),
        ({"config.json": "{"}, (), "config.json: "),
        ({"config.json": CONFIG, "pytorch_model.bin": ""}, (), "weights in pytorch_model.bin only"),
        ({"config.json": CONFIG | {"quantization_config": {"bits": 4}}}, (), "quantised weights"),
        ({"config.json": CONFIG | {"is_encoder_decoder": True}}, (), "encoder-decoder"),
        (
            {"config.json": CONFIG, "model.safetensors": ""},
            ("--tolerance", "2"),
            "--tolerance: got 2, expected 0.001",
        ),
        (
            {"config.json": CONFIG, "model.safetensors": ""},
            ("--batch", "0"),
            "--batch: got 0, expected at least 1",
        ),
        (
            {"config.json": CONFIG, "model.safetensors": ""},
            ("--layers", "3-1"),
            "--layers: got '3-1', expected all, or numbers",
        ),
        ({"config.json": CONFIG, "model.safetensors": ""}, ("--text", "nowhere"), "nowhere: "),
        ({"config.json": CONFIG, "model.safetensors": ""}, (), "pip install 'lora-limits[models]'"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused_in_one_line(
    files, options, reason, tmp_path, capsys, monkeypatch
):
    for name in loading.EXTRA:
        monkeypatch.setitem(sys.modules, name, None)
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "text").write_text("words")
    assert main(["diagnose", str(folder), "--text", str(tmp_path / "text"), *options]) == 2
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1)
    assert reason in said


def test_help_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys; from lora_limits.cli import main\n"
        "try: main(['diagnose', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--tolerance" in done.stdout


def test_the_kept_diagnosis_says_one_thing_in_every_form():
    kept = json.loads((ROOT / "paper_figures" / "data" / "diagnose.json").read_text())
    assert len(kept["heads"]) == 72
    for row in kept["heads"]:
        within = [
            t
            for t in row["tried"]
            if max(t["error"] or 1e9, t["error_longer"] or 0) <= kept["tolerance"]
        ]
        assert within == [t for t in row["tried"] if t["within"]]
        assert (row["verdict"] == "never") == (not within)
        assert row["pays_from"] == min((t["pays_from"] for t in within), default=None)
        assert row["dials"] == dials.head_dials(row, kept["tolerance"])
    counts = [
        sum(row["verdict"] == name for row in kept["heads"]) for name in ("now", "later", "never")
    ]
    assert report.words(kept)[0].startswith(
        f"Of 72 heads, {counts[0]} pay now, {counts[1]} at longer lengths, {counts[2]} never at 10%"
    )
    said = summary.summary(kept)
    assert f"{counts[0]} pay now, {counts[1]} on longer texts, {counts[2]} never" in said[1]
    assert report.table(kept).row_count == 72
    shown = io.StringIO()
    Console(file=shown, width=80).print(report.table(kept))
    # a head stays on its line, extrapolated or not
    assert len([x for x in shown.getvalue().splitlines() if x.strip()]) == 72 + 3


def test_the_table_ends_with_the_checklist(capsys):
    """On request; ten lines at most without it."""
    kept = json.loads((ROOT / "paper_figures" / "data" / "diagnose.json").read_text())
    command._show(kept, None, table=False)
    assert len(capsys.readouterr().out.splitlines()) <= 10
    command._show(kept, None, table=True)
    assert capsys.readouterr().out.endswith(checklist.text())


def test_a_byte_order_mark_is_no_token_and_no_error(tmp_path, monkeypatch):
    """As some editors put it before a text, and before a config.json."""
    folder, text = tmp_path / "model", tmp_path / "text"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8-sig")
    text.write_text("words", encoding="utf-8-sig")
    assert loading.check_folder(folder) == CONFIG
    seen = []
    monkeypatch.setattr(loading, "require_extra", lambda: None)
    monkeypatch.setattr(loading, "load_model", lambda folder: None)
    monkeypatch.setattr(loading, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(texts, "windows", lambda model, tokenizer, words, **_: seen.append(words))
    monkeypatch.setattr(adapters, "random_adapter", lambda model: None)
    monkeypatch.setattr(command, "find_task", lambda *args: None)
    monkeypatch.setattr(command, "diagnose", lambda *args, **kwargs: {"heads": [{"refused": None}]})
    monkeypatch.setattr(command, "_show", lambda *args: None)
    assert main(["diagnose", str(folder), "--text", str(text)]) == 0
    assert seen == ["words"]


def test_the_picture_is_the_same_whatever_the_users_matplotlib_says(tmp_path):
    kept = json.loads((ROOT / "paper_figures" / "data" / "diagnose.json").read_text())
    plain = picture.save(kept, tmp_path / "plain.png").read_bytes()
    own = {"axes.grid": True, "text.usetex": True, "figure.dpi": 31, "savefig.bbox": "tight"}
    with matplotlib.rc_context(own):
        assert picture.save(kept, tmp_path / "other.png").read_bytes() == plain
        assert matplotlib.rcParams["text.usetex"]


def advised(rows, *, longest=10_000, gain=1.0):
    """The headline of a diagnosis of such heads."""
    payoff = {"share": 0.5, "most": 2.0, "exact": 100.0, "approximate": 100 * gain, "limit": 200.0}
    return summary.headline(
        {
            "model": "m",
            "task": "next token",
            "length": 512,
            "longest": longest,
            "payoff": payoff,
            "heads": rows,
        }
    )


def test_the_error_that_is_told_is_that_of_the_longest_text_tried():
    told = {"tolerance": 0.1, "length": 128}
    row = {"verdict": "never", "pays_from": None, "error": 1e-6}
    tried = row | {"longer": {"length": 2048, "error": 42.0}}
    assert "best over 1000% at 2,048 tokens" in summary._method(told, [tried, tried, row])
    lost = row | {"longer": {"length": 2048, "error": None}}
    assert "best over 1000%" in summary._method(told, [lost])
    assert "best 0% in the median head; 10% is allowed" in summary._method(told, [row])


def test_the_advice_is_one_of_four():
    dial = {"scale": 0.5, "pays_from": 900}
    now = {"verdict": "now", "pays_from": 512, "basis": "measured", "dial": dial}
    later = {"verdict": "later", "pays_from": 3000, "basis": "extrapolated", "dial": dial}
    never = {"verdict": "never", "pays_from": None, "basis": None, "dial": dial}
    lost = never | {"dial": dial | {"scale": None}}
    assert advised([now] * 4, gain=1.2) == "m: go, at 512 tokens"
    assert advised([later] * 3 + [lost]) == "m: go from 3,000 tokens (extrapolated)"
    measured = later | {"basis": "end to end"}
    assert advised([measured] * 3 + [lost]) == "m: go from 3,000 tokens (windows end to end)"
    # a length that the model does not take is no advice to go there
    said = "m: no, it would pay from 3,000 tokens (extrapolated)"
    assert advised([later] * 3 + [lost], longest=2048) == said
    said = "m: change the norms first, then go from 900 tokens"
    assert advised([never] * 3 + [lost]) == said
    # no pretrained model keeps its sense at a fifth of its norms
    far = never | {"dial": dial | {"scale": 0.2}}
    assert advised([far] * 4) == "m: no, at 512 tokens"
    assert advised([lost] * 4 + [later]) == "m: no, at 512 tokens"
    # what pays at this length in too little of a step is advice for longer texts
    assert advised([now] * 4, gain=1.01).startswith("m: go from 513 tokens")


def test_ten_lines_fit_a_terminal_and_the_page_holds_everything(tmp_path):
    kept = json.loads((ROOT / "paper_figures" / "data" / "diagnose.json").read_text())
    kept |= {"model": "a </script> & b", "task": "masked tokens"}
    kept["heads"][3] |= {"refused": "it caps its scores"}
    said = summary.summary(kept)
    assert len(said) == 9  # and one that names the files
    assert max(map(len, said)) <= 80
    path = page.save(kept, picture.save(kept, tmp_path / "p.png"), tmp_path)
    text = path.read_text()
    assert text.count("</script>") == 1
    assert "src=" not in text.replace('src="data:image/png;base64,', "")
    assert text.count("<tr class=") == 72
    assert "caps its scores" in text
    data = text.partition('id="diagnosis">')[2].partition("</script>")[0]
    assert json.loads(data.replace("<\\/", "</"))["heads"] == kept["heads"]


def test_heads_are_chosen_by_number_or_sampled_over_all_layers():
    few, many = {0: 4, 1: 4}, dict.fromkeys(range(30), 9)
    assert selection.select(few, None, None) == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
    assert selection.select(many, "2,4-5", "0,8") == {2: (0, 8), 4: (0, 8), 5: (0, 8)}
    sampled = selection.select(many, None, None)
    assert sum(map(len, sampled.values())) == selection.SAMPLE
    assert set(sampled) == set(many)
    assert len({head for heads in sampled.values() for head in heads}) == 9
    assert sum(map(len, selection.select(many, "all", None).values())) == 270
    with pytest.raises(ValueError, match="expected layers 0 to 1, heads 0 to 3"):
        selection.select(few, "7", None)
    # one that is not there among some that are
    for asked in (("0,7", None), ("0", "3-4")):
        with pytest.raises(
            ValueError, match=r"no (layer 7|head 4), expected layers 0 to 1, heads 0"
        ):
            selection.select(few, *asked)
