"""Study files and the cells they make: what is refused before anything runs, and what makes two cells the same run."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from ccpo.compare import cells
from ccpo.compare.cells import check, main_cells, make_cell, points, recipe_of, setup_of, sweep_cells, tune_cells
from ccpo.compare.drift import drifted, flat, present_defaults, relied_on
from ccpo.compare.merge import at, laid_over
from ccpo.compare.study import ExamSpec, MethodSpec, Study, SweepSpec, TaskSpec, TuneSpec, load_study, shipped_studies
from ccpo.config import load_recipe
from ccpo.errors import UserError

STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "rollout": {"prompts": 4, "samples": 4, "max_tokens": 8},
        "optim": {"lr": 1e-3},
        "advantage": "dr_grpo",
        "task": {"kind": "digit_sum", "digits": [1, 2]},
    },
    "tasks": {
        "sums": {"recipe": {"team": {"kind": "think_solve"}}, "tokens": 5000, "ood": {"digits": [3, 4]}},
        "choice": {
            "recipe": {"team": {"kind": "voting", "k": 3}, "task": {"kind": "truth_choice", "options": 4}},
            "tokens": 3000,
            "every": 100,
            "single": {"team": {"kind": "voting", "k": 1}},
        },
    },
    "methods": {
        "shared": {"label": "shared reward", "set": {"credit": "shared"}},
        "removal": {"set": {"credit": "removal"}},
        "single": {"single": True, "set": {"credit": "own"}, "why_empty": {"sums": "a team of one has no thinker"}},
        "untrained": {"train": False, "set": {"credit": "shared"}},
    },
    "seeds": 2,
    "headline": ["removal", "shared"],
    "headline_seeds": [0, 1, 2],
}


def study(**changes: Any) -> Study:
    return load_study(deepcopy(STUDY) | changes)


def changed(path: str, value: Any) -> Study:
    """The study with one key changed."""
    return load_study(laid_over(STUDY, at(path, value)))


def chosen(of: Study) -> dict[tuple[str, str], Any]:
    return {pair: {} for pair in of.applies()}


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("methos", {}, ["methos", "unknown key", "Did you mean 'methods'"]),
        ("tasks.sums.budget", 3, ["tasks.sums.budget", "unknown key", "tokens"]),
        ("tasks.sums.tokens", 0, ["tasks.sums.tokens", "found 0"]),
        ("tasks.sums.tokens", True, ["tasks.sums.tokens", "true or false"]),
        ("seeds", 0, ["seeds"]),
        ("seeds", [], ["seeds"]),
        ("seeds", [3, 4, 3], ["duplicate cells", "a seed is given twice"]),
        ("name", "../elsewhere", ["name"]),
        ("headline", ["removal", "sharde"], ["headline", "unknown method 'sharde'", "Did you mean 'shared'"]),
        ("headline", ["removal"], ["headline"]),
        ("reference", "nobody", ["reference", "unknown method 'nobody'"]),
        ("boxes", ["nobody"], ["boxes", "unknown method"]),
        ("methods.shared.tasks", ["sums"], ["methods.shared.why_empty.choice", "an empty cell states its reason"]),
        (
            "methods.shared.why_empty",
            {"sum": "x"},
            ["methods.shared.why_empty", "unknown task 'sum'", "Did you mean 'sums'"],
        ),
        ("methods.single.tasks", ["sums", "choice"], ["in tasks and in why_empty"]),
        ("tune", {"grid": {"optim.lr": [1e-3]}, "seeds": [1]}, ["tune.seeds", "[1]", "results do not use"]),
        ("tune", {"grid": {}}, ["tune.grid"]),
        (
            "sweeps",
            {"a": {"method": "v1", "task": "sums", "key": "optim.lr", "values": [1]}},
            ["sweeps.a.method", "'v1'"],
        ),
        (
            "sweeps",
            {"a": {"method": "single", "task": "sums", "key": "optim.lr", "values": [1]}},
            ["sweeps.a", "does not apply"],
        ),
        ("sweeps", {"a": {"method": "untrained", "task": "sums", "key": "optim.lr", "values": [1]}}, ["not trained"]),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(path, value, words):
    with pytest.raises(UserError) as caught:
        changed(path, value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("methods.removal.set.credit", "remove", ["'removal' on task 'sums'", "credit.kind", "Did you mean 'removal'"]),
        ("methods.removal.set.credit", {"kind": "ccpo_v1", "alpa": 1}, ["credit.alpa", "Did you mean 'alpha'"]),
        ("methods.removal.set.optim", {"rate": 1}, ["'removal' on task 'sums'", "optim.rate", "unknown key"]),
        ("base.team", "think_sovle", ["tasks", "sums"]),
        ("tasks.sums.ood", {"digit": [1]}, ["on task 'sums'", "eval.tasks.ood.digit", "Did you mean 'digits'"]),
        ("methods.removal.set", {"credit": "shared"}, ["duplicate cells", "'shared' and 'removal'", "'sums'"]),
        (
            "tasks.sums.tokens",
            31,
            ["budget tasks.sums.tokens is 31", "at least 32"],
        ),  # 4 problems × 4 rollouts × 2 turns
        ("tasks.choice.tokens", 47, ["budget tasks.choice.tokens is 47", "at least 48"]),  # 3 voters
        ("base.run", {"seed": 3}, ["base.run.seed", "the study sets this key itself"]),
        ("methods.shared.set.trainer", {"tokens": 9}, ["methods.shared.set.trainer.tokens", "the study sets this key"]),
        ("tasks.sums.recipe.log", {"episodes": True}, ["tasks.sums.recipe.log", "the study sets"]),
        ("tune", {"grid": {"optim.lr": [1e-3, 1e-4, 1e-3]}}, ["duplicate cells", "0.001"]),
        ("tune", {"grid": {"optim.lrr": [1e-3]}}, ["optim.lrr", "unknown key"]),
        ("tune", {"grid": {"optim.lr": [1e-3, -1]}}, ["optim.lr", "-1"]),
        ("tune", {"grid": {"optim..lr": [1e-3]}}, ["'optim..lr' is no key"]),
    ],
)
def test_cells_that_cannot_run_are_refused_before_any_runs(path, value, words):
    if path == "base.team":
        with pytest.raises(UserError, match="think_sovle"):
            check(
                load_study(laid_over(STUDY, {"base": {"team": value}, "tasks": {"sums": {"recipe": {"team": value}}}}))
            )
        return
    with pytest.raises(UserError) as caught:
        check(changed(path, value))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("values", "word"),
    [([0.5, 0.5], "duplicate cells"), ([0.5, "much"], "sweeps.alpha: method 'shared' on task 'sums'")],
)
def test_sweeps_are_checked_value_by_value(values, word):
    with pytest.raises(UserError, match=word):
        check(study(sweeps={"alpha": {"method": "shared", "task": "sums", "key": "optim.lr", "values": values}}))


def test_the_smallest_budget_that_holds_a_step_is_taken():
    check(changed("tasks.sums.tokens", 32))


def test_a_file_that_is_no_study(tmp_path):
    path = tmp_path / "s.yaml"
    for text, word in (
        ("a: [", "not readable as YAML"),
        ("- a", "a study is a mapping"),
        ("name: x\nname: y", "given twice"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=word):
            load_study(path)
    with pytest.raises(UserError, match="Did you mean 'short'"):
        load_study("shrot")


def test_shipped_studies_are_whole():
    for name in shipped_studies():
        check(load_study(name))


# --- cells -------------------------------------------------------------------------------------------------------------------


def test_every_method_task_and_seed_has_a_cell_and_empty_ones_have_none():
    made = main_cells(study(), chosen(study()))
    found = {(c.method, c.task, c.seed) for c in made}
    headline = {(m, t, s) for m in ("shared", "removal") for t in ("sums", "choice") for s in range(3)}
    others = {("single", "choice", s) for s in range(2)} | {
        ("untrained", t, s) for t in ("sums", "choice") for s in range(2)
    }
    assert found == headline | others
    assert len({c.id for c in made}) == len(made)
    order = [(c.method not in ("shared", "removal"), c.seed) for c in made]
    assert order == sorted(order)  # the headline pair first; a study that is stopped has few seeds of everything


def test_recipes_are_laid_over_one_another_in_order():
    of = load_study(
        laid_over(
            STUDY,
            {
                "base": {"optim": {"lr": 1, "warmup_steps": 1, "epochs": 1, "minibatches": 1}},
                "tasks": {
                    "choice": {
                        "recipe": {"optim": {"warmup_steps": 2, "epochs": 2}},
                        "single": {"optim": {"epochs": 3}},
                    }
                },
                "methods": {
                    "single": {"set": {"optim": {"eps": 4}}, "by_task": {"choice": {"optim": {"weight_decay": 5}}}}
                },
            },
        )
    )
    found = recipe_of(of, "single", "choice", {"optim.minibatches, optim.max_grad_norm": 6})
    assert found["optim"] == {
        "lr": 1,
        "warmup_steps": 2,
        "epochs": 3,
        "minibatches": 6,
        "max_grad_norm": 6,
        "eps": 4,
        "weight_decay": 5,
    }
    assert found["team"] == {"kind": "voting", "k": 1}
    assert recipe_of(of, "shared", "choice", {})["optim"]["epochs"] == 2  # `single` is for single agents


def test_the_study_sets_budget_and_evaluations():
    config = load_recipe(recipe_of(study(), "shared", "sums", {}))
    assert (config.trainer.tokens, config.eval.every_tokens) == (5000, 100)  # a fiftieth of the budget
    assert load_recipe(recipe_of(study(), "shared", "choice", {})).eval.every_tokens == 100
    untrained = load_recipe(recipe_of(study(), "untrained", "sums", {}))
    assert (untrained.trainer.tokens, untrained.trainer.steps) == (None, 0)


def test_another_kind_drops_the_arguments_of_the_old_one():
    merged = laid_over({"credit": {"kind": "ccpo_v1", "alpha": 2}, "a": 1}, {"credit": {"kind": "ccpo_v2"}})
    assert merged == {"credit": {"kind": "ccpo_v2"}, "a": 1}
    assert laid_over({"credit": "ccpo_v1"}, {"credit": {"alpha": 2}}) == {"credit": {"kind": "ccpo_v1", "alpha": 2}}
    kept = {"credit": {"kind": "ccpo_v1", "alpha": 2}}
    assert laid_over(kept, {"credit": {"kind": "ccpo_v1", "eta": 3}})["credit"] == {
        "kind": "ccpo_v1",
        "alpha": 2,
        "eta": 3,
    }
    assert kept == {"credit": {"kind": "ccpo_v1", "alpha": 2}}


def test_the_out_of_distribution_set_is_the_task_with_its_changes_and_held_out():
    setup = setup_of(make_cell(study(), "shared", "sums", 0, {}))
    assert list(setup.tests) == ["heldout", "ood"]
    assert (setup.tests["ood"].digits, setup.tests["ood"].split) == ((3, 4), "test")
    assert (setup.tests["heldout"].digits, setup.tests["heldout"].split) == ((1, 2), "test")
    assert list(setup_of(make_cell(study(), "shared", "choice", 0, {})).tests) == ["heldout"]


def test_fingerprints_tell_runs_apart():
    base = make_cell(study(), "shared", "sums", 0, {})
    assert make_cell(study(), "shared", "sums", 0, {}).fingerprint == base.fingerprint
    others = [
        make_cell(study(), "shared", "sums", 1, {}),
        make_cell(study(), "removal", "sums", 0, {}),
        make_cell(study(), "shared", "choice", 0, {}),
        make_cell(study(), "shared", "sums", 0, {"optim.lr": 0.5}),
        make_cell(changed("tasks.sums.tokens", 5001), "shared", "sums", 0, {}),
        make_cell(changed("tasks.sums.every", 7), "shared", "sums", 0, {}),
        make_cell(changed("tasks.sums.ood", {"digits": [5, 6]}), "shared", "sums", 0, {}),
        make_cell(changed("exam.samples", 2), "shared", "sums", 0, {}),
        make_cell(changed("base.optim.eps", 1e-7), "shared", "sums", 0, {}),
    ]
    assert len({base.fingerprint, *(c.fingerprint for c in others)}) == 1 + len(others)


def test_fingerprints_do_not_depend_on_what_shapes_no_result():
    base = make_cell(study(), "shared", "sums", 0, {}).fingerprint
    for path, value in (
        ("methods.shared.label", "another"),
        ("tasks.sums.label", "another"),
        ("seeds", 7),
        ("title", "another"),
        ("notes", "another"),
        ("base.optim.lr", 0.001),
    ):
        assert make_cell(changed(path, value), "shared", "sums", 0, {}).fingerprint == base, path


def test_a_new_epoch_makes_other_cells(monkeypatch):
    before = make_cell(study(), "shared", "sums", 0, {}).fingerprint
    monkeypatch.setattr(cells, "EPOCH", cells.EPOCH + 1)
    assert make_cell(study(), "shared", "sums", 0, {}).fingerprint != before


def test_a_single_agent_may_vote_with_more_samples():
    of = changed("exam", {"samples": 2, "votes": 8})
    assert make_cell(of, "single", "choice", 0, {}).exam["samples"] == 8
    assert make_cell(of, "shared", "choice", 0, {}).exam["samples"] == 2
    same = make_cell(changed("exam.samples", 2), "shared", "choice", 0, {})
    assert make_cell(of, "shared", "choice", 0, {}).fingerprint == same.fingerprint


# --- tuning and sweeps -------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination():
    assert points({"a": [1, 2], "b": [3, 4]}) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]
    assert points({}) == []


def test_what_is_tuned():
    of = load_study(
        laid_over(
            STUDY,
            {
                "tune": {"grid": {"optim.lr": [1e-3, 1e-4]}, "seeds": [50, 51]},
                "methods": {"removal": {"tune": False}, "single": {"grid": {"optim.eps": [1e-8, 1e-7, 1e-6]}}},
            },
        )
    )
    found = {pair: [(point, [c.seed for c in made]) for point, made in grid] for pair, grid in tune_cells(of).items()}
    lr = [({"optim.lr": 1e-3}, [50, 51]), ({"optim.lr": 1e-4}, [50, 51])]
    eps = [({"optim.eps": e}, [50, 51]) for e in (1e-8, 1e-7, 1e-6)]
    assert found == {("shared", "sums"): lr, ("shared", "choice"): lr, ("single", "choice"): eps}


def test_main_cells_wait_for_tuning():
    pairs = chosen(study()) | {("shared", "sums"): None}
    assert ("shared", "sums") not in {(c.method, c.task) for c in main_cells(study(), pairs)}


def test_a_swept_value_that_is_the_tuned_one_shares_its_cells():
    of = study(
        sweeps={"rate": {"method": "shared", "task": "sums", "key": "optim.lr", "values": [1e-3, 1e-4], "seeds": 2}}
    )
    pairs = chosen(of) | {("shared", "sums"): {"optim.lr": 1e-4}}
    (same, main), (other, _) = ((v, {c.id for c in made}) for v, made in reversed(sweep_cells(of, pairs)["rate"]))
    assert (same, other) == (1e-4, 1e-3)
    assert main <= {c.id for c in main_cells(of, pairs)}


# --- defaults ----------------------------------------------------------------------------------------------------------------


def test_a_changed_default_makes_another_cell_only_where_it_was_relied_on():
    now = present_defaults()
    then = now | {"optim.eps": 1e-5, "credit:removal.pairing": "something else", "optim.lr": 9.0, "gone": 1}
    then["rollout.decode_tokens"] = 300  # nor does one that only says how fast it goes
    del then["optim.epochs"]  # a key that is new since then changes nothing
    drift = drifted(then, now)
    assert set(drift) == {"optim.eps", "credit:removal.pairing", "optim.lr"}
    of, later = study(), study().since(drift)
    assert make_cell(later, "shared", "sums", 0, {}).fingerprint != make_cell(of, "shared", "sums", 0, {}).fingerprint
    said = changed("base.optim.eps", 1e-8)
    same = make_cell(said, "shared", "sums", 0, {}).fingerprint  # it says its eps, and lr, and is not paid by removal
    assert make_cell(said.since(drift), "shared", "sums", 0, {}).fingerprint == same
    paid = make_cell(said, "removal", "sums", 0, {}).fingerprint
    assert make_cell(said.since(drift), "removal", "sums", 0, {}).fingerprint != paid


def test_defaults_of_arguments_are_those_of_the_kind_that_is_used():
    drift = {"task:digit_sum.size": 7, "team:voting.k": 5}
    config = load_recipe({"task": "digit_sum", "team": "think_solve"})
    assert relied_on(drift, config) == {"task:digit_sum.size": 7}
    assert relied_on(drift, load_recipe({"task": {"kind": "digit_sum", "size": 3}, "team": "voting"})) == {
        "team:voting.k": 5
    }


def test_flat():
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


# --- the document ------------------------------------------------------------------------------------------------------------


def test_the_document_has_every_key():
    text = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`([\w.]+)`", "\n".join(line for line in text.splitlines() if line.startswith("| `"))))
    nested = {"tasks": ("T", TaskSpec), "methods": ("M", MethodSpec), "sweeps": ("S", SweepSpec)}
    keys = set(Study.model_fields) - set(nested) - {"tune"} | {f"tune.{key}" for key in TuneSpec.model_fields}
    keys |= {f"{section}.{letter}.{key}" for section, (letter, spec) in nested.items() for key in spec.model_fields}
    keys |= set(ExamSpec.model_fields)
    assert said == keys
