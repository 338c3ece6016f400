from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import pytest

from harness import Command, Json
from runner.comparison import (
    Comparison,
    Difference,
    Pairs,
    compare,
    difference_cells,
    finding,
    is_run,
    show_comparisons,
)
from runner.config import (
    BudgetConfig,
    DatasetConfig,
    DatasetKind,
    Dedupe,
    LimitsConfig,
    RunnerConfig,
    ScorerConfig,
    SimulatorConfig,
    TrackerConfig,
    TrackerKind,
)
from runner.experiment import run_experiment
from runner.intervals import Interval


class Runs:
    """Runs of simulated models over questions with known answers."""

    def __init__(self, folder: Path, rows: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.questions = folder / "questions.jsonl"
        with self.questions.open("w") as file:
            file.writelines(
                f'{{"question": "What is word number {number} of it all?", "answer": "word{number}"}}\n'
                for number in range(rows)
            )

    async def run(self, name: str, accuracy: float = 1.0, *, seed: int = 0, **changes: Any) -> tuple[str, Path]:
        settings: dict[str, Any] = {
            "model": f"simulated/{name}",
            "dataset": DatasetConfig(kind=DatasetKind.jsonl, path=str(self.questions)),
            "prompt": "{{ question }}",
            "scorers": {"accuracy": ScorerConfig(target="answer")},
            "simulator": SimulatorConfig(
                seed=seed, latency_s=0.0, answers=str(self.questions), accuracy=accuracy, latency_spread=0
            ),
            "tracker": TrackerConfig(kind=TrackerKind.none),
            "limits": LimitsConfig(concurrency=64),
        }
        folder = self.folder / name
        await run_experiment(RunnerConfig(**{**settings, **changes}), folder)
        return name, folder


def of(comparison: Comparison, figure: str) -> Difference:
    [difference] = [each for each in comparison.differences if each.figure == figure]
    return difference


async def test_figures_are_compared_row_by_row(tmp_path: Path) -> None:
    runs = Runs(tmp_path, 300)
    [comparison] = await compare([await runs.run("a", 0.6), await runs.run("b", 0.9)])

    accuracy = of(comparison, "score accuracy")
    assert (comparison.first, comparison.second, accuracy.pairs) == ("a", "b", 300)
    assert accuracy.value == pytest.approx(0.3, abs=0.1)
    assert accuracy.is_told
    assert finding(accuracy) == "higher"
    assert {each.figure for each in comparison.differences} == {
        "score accuracy",
        "latency_s",
        "prompt_tokens",
        "completion_tokens",
        "cost_usd",
    }


async def test_few_rows_cannot_tell_and_say_how_many_could(tmp_path: Path) -> None:
    runs = Runs(tmp_path, 50)
    [comparison] = await compare([await runs.run("a", 0.7, seed=1), await runs.run("b", 0.75, seed=1)])
    accuracy = of(comparison, "score accuracy")

    assert not accuracy.is_told
    assert "cannot tell" in finding(accuracy)
    assert accuracy.value == 0 or (accuracy.pairs_wanted or 0) > 50


@pytest.mark.parametrize(
    ("figure", "half", "wanted"),
    [("score words", 2.0, "71 rows"), ("score words", 12.0, "2.5k rows"), ("latency_s", 2.0, "71 requests")],
)
def test_what_it_would_take_is_a_whole_number(figure: str, half: float, wanted: str) -> None:
    difference = Difference(
        figure=figure,
        pairs=10,
        independent=10,
        first=1.0,
        second=2.0,
        interval=Interval(low=1 - half, high=1 + half),
        is_share=False,
    )

    assert finding(difference) == f"cannot tell: it would take about {wanted}"


@pytest.mark.parametrize("answers", [2, 3, 4])
def test_rows_that_share_answers_and_cannot_tell_say_what_they_count_as(answers: int) -> None:
    pairs = Pairs()
    for row in range(600):
        pairs.add({"score right": [1.0]}, {"score right": [float(row % answers == 0)]}, alike=600 // answers)
    [difference] = pairs.differences()

    assert (difference.pairs_wanted or 0) > answers
    assert finding(difference).endswith(
        f" rows with an answer each; these {difference.pairs} share theirs and tell as much as {answers}"
    )


def test_rows_that_share_too_few_answers_say_so() -> None:
    pairs = Pairs()
    for row in range(100):
        pairs.add({"score words": [row % 2]}, {"score words": [3.5 + row % 2]}, alike=50)
    [difference] = pairs.differences()

    assert finding(difference) == "too few rows with an answer each; these 100 share theirs and tell as much as 2"


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_cannot_tell_want_more_rows_than_there_are(seed: int) -> None:
    for rows in (4, 8, 15):
        difference = drawn(seed, rows)
        assert difference.pairs_wanted is None or difference.pairs_wanted > rows


async def test_a_model_is_no_different_from_itself(tmp_path: Path) -> None:
    runs = Runs(tmp_path, 100)
    [comparison] = await compare([await runs.run("a", 0.7), ("again", tmp_path / "a")])
    accuracy = of(comparison, "score accuracy")

    assert accuracy.value == 0
    assert accuracy.interval is not None
    assert 0 in accuracy.interval
    assert finding(accuracy) == "cannot tell: no difference in these rows"
    assert finding(of(comparison, "prompt_tokens")) == "the same"


async def test_other_rows_are_refused(tmp_path: Path) -> None:
    first = await Runs(tmp_path, 30).run("a")
    second = await Runs(tmp_path, 31).run("b")
    [comparison] = await compare([first, second])

    assert comparison.refusal == "their rows differ: compare runs over the same dataset"
    assert not comparison.differences


async def test_rows_that_bring_their_own_prompts_are_other_rows_where_these_differ(tmp_path: Path) -> None:
    async def run(name: str, text: str, **changes: Any) -> tuple[str, Path]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"prompt": "{text} {number}"}}\n' for number in range(20)))
        dataset = DatasetConfig(kind=DatasetKind.jsonl, path=str(path))
        return await Runs(tmp_path, 0).run(name, dataset=dataset, prompt=None, scorers={}, **changes)

    first = await run("a", "Say")
    other = await run("b", "Name")
    stopped = await run("c", "Name", budget=BudgetConfig(requests=5), limits=LimitsConfig(concurrency=2))
    refusals = [each.refusal or "" for each in await compare([first, other, stopped, await run("d", "Say")])]

    assert "their rows differ" in refusals[0]
    assert "when both have seen all of them" in refusals[1]
    assert refusals[2] == ""


