"""The CSV logger: one table per run, read back in one line."""

import csv
import math

import pytest
import torch

import metaopt
from metaopt import LogError
from metaopt.loggers.csv import Csv


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_a_table_with_a_row_for_each_point(tmp_path):
    path = tmp_path / "run.csv"
    model = torch.nn.Linear(2, 1)
    opt = metaopt.build(model, "adamw(lr=0.1) | monitor", log=metaopt.csv(path), log_every=2)
    for _ in range(4):
        model(torch.ones(3, 2)).sum().backward()
        opt.step()
    opt.record({"val/loss": 0.5})
    opt.close()
    rows = table(path)
    assert [row["step"] for row in rows] == ["2", "4", "4"]
    assert float(rows[0]["train/learning_rate"]) == pytest.approx(0.1)
    assert float(rows[1]["monitor/update_ratio/weight"]) > 0.0
    assert rows[0]["val/loss"] == "" and rows[2]["val/loss"] == "0.5"


def test_pandas_reads_it_in_one_line(tmp_path):
    pandas = pytest.importorskip("pandas")
    log = Csv(tmp_path / "run.csv")
    log.open(step=0, tags=["a"], spec="sgd", hparams={})
    log.scalars(1, {"a": 1.0})
    log.scalars(2, {"a": math.nan, 'b, "c"': math.inf})
    frame = pandas.read_csv(tmp_path / "run.csv")
    assert list(frame.columns) == ["step", "a", 'b, "c"'] and frame["a"][0] == 1.0
    assert math.isnan(frame["a"][1]) and frame['b, "c"'][1] == math.inf


def test_a_resumed_run_goes_on_without_later_rows_and_a_row_that_was_cut_off(tmp_path):
    path = tmp_path / "run.csv"
    log = Csv(path)
    log.open(step=0, tags=["a"], spec="sgd", hparams={})
    for step in range(1, 6):
        log.scalars(step, {"a": float(step)})
    with path.open("a") as file:
        file.write("3,")
    again = Csv(path)
    again.open(step=3, tags=["a"], spec="sgd", hparams={})
    again.scalars(4, {"a": 40.0, "b": 1.0})
    assert [(row["step"], row["a"], row["b"]) for row in table(path)] == [
        ("1", "1.0", ""), ("2", "2.0", ""), ("3", "3.0", ""), ("4", "40.0", "1.0"),
    ]  # fmt: skip


def test_a_new_run_keeps_the_table_of_an_earlier_one(tmp_path):
    for value in (1.0, 2.0):
        log = Csv(tmp_path / "run.csv")
        log.open(step=0, tags=["a"], spec="sgd", hparams={})
        log.scalars(1, {"a": value})
    assert table(tmp_path / "run.1.csv")[0]["a"] == "1.0" and table(tmp_path / "run.csv")[0]["a"] == "2.0"


def test_another_table_is_not_written_over(tmp_path):
    path = tmp_path / "prices.csv"
    path.write_text("name,price\nx,1\n")
    with pytest.raises(LogError, match="not a log of metaopt"):
        Csv(path)
    assert path.read_text() == "name,price\nx,1\n"
