"""The comparison of strategies: what is run, what is stored, and that a run that was ended goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import workers
from benchmarks.__main__ import main
from benchmarks.report import selection
from benchmarks.results import BenchmarkError
from benchmarks.selection import demo, engine, tuning
from benchmarks.selection.engine import Case, cases, missing, run
from benchmarks.selection.registry import TABLES, task_named
from benchmarks.selection.retention import BASES, VARIANTS, retention_rows
from benchmarks.selection.rows import ALL, LINEAR, PENALTIES, SHARES, Row, configuration_on, rows, some
from benchmarks.selection.store import Store
from benchmarks.selection.task import Configuration, Record
from slora.runs.settings import TrainSettings

pytestmark = pytest.mark.once

PLAIN = Configuration("plain", {"lr": 0.1})
OTHER = Configuration("other", {"lr": 0.1, "budget": 4})


def record(target: float = 90.0, lost: float = 1.0, active: int = 4) -> Record:
    """What a run of the task of these tests measures."""
    return {
        "target": target, "nll": 0.5, "lost": {"knn": lost}, "drift": 0.1, "active": active, "blocks": 36, "ranks": 64,
        "kept": 970, "flops": None, "seconds": 1.0, "scaled": [],
    }  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that are run; the third and later ones find no time."""
    begun: list[Case] = []

    def run(work: Any, todo: Sequence[Case], *_: Any) -> Iterator[tuple[Case, dict[str, Any]]]:
        for i, case in enumerate(todo):
            if i < 2:
                begun.append(case)
            yield case, {"state": "done", "record": record()} if i < 2 else {"state": workers.NO_TIME}

    monkeypatch.setattr(workers, "run", run)
    return begun


def test_a_run_that_was_ended_goes_on_where_it_was_and_repeats_nothing(tmp_path: Path, ran: list[Case]) -> None:
    store, todo = Store(tmp_path), cases([PLAIN, OTHER], ["noisy", "mnist"], [0])
    assert len(missing(todo, store)) == 4
    run(todo, store, say=lambda _: None)
    run(todo, store, say=lambda _: None)
    run(todo, store, say=lambda _: None)
    assert [case.key for case in ran] == [case.key for case in todo]
    assert not missing(todo, store)
    (line,) = [each for each in store.runs("mnist") if each["row"] == "other"]
    assert line["settings"] == {"lr": 0.1, "budget": 4}
    assert line["seed"] == 0
    assert {"commit", "versions", *record()} <= line.keys()
    assert len((tmp_path / "mnist.jsonl").read_text()) < 2 * 600


def test_a_run_with_other_settings_or_without_a_scale_is_made_again_and_replaces_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (case,) = cases([PLAIN], ["noisy"], [0])
    store.add({**case.asked(), **record()})
    changed = Configuration("plain", {"lr": 0.2})
    for other in (changed, Configuration("plain", {"lr": 0.1}, (0.5,)), Configuration("plain", {"lr": 0.1}, (), "old")):
        assert missing(cases([other], ["noisy"], [0]), store)
    store.add({**cases([changed], ["noisy"], [0])[0].asked(), **record(80.0)})
    assert [(each["settings"], each["target"]) for each in store.runs("noisy")] == [({"lr": 0.2}, 80.0)]


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(BenchmarkError, match="another process is writing into")
    with Store(tmp_path).alone(), refused, Store(tmp_path).alone():
        pass
    with Store(tmp_path).alone():
        pass


def test_cases_go_seed_by_seed_over_all_tasks(tmp_path: Path) -> None:
    found = cases([PLAIN, OTHER], ["noisy", "mnist"], [0, 1])
    assert [(case.seed, case.configuration.name, case.task) for case in found[:4]] == [
        (0, "plain", "noisy"), (0, "plain", "mnist"), (0, "other", "noisy"), (0, "other", "mnist")
    ]  # fmt: skip
    assert {case.seed for case in found[4:]} == {1}


@pytest.mark.parametrize("table", TABLES)
def test_no_row_is_there_twice_and_every_weight_of_its_tuning_is_accepted(table: str) -> None:
    chosen = TABLES[table]()
    assert len({row.name for row in chosen}) == len(chosen)
    assert chosen[:2] == [ALL, LINEAR]
    for row in chosen:
        assert bool(row.weight) == bool(row.weights)
        for weight in row.weights or (None,):
            TrainSettings.from_dict({**row.configuration.settings, **({row.weight: weight} if row.weight else {})})


