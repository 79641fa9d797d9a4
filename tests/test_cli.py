"""The command line: lists, shows, and tells a user's mistake in one line."""

import io
import itertools
import json
import os
import subprocess
import sys
import types

import pytest
import torch
import warm

import metaopt
from metaopt.cli import fitted, main, progress_of
from metaopt.cli.list import _as_lines
from metaopt.optimizers.torch_optim import RULES
from metaopt.registry import BrokenPlugin, Entry, Registry, registry


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    printed = capsys.readouterr()
    return int(exit.value.code or 0), printed.out, printed.err


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["explain", "--help"]])
def test_help_imports_no_torch(arguments):
    script = (
        "import sys\nfrom metaopt.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "heavy = {'torch', 'tensorboard', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_help_names_every_command(capsys):
    _, out, _ = called(capsys, "--help")
    assert {"list", "show", "explain"} <= set(out.replace("│", " ").split())


def test_list_shows_name_origin_and_description(capsys):
    status, out, _ = called(capsys, "list")
    assert status == 0
    line = next(line for line in out.splitlines() if line.split()[:1] == ["lookahead"])
    assert "metaopt" in line and "slow" in line


def test_list_of_one_kind_shows_nothing_else(capsys):
    _, out, _ = called(capsys, "list", "wrappers", "--json")
    listed = json.loads(out)
    assert {part["kind"] for part in listed["parts"]} == {"wrapper"}
    assert "lookahead" in {part["name"] for part in listed["parts"]}


def test_show_tells_defaults_bounds_formula_paper_and_other_names(capsys):
    _, out, _ = called(capsys, "show", "lookahead")
    for told in ("arXiv:1907.08610", "alpha", "> 0", "sync_period", "slow: a copy"):
        assert told in out


@pytest.mark.parametrize("name", [entry.name for entry in registry.entries() if entry.origin == "metaopt"])
def test_every_part_is_shown_with_what_it_keeps(capsys, name):
    status, out, err = called(capsys, "show", name)
    assert (status, err) == (0, "")
    target = registry.find(name).target
    told = [*getattr(target, "hyperparameters", ()), *getattr(target, "slots", ()), *getattr(target, "counters", ())]
    assert all(word in out for word in told) and "(no description)" not in out


def test_show_tells_what_is_kept_and_counted(capsys):
    _, out, _ = called(capsys, "show", "accumulate")
    assert "sum: shaped like the parameter, zero at first; there before the first update" in out
    assert "seen: how many gradients the sum holds" in out


@pytest.mark.parametrize("name", sorted(RULES))
def test_show_tells_the_rule_the_source_the_meanings_and_the_state_of_torch_s_optimizers(capsys, name):
    _, out, _ = called(capsys, "show", name)
    assert "w <- " in out or "Adam's" in out
    assert any(source in out for source in ("arXiv:", "doi:", "jmlr.org"))
    assert "state per parameter of" in out


def test_every_optimizer_of_torch_has_a_rule_that_show_tells():
    offered = {entry.name for entry in registry.entries("optimizer") if entry.origin == "metaopt"}
    assert offered - {"partition", "switch"} == set(RULES)


def test_show_tells_what_an_optimizer_keeps_and_what_its_arguments_mean(capsys):
    _, out, _ = called(capsys, "show", "adamw")
    lines = [line.strip() for line in out.splitlines()]
    assert {"step: one number", "exp_avg: shaped like the parameter", "exp_avg_sq: shaped like the parameter"} <= {
        *lines
    }
    assert any(line.startswith("weight_decay") and line.endswith("weight decay coefficient") for line in lines)
    assert "see https://arxiv.org/abs/1711.05101" in lines


def test_the_curve_s_label_is_the_peak_also_where_it_stands_between_two_columns(capsys):
    _, out, _ = called(capsys, "show", "one_cycle")
    assert next(line.split()[0] for line in out.splitlines() if "│" in line) == "1"


def test_where_the_rule_of_another_library_differs_is_told_beside_its_name(capsys):
    _, out, _ = called(capsys, "show", "one_cycle")
    told = " ".join(out.split())
    assert "In optax, both come one update later" in told and "cosine_onecycle_schedule" in told


def test_a_long_description_is_listed_as_its_first_sentence(capsys):
    _, out, _ = called(capsys, "list", "optimizers", "--json")
    (told,) = [part["description"] for part in json.loads(out)["parts"] if part["name"] == "sparse_adam"]
    assert told == "SparseAdam implements a masked version of the Adam algorithm suitable for sparse gradients."


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_lines_are_broken_between_words(monkeypatch, width):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    words = " ".join(f"word{number}" for number in range(60))
    lines = fitted(f"  name  1.0   {words}\n{words}", hanging=2).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == f"name 1.0 {words} {words}"
    table, prose = lines[: len(lines) // 2], lines[len(lines) // 2 + 1 :]
    assert all(line.startswith(" " * 14 + "word") for line in table[1:])
    assert all(line.startswith("  word") for line in prose[-2:])


def test_a_pipe_gets_whole_lines():
    assert fitted("word " * 100) == "word " * 100


def test_a_list_on_a_terminal_names_an_origin_once_and_fits(monkeypatch, tmp_path):
    (tmp_path / "listed_here.py").write_text(
        "import torch\nfrom metaopt import hookimpl\n"
        "class Mine(torch.optim.SGD):\n    'Descends, which takes a good many words to say, and then some more.'\n"
        "@hookimpl\ndef metaopt_optimizers():\n    return {'mine.of_a_rather_long_name': Mine}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    fresh = Registry()
    fresh.load_plugin_module("listed_here")
    print(_as_lines(fresh.entries(), [BrokenPlugin("ill", "RuntimeError: " + "a long reason " * 12)]))
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("optimizers of metaopt ") for line in lines) == 1
    assert lines[lines.index("optimizers of listed_here") + 1].startswith(
        "  mine.of_a_rather_long_name  Descends, which"
    )
    # what is wrong is told whole
    assert " ".join(" ".join(lines[lines.index("broken plugins") :]).split()).count("a long reason") == 12


def test_a_name_that_two_plugins_offer_is_listed_as_such(monkeypatch):
    for name in ("first_of_them", "second_of_them"):
        module = types.ModuleType(name)
        parts = {"offered_twice": type("Twice", (torch.optim.SGD,), {})}
        module.metaopt_optimizers = metaopt.hookimpl(specname="metaopt_optimizers")(lambda parts=parts: parts)
        monkeypatch.setitem(sys.modules, name, module)
    fresh = Registry()
    fresh.load_plugin_module("first_of_them")
    fresh.load_plugin_module("second_of_them")
    assert "  offered_twice: first_of_them and second_of_them" in _as_lines(fresh.entries(), []).splitlines()


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr("metaopt.cli.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_of("training runs") as show:
        for done in range(1, 11):
            show(done, 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"training runs: {done} of 10" for done in (3, 6, 9)]


def test_explain_says_over_what_where_no_problem_is_named(capsys):
    _, out, _ = called(capsys, "explain", "sgd(lr=0.1)")
    assert "16 x 16" in out and "--problem" in out
    _, out, _ = called(capsys, "explain", "sgd(lr=0.1)", "--problem", "xor")
    assert "16 x 16" not in out


def test_show_draws_the_curve_of_a_schedule(capsys):
    _, out, _ = called(capsys, "show", "cosine")
    rows = [line for line in out.splitlines() if "│" in line]
    filled = [sum(mark not in " │" for mark in row.partition("│")[2]) for row in rows]
    assert len(rows) == 10
    # a falling curve: the higher the row, the less of it is filled
    assert filled == sorted(filled) and filled[0] < filled[-1]


def test_show_draws_a_schedule_given_with_arguments(capsys):
    status, out, _ = called(capsys, "show", "warmup(cosine(0.25), 0.1)")
    assert status == 0
    assert "0.25" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "lookahed"], "Did you mean lookahead?"),
        (["list", "gadgets"], "wrappers"),
        (["list", "--jsn"], "--jsn"),
        (["lst"], "lst"),
        (["show"], "NAME"),
        (["show", "adamw(1.0)"], "of a schedule alone"),
        (["explain", "adamw | lookahed"], "lookahed"),
        (["explain", "adamw(lr=-1.0)"], "adamw"),
        (["explain", "__import__('os').system('true')"], "spec"),
        (["explain", "adamw", "--problem", "no_such_problem"], "no_such_problem"),
        (["explain", "nowhere.pt"], "nowhere.pt"),
        (["list", "--plugin", "no_such_module_anywhere"], "no_such_module_anywhere"),
        (["list", "--plugin", "colorsys"], "offers nothing"),
        (["show", "cosine(0.1"], "never closed"),
        (["show", "exponential(1e308, gamma=10.0)"], "not finite"),
        (["show", "warmup(0.1, 5000)"], "begins after 5000 updates, and there are 1000"),
        (["explain", "."], "directory"),
        (["explain", "adamw(lr=cosine(0.1))"], "--steps"),
        (["train", "--device", "meta", "--problem", "xor"], "--device meta"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--resume", "--problem", "xor"], "--log"),
        (["train", "--stack", "adamw | adamw"], "one base"),
        (["compare", "-o", "adamw"], "two contenders"),
        (["compare", "adamw", "sgd"], "unexpected"),
        (["compare", "--lr-min", "0"], "lr-min"),
        (["comparee"], "Did you mean 'compare'? See"),
        (["list", "wrapers"], "for 'kind': 'wrapers' is not one of"),
        (["explain", "adamw(lr=1e-3, lr=2e-3)"], "lr is given twice"),
        (["train", "--problem", "xor(batch=3)"], "Did you mean batch_size?"),
        (["train", "--problem", "xor(3)"], "name(hyperparameter=value"),
        (["train", "--problem", "xor(batch_size=len)"], "does not allow 'len'"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_status_2(capsys, arguments, told):
    status, out, err = called(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert told in err


def test_a_problem_without_its_methods_is_one_line(capsys, monkeypatch):
    class Half(metaopt.Problem):
        """Has no methods."""

    monkeypatch.setattr(registry, "find", lambda name, kind=None: Entry("half", "problem", Half, "here"))
    status, out, err = called(capsys, "train", "--problem", "half")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "the problem half cannot be made" in err and "batches" in err


def test_a_problem_takes_hyperparameters_by_name(capsys):
    status, out, _ = called(capsys, "explain", "sgd(lr=0.1)", "--problem", "noisy_quadratic(dimensions=7)", "--json")
    assert status == 0
    assert json.loads(out)["rows"][0]["elements"] == 7


@pytest.mark.parametrize("content", [b"", b"hello", b"adamw | lookahead"])
def test_a_file_that_is_no_checkpoint_is_told_so(capsys, tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    status, out, err = called(capsys, "explain", str(tmp_path / "a.pt"))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "torch.save did not write it" in err


def test_a_terminal_also_shows_where_in_the_text_the_fault_is(monkeypatch):
    reading, writing = os.openpty()
    with os.fdopen(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with pytest.raises(SystemExit):
            main(["explain", "adamw | lookahed(k=5)"])
        terminal.flush()
        shown = b""
        while shown.count(b"\n") < 3:
            shown += os.read(reading, 4096)
    os.close(reading)
    told, text, carets = shown.decode().splitlines()
    assert told.startswith("metaopt: no part is called 'lookahed'")
    assert text[carets.index("^") : carets.rindex("^") + 1] == "lookahed"


@pytest.mark.parametrize(
    "arguments",
    [["show", "pull"], ["show", "pull(0.1)"], ["explain", "adamw | pull"], ["check", "pull"], ["bench", "sgd | pull"]],
)
def test_an_unknown_part_may_be_one_of_a_module_that_was_not_named(capsys, arguments):
    status, _, err = called(capsys, *arguments)
    assert status == 2
    assert "is called 'pull'" in err and "in a module of your own needs --plugin MODULE" in err


def test_a_list_in_a_terminal_says_how_one_s_own_parts_get_into_it(monkeypatch):
    lines = []
    for arguments in (["list", "spaces"], ["list", "spaces", "--plugin", "metaopt.spaces.intervals"]):
        monkeypatch.setattr(sys, "stdout", Terminal())
        with pytest.raises(SystemExit):
            main(arguments)
        lines.append(sys.stdout.getvalue().splitlines()[-1])
    assert "with --plugin MODULE" in lines[0] and "--plugin" not in lines[1]


def test_a_plugin_module_of_the_current_folder_is_listed(tmp_path):
    (tmp_path / "pull_here.py").write_text(
        "from metaopt import Wrapper, hookimpl\n"
        "class Pull(Wrapper):\n    '''Pulls.'''\n"
        "@hookimpl\ndef metaopt_wrappers():\n    return {'pull_here': Pull}\n"
    )
    status, out, errors = warm.run(["list", "wrappers", "--plugin", "pull_here"], tmp_path)
    assert status == 0, errors
    assert "pull_here" in out


def test_a_plugin_that_raises_on_import_is_one_line(tmp_path):
    (tmp_path / "broken_here.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    status, _, errors = warm.run(["list", "--plugin", "broken_here"], tmp_path)
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert "RuntimeError" in errors


@pytest.mark.slow
def test_a_reader_that_leaves_early_causes_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "metaopt", "list"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""
