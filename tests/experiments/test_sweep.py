"""Sweeps: settings from a config file, results of each, one page for all."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict
from experiments import calibration, cli, plots, results, sweep, sweep_page, sweep_workers
from models import hf_checkpoint, sizes, transformer
from models.errors import InputError

CONFIG = """
from experiments.config_parts import comparison, method


def get_config():
    config = comparison("tiny")
    config.models.target = config.models.draft = {checkpoint!r}
    config.data.update(num_prompts=2, prompt_tokens=16)
    config.decode.update(max_new_tokens=8, repeats=1, temperatures=(0.0,))
    config.lossless.samples = 0
    config.decode.methods = (method("plain", "autoregressive"),)
    return config


def sweep():
    return [
        {{
            "decode.methods": (
                method("plain", "autoregressive"),
                method("tree", "top_tree", branching=branching),
            ),
            {field!r}: name,
        }}
        for name, branching in (("narrow", "1-1"), ("wide", "2-1"))
    ]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    config = sizes.get("tiny_llama")
    hf_checkpoint.save(directory, config, transformer.init(config, jax.random.key(0)))
    return directory


def write_config(directory, checkpoint, field="name"):
    path = directory / "tiny.py"
    path.write_text(CONFIG.format(checkpoint=str(checkpoint), field=field))
    return str(path)


def test_every_setting_is_run_once_and_shown_together(tmp_path, checkpoint):
    argument = write_config(tmp_path, checkpoint)
    configs = sweep.settings(argument)
    assert [config.name for config in configs] == ["narrow", "wide"]
    found = sweep.execute(configs, tmp_path / "work")
    labels = [(r["setting"], r["label"]) for r in found["runs"]]
    assert labels == [(s, m) for s in ("narrow", "wide") for m in ("plain", "tree")]
    # The draft is the target itself: all of a path is right at temperature 0.
    assert all(r["tokens_per_target_call"] > 2 for r in found["runs"] if r["label"] == "tree")
    work = tmp_path / "work"
    assert json.loads((work / "sweep.json").read_text()) == json.loads(json.dumps(found))
    assert (work / "sweep.html").read_text().count("<svg") == 2
    first = (work / "000" / "results.json").read_text()
    assert sweep.execute(configs, work) == found  # nothing is run again
    assert (work / "000" / "results.json").read_text() == first


def program(monkeypatch, capsys, *arguments):
    """`experiments.sweep` in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run_main(sweep.main, sweep.FLAGS)
    return (end.value.code or 0, *capsys.readouterr())


def test_workers_leave_others_alone_when_a_setting_dies(tmp_path, checkpoint, monkeypatch, capsys):
    """Three processes: one killed outright, one of bad input. A second run makes up for both."""
    path = tmp_path / "tiny.py"
    path.write_text(
        CONFIG.format(checkpoint=str(checkpoint), field="name").replace(
            "def sweep():",
            """def sweep():
    import os
    import sys
    bad = os.environ.get("BREAK_SWEEP")
    if bad and "--setting=0" in sys.argv:
        os.kill(os.getpid(), 9)
    return [
        {"name": "killed"},
        {"name": "bad", "decode.methods": (method("tree", "no_such" if bad else "top_tree"),)},
        {"name": "good"},
    ]