async def test_prompts_are_compared_over_the_same_rows_and_named_as_that(tmp_path: Path) -> None:
    runs = Runs(tmp_path, 40)
    first, second = await runs.run("a"), await runs.run("b", prompt="Answer briefly: {{ question }}")
    [comparison] = await compare([first, second])

    assert comparison.refusal is None
    assert not comparison.same_prompts
    assert of(comparison, "prompt_tokens").value > 0


async def test_samples_of_a_row_count_as_one(tmp_path: Path) -> None:
    runs = Runs(tmp_path, 40)
    thrice = await runs.run("a", samples=3)
    comparisons = await compare([thrice, await runs.run("b", 0.5, samples=3), await runs.run("c", 0.5)])

    assert [of(comparison, "score accuracy").pairs for comparison in comparisons] == [40, 40]


async def test_rows_that_share_an_answer_are_measured_once_and_no_evidence_of_their_own(tmp_path: Path) -> None:
    once, often = Runs(tmp_path / "once", 40), Runs(tmp_path / "often", 40)
    often.questions.write_text(once.questions.read_text() * 5)
    sharing: dict[str, Any] = {"dedupe": Dedupe.always}
    [alone] = await compare([await once.run("a", 0.3), await once.run("b", 0.9)])
    [shared] = await compare([await often.run("a", 0.3, **sharing), await often.run("b", 0.9, **sharing)])

    accuracy, expected = of(shared, "score accuracy"), of(alone, "score accuracy")
    assert [accuracy.first, accuracy.second] == pytest.approx([expected.first, expected.second])
    assert accuracy.interval is not None
    assert expected.interval is not None
    assert accuracy.interval.low == pytest.approx(expected.interval.low)
    assert accuracy.interval.high == pytest.approx(expected.interval.high)
    assert accuracy.pairs == 200
    assert [of(shared, name).pairs for name in ("latency_s", "prompt_tokens", "cost_usd")] == [40, 40, 40]
    assert "share" not in alone.note
    assert shared.note.startswith(
        "rows that share an answer count once in latency, tokens and cost, and widen the other intervals"
    )