def test_all_blocks_are_trained_once_for_every_strategy() -> None:
    assert [row.name for row in rows() if row.share == 1.0] == ["all"]
    assert {row.share for row in rows() if row not in (ALL, LINEAR)} == set(SHARES)
    assert [row.name for row in some(rows(), ["all", "last"], [0.11])] == ["all", "last 11 %"]


def test_every_way_of_keeping_old_knowledge_runs_with_each_of_its_bases() -> None:
    named = {row.name: row for row in retention_rows()}
    assert {*named} - {"linear", *BASES} == {
        f"{base} + {name}" for name, each in VARIANTS.items() for base in each.bases
    }
    row = named["budget-solo 11 % + replay"]
    assert (row.share, row.weight, row.configuration.retain) == (0.11, "replay_weight", "labelled")
    own = {"strategy": "budget", "ranking": "solo", "budget": 0.11, "retain_weight": 0.0}
    assert row.configuration.settings == own
    # The curve to beat is that of plain LoRA alone.
    assert [each.name for each in named.values() if each.configuration.scales] == ["all"]


def test_rows_that_a_task_cannot_run_are_left_out() -> None:
    named = {row.name: row for row in retention_rows()}
    fit = {name: [each for each in named if named[each].fits(task_named(name))] for name in ("noisy", "glyphs")}
    assert fit["noisy"] == list(named)
    assert "linear" not in fit["glyphs"]
    assert not {"all + replay", "all + distil-generic"} & {*fit["glyphs"]}
    assert {"all", "all + l2", "all + ewc-old"} <= {*fit["glyphs"]}


class Task:
    """A task whose validation runs are known."""

    name = family = title = target = "known"
    retention = {"knn": "k-NN lost"}  # noqa: RUF012
    rates = (0.1, 0.2, 0.4)


def test_the_rate_is_the_one_with_the_highest_target_less_forgetting_and_the_penalty_the_nearest_to_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "task_named", lambda _: Task())
    monkeypatch.setattr(tuning, "TUNED_ON", ("known",))
    tuned = Store(tmp_path)
    trials = tuning.grid(ALL, "known", tuned)
    assert [case.configuration.settings["lr"] for case in trials] == [0.1, 0.2, 0.4]
    assert all(case.validation and case.seed not in engine.SEEDS for case in trials)
    for case, target, lost in zip(trials, (80.0, 90.0, 95.0), (0.0, 2.0, 9.0), strict=True):
        assert tuning.chosen(ALL, "known", tuned) is None
        tuned.add({**case.asked(), **record(target, lost)})
    found = tuning.chosen(ALL, "known", tuned)
    assert found is not None
    assert (found.name, found.settings["lr"], found.scales) == ("all", 0.2, ALL.configuration.scales)

    gates = next(row for row in some(rows(), ["gates"]) if row.share == 0.11)
    first = tuning.grid(gates, "known", tuned)
    # Of 36 blocks 11 % are 4: the fourth penalty leaves 5, the fifth 3.
    for case, active in zip(first, (30, 20, 10, 5, 3, 0), strict=True):
        tuned.add({**case.asked(), **record(active=active)})
    assert tuning.weight_of(gates, "known", tuned) == PENALTIES[3]
    assert tuning.chosen(gates, "known", tuned) is None
    second = tuning.grid(gates, "known", tuned)[len(first) :]
    assert [case.configuration.settings["lr"] for case in second] == [0.1, 0.2, 0.4]
    assert {case.configuration.settings["penalty"] for case in second} == {PENALTIES[3]}
    for case in second:
        tuned.add({**case.asked(), **record(case.configuration.settings["lr"])})
    found = tuning.chosen(gates, "known", tuned)
    assert found is not None
    assert (found.settings["lr"], found.settings["penalty"]) == (0.4, PENALTIES[3])