def unused():""",
        )
    )
    work = tmp_path / "work"
    flags = (f"--config={path}", f"--workdir={work}", "--workers=2")
    monkeypatch.setenv("BREAK_SWEEP", "1")
    status, out, err = program(monkeypatch, capsys, *flags)
    assert status == sweep.FAILED
    assert "failed: killed: exit status 137" in err and "failed: bad: exit status 2" in err
    assert "no_such" in err and "good" in out
    with (work / "sweep.csv").open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["good"]
    page = (work / "sweep.html").read_text()
    assert "<b>killed</b> failed" in page and "<td>good</td>" in page
    good = (work / "002" / "results.json").stat().st_mtime_ns
    monkeypatch.delenv("BREAK_SWEEP")
    shutil.rmtree(work / "001")  # begun with the bad config, which it would hold on to
    status, out, err = program(monkeypatch, capsys, *flags[:2])
    assert status == 0 and "killed" in out and "failed" not in err
    assert (work / "002" / "results.json").stat().st_mtime_ns == good


def test_a_setting_is_run_by_number_and_the_page_is_written_later(
    tmp_path, checkpoint, monkeypatch, capsys
):
    """As work units elsewhere do it; a setting that fails in this process is named as well."""
    path = write_config(tmp_path, checkpoint)
    work = tmp_path / "work"
    flags = (f"--config={path}", f"--workdir={work}")
    status, _, err = program(monkeypatch, capsys, *flags, "--setting=2")
    assert status == cli.BAD_INPUT and "setting: 2 is not there; allowed: 0 to 1" in err
    assert program(monkeypatch, capsys, *flags, "--setting=1")[0] == 0
    assert not (work / "sweep.json").exists()
    status, out, _ = program(monkeypatch, capsys, *flags, "--collect")
    assert status == 0 and "wide" in out and "narrow" not in out
    # Something else is in the way of setting 0.
    (work / "000").write_text("")
    status, out, err = program(monkeypatch, capsys, *flags)
    assert status == sweep.FAILED and "failed: narrow: " in err and "wide" in out
    (work / "000").unlink()
    status, out, err = program(monkeypatch, capsys, *flags)
    assert status == 0 and "narrow" in out and "failed" not in err
    assert "failed" not in json.loads((work / "sweep.json").read_text())


def test_no_more_workers_than_asked_and_what_they_print_is_kept(tmp_path):
    """Tasks note when they begin and end; at no time do three of five overlap."""
    code = (
        "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); a = time.time();"
        "time.sleep(0.3); p.write_text(f'{a} {time.time()}'); print('done', p.name); sys.exit(3)"
    )
    tasks = {
        n: sweep_workers.Task(
            sweep_workers.python("-c", code, str(tmp_path / str(n))), tmp_path / f"{n}.log"
        )
        for n in range(5)
    }
    ended = []
    statuses = sweep_workers.run(tasks, 2, lambda number, status: ended.append(number))
    assert statuses == dict.fromkeys(range(5), 3) and sorted(ended) == list(range(5))
    spans = [tuple(map(float, (tmp_path / str(n)).read_text().split())) for n in range(5)]
    overlaps = [sum(a <= begin < b for a, b in spans) for begin, _ in spans]
    assert max(overlaps) == 2
    assert sweep_workers.last_words(tasks[4].log) == "done 4"
    assert sweep_workers.last_words(tmp_path / "none") == "it printed nothing"


def test_a_terminated_sweep_lets_its_workers_save(tmp_path):
    """SIGTERM to the parent: the worker gets it too, has time to end, and the status says so."""
    worker = (
        "import pathlib, signal, sys, time\n"
        "def end(*_): pathlib.Path('saved').write_text(''); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path('begun').write_text('')\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "worker.py").write_text(worker)
    parent = (
        "from pathlib import Path; from experiments import sweep_workers as w;"
        "w.run({n: w.Task(w.python('worker.py'), Path(f'{n}.log')) for n in range(3)}, 1)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(sweep.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "saved").exists() and not (tmp_path / "1.log").exists()


def test_mistakes_in_a_sweep_are_named(tmp_path, checkpoint):
    with pytest.raises(InputError, match=r"no field 'decode.tokens' in the config"):
        sweep.settings(write_config(tmp_path, checkpoint, field="decode.tokens"))
    path = tmp_path / "none.py"
    path.write_text("from experiments.config_parts import comparison\nget_config = comparison\n")
    with pytest.raises(InputError, match="has no function sweep"):
        sweep.settings(f"{path}:x")


def test_what_verification_tried_and_what_it_expects():
    """Root with children 1 and 2; node 2 has child 3. The second child is accepted, then 3."""
    q = np.log(np.array([[[0.5, 0.3, 0.2]] * 4]))
    tree = DraftTree(
        tokens=np.array([[0, 0, 1, 2]]),
        parent=np.array([[-1, 0, 0, 2]]),
        depth=np.array([[0, 1, 1, 2]]),
        valid=np.ones((1, 4), bool),
        log_q=q,
        max_depth=2,
        is_chain=False,
    )
    verdict = Verdict(np.array([[0, 2, 3]]), np.array([3]), np.array([[1, 2, 0]]))
    probability, fate, rows = calibration.tested(tree, verdict)
    np.testing.assert_allclose(probability, [0.5, 0.3, 0.2])
    assert fate.tolist() == [False, True, True] and rows.tolist() == [0, 0, 0]
    np.testing.assert_allclose(calibration.expected_tokens(tree), [0.5 + 0.3 + 0.3 * 0.2])


def run_record(setting, label, quality, speedup, *, keeps_law=False, role="target"):
    return {
        "setting": setting, "label": label, "temperature": 0.0, "batch_size": 1, "role": role,
        "keeps_law": keeps_law, "tokens_per_target_call": 2 * speedup, "speedup": speedup,
        "agreement": quality,
    }  # fmt: skip


def test_quality_is_drawn_over_cost_where_a_method_gives_it_away():
    runs = []
    for setting, quality in (("FB=0.2", 0.5), ("FB=0.9", 0.8)):
        runs += [
            run_record(setting, "plain", 1.0, 0.5, keeps_law=True),
            run_record(setting, "small", 0.25, 4.0, keeps_law=True, role="draft"),
            run_record(setting, "RB=2", quality, 1 / quality),
        ]
    calls, seconds, *others = sweep_page.figures({"settings": ["FB=0.2", "FB=0.9"], "runs": runs})
    assert len(others) == 2  # the usual two
    assert calls["y_label"] == "tokens as plain decoding"
    drawn = {s["label"]: (s["x"], s["y"]) for s in calls["series"]}
    assert drawn == {
        "plain": ([1.0], [1.0]), "small": ([0.0], [0.25]), "RB=2": ([0.25, 0.4], [0.5, 0.8]),
    }  # fmt: skip
    assert next(s for s in seconds["series"] if s["label"] == "RB=2")["x"] == [0.5, 0.8]
    lossless = [r for r in runs if r["label"] == "plain"]
    assert len(sweep_page.figures({"settings": ["FB=0.2"], "runs": lossless})) == 2


def test_layers_are_drawn_where_some_method_leaves_any_out():
    plain = run_record("a", "plain", 1.0, 1.0, keeps_law=True)
    early = run_record("a", "exit", 1.0, 1.5, keeps_law=True) | {"layers_per_token": 5.5}
    assert len(sweep_page.figures({"settings": ["a"], "runs": [plain]})) == 2
    charts = sweep_page.figures({"settings": ["a"], "runs": [plain, early]})
    (layers,) = [c for c in charts if c["y_label"] == "layers run for a token"]
    drawn = {s["label"]: (s["x"], s["y"]) for s in layers["series"]}
    assert drawn == {"plain": ([], []), "exit": (["a"], [5.5])}  # one colour in all charts


def test_panels_are_drawn_with_one_legend(tmp_path):
    spec = {"title": "t", "x_label": "x", "y_label": "y", "x_scale": "log", "x_ticks": [8, 16]}
    spec["series"] = [{"label": "a", "x": [8, 16], "y": [1, 2]}, {"label": "b", "x": [8], "y": [1]}]
    figure = plots.panels([spec] * 3)
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    plots.write_png(figure, tmp_path / "panels.png")
    assert (tmp_path / "panels.png").read_bytes()[:4] == b"\x89PNG"


def test_the_error_of_a_ratio_is_that_of_many_repeats():
    rng = np.random.default_rng(0)
    calls = rng.integers(10, 30, (4000, 24))
    tokens = calls * 3 + rng.normal(0, 4, calls.shape)
    ratios = tokens.sum(axis=1) / calls.sum(axis=1)
    errors = [results.ratio_error(a, b) for a, b in zip(tokens, calls)]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.03)
    assert results.ratio_error([3], [1]) == 0


def test_runs_that_say_nothing_of_a_law_are_charted_by_their_quality():
    """Images: their quality is a dict of its own, and no role is named."""

    def run(label, calls, accuracy):
        return {
            "label": label, "temperature": 1.0, "batch_size": 1, "tokens_per_target_call": calls,
            "speedup": 1.0, "agreement": 1.0, "quality": {"accuracy": accuracy},
        }  # fmt: skip

    found = [{"name": "k=1", "runs": [run("plain", 1.0, 0.4), run("tau", 2.0, 0.6)]}]
    collected = sweep_page.collect(found)
    charts = sweep_page.trade_offs(collected["runs"])
    assert [chart["y_label"] for chart in charts] == ["class accuracy"] * 2
    assert charts[0]["series"][1] == {"label": "tau", "x": [0.5], "y": [0.6]}
    assert "60.0% class accuracy" in sweep_page.quality(collected["runs"][1])
