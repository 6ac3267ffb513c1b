"""Recipes: what is read, what ``--set`` does, and what bad input gets, before any model is loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.build import build_part, prepare
from ccpo.config import Part, RunConfig, find_recipe, load_recipe, shipped_recipes
from ccpo.credit import CCPOv1, SharedReward
from ccpo.errors import UserError, nearest
from ccpo.imports import load_object
from ccpo.tasks import ListTask, exact_verdict
from ccpo.teams import PlayTeam, think_solve
from ccpo.types import Problem, Removal

DIGITS = {"task": {"kind": "digit_sum"}}


def refused(source, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


def not_built(data: dict, **objects) -> str:
    with pytest.raises(UserError) as caught:
        prepare(load_recipe(DIGITS | data), **objects)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- wrong keys, types and values -----------------------------------------------------------------------------------


def test_a_wrong_key_names_its_path_what_is_allowed_and_the_nearest_name(recipe):
    message = refused(recipe("trainer: {stepz: 3}"))
    assert message.startswith("mine.yaml: trainer.stepz: unknown key. Allowed: steps, tokens, schedule, period, first,")
    assert message.endswith("Did you mean 'steps'?")


def test_a_wrong_section_is_named_too():
    message = refused({"trianer": {"steps": 3}})
    assert "recipe: trianer: unknown key. Allowed: run, model, bootstrap, agents, team, task" in message
    assert "Did you mean 'trainer'?" in message


def test_a_key_that_cannot_be_printed_is_quoted():
    assert r"recipe: run.'\x1b[2J': unknown key" in refused({"run": {"\x1b[2J": 1}})
    assert "recipe: run.'': unknown key" in refused({"run": {"": 1}})


def test_a_wrong_key_without_a_near_name_guesses_nothing():
    message = refused({"trainer": {"zzzzzz": 3}})
    assert "trainer.zzzzzz" in message
    assert "Did you mean" not in message


@pytest.mark.parametrize("agent", ["solver", "model", "lr", "steps"])
def test_a_wrong_key_of_an_agent_lists_an_agents_keys_whatever_the_agent_is_called(agent):
    message = refused({"agents": {agent: {"frozn": True}}})
    assert f"agents.{agent}.frozn: unknown key. Allowed: model, lr, frozen, max_tokens" in message
    assert "Did you mean 'frozen'?" in message


def test_a_wrong_type_names_path_and_what_was_found():
    assert "recipe: trainer.steps: found 'many'. Input should be a valid integer" in refused(
        {"trainer": {"steps": "many"}}
    )
    assert "recipe: loss: found 3." in refused({"loss": 3})
    assert "recipe: run.name: found 5. Input should be a valid string." in refused({"run": {"name": 5}})
    assert "recipe: agents.solver.stop: found 'x'. Input should be a valid list." in refused(
        {"agents": {"solver": {"stop": "x"}}}
    )


def test_a_truth_value_is_no_number():
    assert "trainer.steps: found True" in refused({"trainer": {"steps": True}})
    assert "optim.lr: found True" in refused({"optim": {"lr": True}})
    assert load_recipe({"trainer": {"shuffle": False}}).trainer.shuffle is False


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_learning_rate_that_is_no_number_is_refused(value):
    assert "optim.lr: found" in refused({"optim": {"lr": value}})


@pytest.mark.parametrize(
    ("data", "path", "limit"),
    [
        ({"optim": {"lr": 0}}, "optim.lr: found 0", "greater than 0"),
        ({"rollout": {"samples": 0}}, "rollout.samples: found 0", "greater than or equal to 1"),
        ({"rollout": {"top_p": 1.5}}, "rollout.top_p: found 1.5", "less than or equal to 1"),
        ({"run": {"seed": -1}}, "run.seed: found -1", "greater than or equal to 0"),
        ({"loss": {"dual_clip": 1.0}}, "loss.dual_clip: found 1.0", "greater than 1"),
        ({"model": {"lora": {"dropout": 1.0}}}, "model.lora.dropout: found 1.0", "less than 1"),
        ({"agents": {"a": {"temperature": -1}}}, "agents.a.temperature: found -1", "greater than or equal to 0"),
        ({"bootstrap": {"noise": 1.5}}, "bootstrap.noise: found 1.5", "less than or equal to 1"),
        (
            {"bootstrap": {"noise": {"thinker": -0.1}}},
            "bootstrap.noise.thinker: found -0.1",
            "greater than or equal to 0",
        ),
    ],
)
def test_a_value_out_of_range_names_the_limit(data, path, limit):
    message = refused(data)
    assert path in message
    assert limit in message


def test_a_wrong_word_lists_the_words_and_the_nearest():
    message = refused({"advantage": "gropo"})
    assert "recipe: advantage: found 'gropo'." in message
    assert "'grpo', 'dr_grpo', 'rloo', 'maxrl', 'reinforce++' or 'none'" in message
    assert message.endswith("Did you mean 'grpo'?")


def test_what_was_found_is_quoted_as_it_is():
    message = refused({"model": {"attention": "../eager"}})
    assert "found '../eager'" in message


def test_what_was_found_is_cut_when_long():
    message = refused({"advantage": "x" * 500})
    assert len(message) < 300
    assert "…" in message


def test_a_key_that_may_be_of_two_types_is_named_without_its_types():
    for data, path in (
        ({"bootstrap": {"noise": "loud"}}, "bootstrap.noise"),
        ({"model": {"lora": {"targets": 7}}}, "model.lora.targets"),
    ):
        message = refused(data)
        assert all(line.startswith(f"recipe: {path}: found ") for line in message.splitlines())


def test_every_mistake_is_reported_at_once():
    lines = refused({"trainer": {"stepz": 3}, "optim": {"lr": -1}, "advantage": 4}).splitlines()
    assert len(lines) == 3


def test_settings_that_contradict_each_other_say_which():
    assert "optim.minibatches is 99 but a step has only rollout.prompts = 16" in refused({"optim": {"minibatches": 99}})
    assert "needs loss.constant" in refused({"loss": {"aggregate": "constant"}})
    assert "kl_coef is set but kl is 'none'" in refused({"loss": {"kl_coef": 0.1}})
    assert "hidden" in refused({"bootstrap": {"hidden": 30, "heads": 4}})
    assert "kv_heads" in refused({"bootstrap": {"heads": 4, "kv_heads": 3}})


def test_a_part_without_a_kind_says_that_it_is_required():
    assert refused({"task": {"path": "x"}}) == "recipe: task.kind: this key is required."
    assert "recipe: eval.tasks.math.kind: this key is required." in refused(
        {"eval": {"tasks": {"math": {"path": "x"}}}}
    )


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(list(RunConfig.model_fields)),
)
def test_whatever_a_section_holds_the_answer_is_a_config_or_a_sentence(value, section):
    outcome = ""
    try:
        load_recipe({section: value})
    except UserError as error:
        outcome = str(error)
    assert all(line.startswith("recipe: ") for line in outcome.splitlines())


# --- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "1E-6", "+1e-6", "0.000001", ".1e-5"])
def test_small_numbers_are_numbers_however_they_are_written(recipe, text):
    assert load_recipe(recipe(f"optim: {{lr: {text}}}")).optim.lr == pytest.approx(1e-6, rel=1e-12)
    assert load_recipe(recipe(""" "run": {}"""), [f"optim.lr={text}"]).optim.lr == pytest.approx(1e-6, rel=1e-12)


def test_words_that_only_look_like_numbers_stay_words(recipe):
    config = load_recipe(recipe("run: {name: 1e-x}\nagents: {a: {model: e10}}"))
    assert (config.run.name, config.agents["a"].model) == ("1e-x", "e10")


def test_a_key_given_twice_is_refused_with_its_line(recipe):
    message = refused(recipe("run: {name: a}\ntrainer:\n  steps: 3\n  period: 2\n  steps: 4\n"))
    assert "'steps' is given twice" in message
    assert "line 5" in message


def test_anchors_and_merges_work_and_may_be_overridden(recipe):
    config = load_recipe(recipe("agents:\n  a: &base {lr: 1e-5, frozen: true}\n  b: {<<: *base, frozen: false}\n"))
    assert config.agents["b"].lr == 1e-5
    assert (config.agents["a"].frozen, config.agents["b"].frozen) == (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "run: [",
        "run: {name: !!python/object/apply:os.system [true]}",
        "run: {seed: 2024-13-45}",
        "run: {[1]: 2}",
        "run: {? {a: 1} : 2}",
        "run: \x00",
        "run: " + "[" * 4000,
        "- run",
        "just text",
        "",
        "&a [*a]",
        "&a {run: *a}",
    ],
)
def test_what_is_no_recipe_is_refused_in_a_sentence(recipe, text):
    assert "mine.yaml" in refused(recipe(text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00run")
    assert "binary.yaml: not readable as YAML" in refused(path)


def test_an_absent_recipe_lists_those_that_ship_and_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("demmo")
    assert "No recipe at 'demmo'" in message
    assert "Did you mean 'demo'?" in message
    assert find_recipe("demo") == find_recipe("recipes/demo.yaml") == shipped_recipes()["demo"]
    assert "No recipe at 'elsewhere/demo.yaml'" in refused("elsewhere/demo.yaml")


def test_a_file_beside_you_goes_before_a_shipped_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/demo.yaml").write_text("run: {name: my own}")
    assert load_recipe("recipes/demo.yaml").run.name == "my own"


def test_every_shipped_recipe_is_read():
    for path in shipped_recipes().values():
        assert load_recipe(path).task is not None


# --- --set ----------------------------------------------------------------------------------------------------------


def test_set_changes_one_key_and_leaves_its_neighbours():
    config = load_recipe({"trainer": {"steps": 5, "period": 3}}, ["trainer.steps=50", "run.dir=/x/y", "log.wandb=true"])
    assert (config.trainer.steps, config.trainer.period, config.run.folder, config.log.wandb) == (50, 3, "/x/y", True)


def test_set_reads_its_value_as_yaml():
    config = load_recipe({}, ["optim.betas=[0.8, 0.9]", "agents.a.stop=[x, y]", "rollout.draws=null", "run.name='7'"])
    assert config.optim.betas == (0.8, 0.9)
    assert config.agents["a"].stop == ["x", "y"]
    assert config.rollout.draws is None
    assert config.run.name == "7"


def test_set_takes_text_that_is_no_yaml_as_it_is():
    assert load_recipe({}, ["rollout.placeholder=[not closed"]).rollout.placeholder == "[not closed"
    assert load_recipe({}, ["rollout.placeholder=a=b"]).rollout.placeholder == "a=b"
    assert load_recipe({}, ["rollout.placeholder=2024-13-45"]).rollout.placeholder == "2024-13-45"


def test_the_last_set_wins():
    assert load_recipe({}, ["trainer.steps=1", "trainer.steps=2"]).trainer.steps == 2


def test_set_does_not_change_the_mapping_it_was_given():
    data = {"trainer": {"steps": 5}, "credit": {"kind": "ccpo_v1", "alpha": 2.0}}
    load_recipe(data, ["trainer.steps=50", "credit.kind=shared", "optim.lr=1"])
    assert data == {"trainer": {"steps": 5}, "credit": {"kind": "ccpo_v1", "alpha": 2.0}}


@pytest.mark.parametrize("part", ["team", "task", "credit"])
def test_another_kind_drops_the_arguments_of_the_old_one(part):
    data = {part: {"kind": "old", "alpha": 2.0}}
    assert getattr(load_recipe(data, [f"{part}.kind=new"]), part) == Part(kind="new")
    assert getattr(load_recipe(data, [f"{part}.kind=old"]), part).arguments == {"alpha": 2.0}
    assert getattr(load_recipe(data, [f"{part}.kind=new", f"{part}.beta=1"]), part).arguments == {"beta": 1}
    assert getattr(load_recipe(data, [f"{part}=new"]), part) == Part(kind="new")
    assert getattr(load_recipe({part: "old"}, [f"{part}.beta=1"]), part).arguments == {"beta": 1}


def test_another_kind_of_an_evaluation_task_drops_the_arguments_too():
    data = {"eval": {"tasks": {"math": {"kind": "file", "path": "x.jsonl"}}}}
    assert load_recipe(data, ["eval.tasks.math.kind=digit_sum"]).eval.tasks["math"] == Part(kind="digit_sum")


@pytest.mark.parametrize("override", ["trainer.steps", "=5", " =5", ""])
def test_set_without_a_key_or_value_shows_the_form(override):
    assert "expected path.to.key=value" in refused({}, override)


def test_set_below_a_plain_value_says_what_is_there():
    assert "'steps' holds 5, which has no key 'x'" in refused({"trainer": {"steps": 5}}, "trainer.steps.x=1")


def test_set_of_a_wrong_key_is_refused_like_the_recipes():
    assert "Did you mean 'steps'?" in refused({}, "trainer.stepz=1")


# --- from names to objects ------------------------------------------------------------------------------------------


def test_an_unknown_kind_lists_the_kinds_and_the_nearest():
    message = not_built({"credit": "ccpo_v3"})
    assert message.startswith("credit.kind: found 'ccpo_v3'; it is one of auto, ccpo_v1, ccpo_v2, shared")
    assert "module:attribute of your own" in message
    assert "Did you mean 'ccpo_v" in message
    assert "team.kind: found 'vote'" in not_built({"team": "vote"})
    assert "task.kind: found 'digitsum'" in not_built({"task": "digitsum"})
    assert "eval.tasks.hard.kind: found 'nothing'" in not_built({"eval": {"tasks": {"hard": "nothing"}}})


def test_a_wrong_argument_names_its_path_what_is_allowed_and_the_nearest():
    message = not_built({"credit": {"kind": "ccpo_v1", "alhpa": 2}})
    assert "credit.alhpa: unknown key. Allowed: alpha" in message
    assert "Did you mean 'alpha'?" in message
    assert "team.k: found 'three'" in not_built({"team": {"kind": "voting", "k": "three"}})
    assert "eval.tasks.hard.digits" in not_built({"eval": {"tasks": {"hard": {"kind": "digit_sum", "digits": "many"}}}})
    assert "task.path: this key is required" in not_built({"task": {"kind": "file"}})


def test_values_that_the_thing_itself_refuses_come_through():
    assert "team.k is 0" in not_built({"team": {"kind": "voting", "k": 0}})
    assert "credit.solo" in not_built({"credit": {"kind": "ccpo_v2", "solo": "pared"}})


def test_a_recipe_without_a_task_says_so():
    with pytest.raises(UserError, match="task: this key is required; for example"):
        prepare(load_recipe({}))


def test_unknown_agents_are_named_wherever_they_stand():
    assert (
        "agents.sovler: the team 'think_solve' has no such agent; it has thinker, solver. Did you mean 'solver'?"
        in (not_built({"agents": {"sovler": {"lr": 1}}}))
    )
    assert "rollout.boxed_reward.thinke" in not_built({"rollout": {"boxed_reward": {"thinke": 0.25}}})
    assert "trainer.first is 'solve'" in not_built({"trainer": {"schedule": "alternating", "first": "solve"}})
    assert "bootstrap.noise.thinkr" in not_built({"bootstrap": {"noise": {"thinkr": 0.5}}})


def test_a_schedule_that_trains_nobody_is_refused():
    frozen = {name: {"frozen": True} for name in ("thinker", "solver")}
    assert "every agent is frozen" in not_built({"agents": frozen})
    assert "is not an agent that is trained" in not_built(
        {"agents": {"solver": {"frozen": True}}, "trainer": {"schedule": "alternating", "first": "solver"}}
    )


def test_maxrl_is_for_credit_that_is_never_negative():
    assert "can be negative" in not_built({"advantage": "maxrl", "credit": "removal"})


def test_settings_without_effect_are_refused():
    assert "trainer.first is set but trainer.schedule is 'simultaneous'" in not_built({"trainer": {"first": "solver"}})
    assert "loss.kl is 'k3' but loss.kl_coef is 0" in not_built({"loss": {"kl": "k3"}})


def test_a_task_smaller_than_a_step_is_refused_before_any_model_is_loaded():
    assert "rollout.prompts = 16 problems but the task has only 5" in not_built(
        {"task": {"kind": "digit_sum", "size": 5}}
    )


def test_a_function_team_cannot_be_removed_from_by_frozen():
    async def play(problem, speak):
        return ""

    team = PlayTeam("loop", ("a",), play)
    assert "'frozen' is not available" in not_built({"rollout": {"removal": "frozen"}}, team=team)


def test_a_team_of_the_recipe_with_a_cycle_or_without_a_decision_is_named():
    turns = {"x": {"agent": "a", "template": "{y}"}, "y": {"agent": "a", "template": "{x}"}}
    team = {"kind": "custom", "agents": ["a"], "turns": turns, "decision": {"kind": "last_turn", "turn": "x"}}
    assert "read each other in a circle" in not_built({"team": team})
    assert "team.decision" in not_built({"team": {k: v for k, v in team.items() if k != "decision"}})


def test_a_setup_holds_what_the_recipe_says():
    setup = prepare(
        load_recipe(
            DIGITS
            | {
                "credit": {"kind": "ccpo_v1", "alpha": 2},
                "agents": {"solver": {"max_tokens": 7, "stop": []}, "thinker": {"frozen": True}},
                "rollout": {"stop": ["\n"], "max_tokens": 9, "removal": "blank", "truncated": "keep"},
            }
        )
    )
    assert isinstance(setup.rule, CCPOv1)
    assert setup.rule.alpha == 2
    assert setup.removal is Removal.BLANK
    assert setup.schedule.active(0) == ("solver",)
    assert setup.policy_of == {"thinker": "thinker", "solver": "solver"}
    assert setup.samplings["thinker"].stop == ("\n",)
    assert (setup.samplings["solver"].stop, setup.samplings["solver"].max_tokens) == ((), 7)
    assert setup.limits.truncated_is_zero is False
    assert setup.tests["heldout"].split == "test"


def test_one_shared_model_is_one_policy():
    assert set(prepare(load_recipe(DIGITS | {"model": {"sharing": "shared"}})).policy_of.values()) == {"shared"}


def test_objects_take_the_place_of_what_the_recipe_names():
    task = ListTask(
        name="mine", problems=[Problem(id=str(i), text="?", answer="!") for i in range(20)], verifier=exact_verdict
    )
    setup = prepare(load_recipe({}), team=think_solve(), task=task, credit=SharedReward())
    assert setup.task is task
    assert isinstance(setup.rule, SharedReward)
    assert setup.tests == {"train": task}


def test_the_time_limit_of_a_verdict_reaches_the_verifier(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f'{{"question": "{i}+1", "answer": "{i + 1}"}}\n' for i in range(20)))
    data = {"task": {"kind": "file", "path": str(path)}}
    assert prepare(load_recipe(data | {"rollout": {"verify_seconds": 2.5}})).task.verifier.seconds == 2.5
    data["task"]["seconds"] = 1.5  # said of this very task: it goes before
    assert prepare(load_recipe(data | {"rollout": {"verify_seconds": 2.5}})).task.verifier.seconds == 1.5


# --- objects of one's own -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Thing:
    size: int = 3


def test_a_thing_of_ones_own_is_checked_like_a_built_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_parts_of_a_test.py").write_text(
        "def thing(size: int = 3, *, words: list[str] = []):\n    return size, words\n"
    )
    part = Part(kind="my_parts_of_a_test:thing", size="4", words=["a"])
    assert build_part({}, part, "task") == (4, ["a"])
    with pytest.raises(UserError, match=r"task\.sise: unknown key\. Allowed: size, words\. Did you mean 'size'\?"):
        build_part({}, Part(kind="my_parts_of_a_test:thing", sise=4), "task")
    with pytest.raises(UserError, match=r"has no 'thingg'\. Did you mean 'thing'\?"):
        build_part({}, Part(kind="my_parts_of_a_test:thingg"), "task")
    assert build_part({"thing": Thing}, Part(kind="thing", size=5), "task") == Thing(size=5)


@pytest.mark.parametrize("path", ["nothing", ":", "a:", ":b", "", "no.such.module:x", "json:nope"])
def test_a_path_that_leads_nowhere_names_where_it_stood(path):
    with pytest.raises(UserError, match=r"^credit\.kind: "):
        load_object(path, "credit.kind")


def test_the_nearest_name_is_near():
    assert nearest("stepz", ["steps", "seed"]) == " Did you mean 'steps'?"
    assert nearest("qqqq", ["steps", "seed"]) == ""


def test_reading_a_recipe_needs_no_torch():
    code = "import sys, ccpo.config; ccpo.config.load_recipe('demo'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