def test_a_weight_is_the_one_of_the_highest_score_at_a_middle_rate_and_rates_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "task_named", lambda _: Task())
    monkeypatch.setattr(tuning, "TUNED_ON", ("known",))
    row = Row("l2", 1.0, "L2", Configuration("all + l2", {"method": "lora"}), "l2_penalty", (0.01, 0.1, 1.0))
    tuned = Store(tmp_path)
    first = tuning.grid(row, "known", tuned)
    assert [(case.configuration.settings["lr"], case.configuration.settings["l2_penalty"]) for case in first] == [
        (0.2, 0.01), (0.2, 0.1), (0.2, 1.0)
    ]  # fmt: skip
    for case, target, lost in zip(first, (90.0, 89.0, 80.0), (6.0, 2.0, 0.0), strict=True):
        tuned.add({**case.asked(), **record(target, lost)})
    second = [case for case in tuning.grid(row, "known", tuned) if case.key not in {each.key for each in first}]
    # The rate in the middle is there.
    assert [case.configuration.settings for case in second] == [
        {"method": "lora", "lr": rate, "l2_penalty": 0.1} for rate in (0.1, 0.4)
    ]
    for case, target in zip(second, (89.5, 70.0), strict=True):
        tuned.add({**case.asked(), **record(target, 2.0)})
    found = tuning.chosen(row, "known", tuned)
    assert found == Configuration("all + l2", {"method": "lora", "lr": 0.1, "l2_penalty": 0.1})


def test_what_is_retained_changes_the_result() -> None:
    settings = {"method": "lora", "lr": 7e-3, "retain_weight": 8.0, "replay_weight": 8.0}
    kinds, task = (None, "old", "mixed", "labelled"), task_named("noisy")
    found = [task.run(Configuration("all", settings, (), kind), 1, quick=True) for kind in kinds]
    settings["replay_weight"] = 0.1
    found.append(task.run(Configuration("all", settings, (), "labelled"), 1, quick=True))
    assert len({each["drift"] for each in found}) == 5
    assert {each["flops"] for each in found} == {None}


def test_without_a_head_the_pretrained_model_stands_for_the_linear_probe() -> None:
    for name, added in (("noisy", ()), ("glyphs", (0.0,))):
        plain, other = (configuration_on(row.configuration, task_named(name)) for row in (ALL, rows()[5]))
        assert (plain.name, plain.scales) == ("all", (*added, *ALL.configuration.scales))
        assert other == rows()[5].configuration


def test_the_command_tunes_then_runs_then_finds_nothing_to_do_and_the_page_shows_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(work: Any, todo: Sequence[Case], *_: Any) -> Iterator[tuple[Case, dict[str, Any]]]:
        yield from ((case, work(case)) for case in todo)

    monkeypatch.setattr(workers, "run", here)
    monkeypatch.setattr(tuning, "TUNED_ON", ("noisy",))
    monkeypatch.setattr(demo.Shift, "rates", (7e-3,))
    options = "--quick --tune --tasks noisy --strategies linear last --shares 0.11 --seeds 0 --out".split()
    assert main(["selection", *options, str(tmp_path)]) == 0
    assert [run["row"] for run in Store(tmp_path).runs("noisy")] == ["last 11 %", "linear"]
    capsys.readouterr()
    assert main(["selection", *options, str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(" 0 to do") == 3
    (scope,) = selection.scopes(Store(tmp_path))
    assert [line.label for line in scope.found] == ["linear probe", "last"]
    # Of the first seed FLOPs are counted.
    assert [len(line.values.get("flops", ())) for line in scope.found] == [1, 1]


def test_the_runs_of_the_page_stay_out_of_quick_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selection", "--quick"]) == 2
    assert "--quick needs --out" in capsys.readouterr().err


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(BenchmarkError, match="task 'cats' is unknown; use some of digits"):
        task_named("cats")


def test_a_quick_run_of_the_demo_measures_everything_and_keeps_the_old_task_when_scaled_to_nothing() -> None:
    settings = {"budget": 4, "ranking": "norm", "lr": 7e-3}
    found = task_named("noisy").run(Configuration("budget", settings, (1e-6,), "generic"), 0, quick=True)
    assert (found["active"], found["blocks"], found["ranks"]) == (4, 36, 64)
    # The smallest blocks are 96 to 96, the largest 96 to 384 or back.
    assert 970 + 64 * 192 <= found["kept"] <= 970 + 64 * 480
    assert found["flops"] is not None
    assert found["drift"] > found["scaled"][0]["drift"]
    assert found["scaled"][0]["drift"] < 1e-6
    assert found["scaled"][0]["lost"] == {"knn": 0.0, "head": 0.0}
    again = task_named("noisy").run(Configuration("budget", settings, (), "generic"), 0, quick=True)
    assert [again[name] for name in ("target", "nll", "drift")] == [found[name] for name in ("target", "nll", "drift")]  # type: ignore[literal-required]