async def test_time_and_cost_of_an_answer_of_another_run_are_not_compared(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", 5)
    first = await runs.run("a")
    second = await runs.run("again", model="simulated/a", reuse=True, runs_dir=str(tmp_path))
    [comparison] = await compare([first, second])

    assert {each.figure for each in comparison.differences}.isdisjoint({"latency_s", "cost_usd"})
    assert of(comparison, "completion_tokens").pairs == 5
    assert comparison.note == "latency and cost of answers that were taken over do not count"


@pytest.mark.parametrize("slower_by_s", [0.0, 0.1])
async def test_latencies_that_differ_come_with_what_else_may_be_the_cause(tmp_path: Path, slower_by_s: float) -> None:
    runs = Runs(tmp_path, 12)
    first = await runs.run("a", simulator=SimulatorConfig(latency_s=0.02))
    second = await runs.run("b", simulator=SimulatorConfig(latency_s=0.02 + slower_by_s, latency_spread=0))
    [comparison] = await compare([first, second])
    is_told = of(comparison, "latency_s").is_told
    assert is_told or not slower_by_s
    assert ("latency is of the time at which each ran" in comparison.note) is is_told


async def test_a_run_without_answers_is_refused(tmp_path: Path) -> None:
    runs = Runs(tmp_path, 10)
    first = await runs.run("a")
    nothing = RunnerConfig(
        model="simulated/b",
        dataset=DatasetConfig(kind=DatasetKind.jsonl, path=str(runs.questions), limit=0),
        prompt="{{ question }}",
        tracker=TrackerConfig(kind=TrackerKind.none),
    )
    await run_experiment(nothing, tmp_path / "b")
    [comparison] = await compare([first, ("b", tmp_path / "b")])

    assert comparison.refusal


def test_the_interval_of_70_and_75_percent_over_2000_rows_holds_the_truth_19_times_of_20() -> None:
    covered = 0
    for seed in range(20):
        difference = drawn(seed, 2000)
        assert difference.interval is not None
        covered += 0.05 in difference.interval

    assert covered >= 19


def test_fifty_rows_hardly_ever_tell_70_from_75_percent() -> None:
    assert sum(drawn(seed, 50).is_told for seed in range(20)) <= 3


def drawn(seed: int, rows: int) -> Difference:
    """The difference between models of 70 % and 75 % accuracy."""
    draw = random.Random(seed)
    pairs = Pairs()
    for _ in range(rows):
        pairs.add({"score a": [float(draw.random() < 0.7)]}, {"score a": [float(draw.random() < 0.75)]})
    [difference] = pairs.differences()
    return difference


@pytest.mark.parametrize(("here", "there", "shown"), [(0, 0, []), (1, 0, ["failed"]), (0, 1, ["failed"])])
def test_failures_are_compared_where_there_were_some(here: float, there: float, shown: list[str]) -> None:
    pairs = Pairs()
    pairs.add({"failed": [here]}, {"failed": [there]})

    assert [difference.figure for difference in pairs.differences()] == shown


def test_a_constant_difference_is_told() -> None:
    pairs = Pairs()
    for number in range(10):
        pairs.add({"latency_s": [number]}, {"latency_s": [number + 0.5]})
    [difference] = pairs.differences()

    assert difference.is_told
    assert difference.value == pytest.approx(0.5)


def test_counts_that_happen_to_be_one_are_no_shares() -> None:
    pairs = Pairs()
    for _ in range(10):
        pairs.add({"prompt_tokens": [1], "score right": [1]}, {"prompt_tokens": [1], "score right": [1]})
    right, tokens = pairs.differences()

    assert right.is_share
    assert not tokens.is_share
    assert finding(tokens) == "the same"


def test_what_adding_up_leaves_is_no_difference() -> None:
    difference = Difference(
        figure="cost_usd",
        pairs=4,
        independent=4,
        first=1.44e-05,
        second=1.44e-05 + 1.7e-21,
        interval=Interval(low=-1.4e-06, high=1.4e-06),
        is_share=False,
    )

    assert difference.value == 0
    assert finding(difference) == "cannot tell: no difference in these rows"


def test_figures_have_units_and_three_digits() -> None:
    pairs = Pairs()
    for number in (1, 2, 3):
        here = {"latency_s": [0.05125], "cost_usd": [1.4401e-05], "completion_tokens": [1_023.75]}
        pairs.add(here, {name: [values[0] * number] for name, values in here.items()})
    shown = [difference_cells(each)[:4] for each in pairs.differences()]

    assert shown == [
        ["mean latency", "51.2 ms", "102 ms", "+51.2 ms"],
        ["mean completion tokens", "1,024", "2,048", "+1,024"],
        ["mean cost per request", "$0.0000144", "$0.0000288", "+$0.0000144"],
    ]


def test_differences_are_shown_with_their_interval() -> None:
    comparisons = [
        Comparison(first="model=a", second="model=b", differences=[drawn(1, 2000)], same_prompts=False, note="but."),
        Comparison(first="model=a", second="model=\x1b[31mc", refusal="their rows differ"),
    ]
    stream = io.StringIO()
    show_comparisons(comparisons, stream=stream)
    shown = stream.getvalue()

    assert "with other prompts\nfirst   model=a\nsecond  model=b\n" in shown
    assert " pp, " in shown
    assert shown.count("\nbut.\n") == 1
    assert r"not compared: model=a and model=\x1b[31mc: their rows differ" in shown


async def test_a_multirun_ends_with_the_differences(command: Command) -> None:
    rows: list[Json] = [{"text": f"number {number}", "label": f"echo: number {number}"} for number in range(30)]
    command.write_rows("rows.jsonl", rows)
    done = await command(
        "-m",
        "dataset=jsonl",
        "dataset.path=rows.jsonl",
        'prompt="{{ text }}","Say {{ text }}"',
        "scorers.right.kind=exact_match",
        "scorers.right.target=label",
        "simulator.latency_s=0.001",
        "tracker=none",
    )

    assert done.exit_code == 0, done.err
    assert "differences over the same rows, with other prompts\nfirst   prompt=" in done.out
    assert "score right" in done.out
    assert "lower" in done.out


async def test_the_shipped_comparison_says_what_a_prompt_costs_and_that_it_cannot_tell(
    command: Command,
) -> None:
    compare_prompts = ("-m", "+experiment=compare_prompts", "dataset.limit=60", "tracker=none", "simulator.latency_s=0")
    planned = await command(*compare_prompts, "plan=true")
    done = await command(*compare_prompts)
    models = await command(*compare_prompts, "model=simulated/a,simulated/b", "prompt='{{ question }}'")

    assert "2 runs together" in planned.out, planned.err
    assert done.exit_code == 0, done.err
    assert re.search(r"^score contains .* cannot tell: it would take about [0-9.k]+ rows$", done.out, re.M)
    assert re.search(r"^mean prompt tokens .* higher$", done.out, re.M)
    assert len(command.runs()) == 2 + 2, models.err
    assert re.search(r"^mean prompt tokens .* the same$", models.out, re.M)


def test_a_folder_without_answers_is_no_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
