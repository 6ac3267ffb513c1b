"""Alarms about what becomes of rewards on their way to a gradient."""

from __future__ import annotations

from ccpo.alarms.base import Alarm, View

SILENT = 0.80
"""Share of problems on which every advantage is 0. At 0.8 a step costs five times the tokens that teach."""
SOLVED = 0.90
"""Mean reward from which silent problems are solved ones, which is success."""
EXPLOSIONS = 2
"""Steps of the window with a normalised signal of 20 deviations or more: one may be a freak, two are a normaliser that has broken down."""
DRIFTED = 0.9
"""Share of the steps in which engine and learner are too far apart. Were their median not, so many would be a chance of 1% in 10 steps and of 1 in
5,000 in 20; the mean will not do, since single tokens rule it."""
SHARED_RULES = ("shared", "SharedReward")
"""Rules that are meant to pay one reward to all."""


def no_signal(view: View) -> list[Alarm]:
    """Groups of rollouts that teach nothing."""
    found = []
    reward = view.problems("reward")
    for agent in view.shape.agents:
        silent = view.problems(f"silent/{agent}")
        if silent is None or reward is None or silent.share_bounds()[0] <= SILENT or reward.mean >= SOLVED:
            continue
        hard = reward.mean < 0.5
        found.append(
            Alarm(
                level="warn",
                name="no_signal",
                title=f"{agent} learns from few problems",
                what=f"On {silent.mean:.0%} of the problems every rollout pays {agent} the same, at a mean reward of {reward.mean:.2f}: these tokens "
                f"teach nothing. {'The problems are too hard' if hard else 'Rollouts of a problem are too much alike'}.",
                remedy="easier problems or a better start; more samples a problem (rollout.samples)."
                if hard
                else "more samples a problem (rollout.samples), a higher temperature, problems of middling difficulty.",
                agent=agent,
                evidence={"silent": silent.mean, "low": silent.share_bounds()[0], "reward": reward.mean},
            )
        )
    return found


def same_as_shared(view: View) -> list[Alarm]:
    """A rule that has become shared reward."""
    told = {a: m for a in view.shape.agents if (m := view.steps(f"same/{a}"))}
    agents = [agent for agent, same in told.items() if same.mean == 1.0]
    paid_apart = [a for a in told if a != view.shape.decider] or list(told)
    if view.rule in SHARED_RULES or not agents or not set(paid_apart) <= set(agents):
        return []
    return [
        Alarm(
            level="info",
            name="same_as_shared",
            title=f"the rule ({view.rule}) pays shared reward",
            what=f"In every step of the window the advantages of {', '.join(agents)} are those under shared reward, up to a factor: the estimator "
            "takes the counterfactual away again, and what its rollouts cost is for nothing.",
            remedy="credit.kind: auto or advantage: none, which keep what the rule says; credit.pairing: paired; or credit.kind: shared, which "
            "is the same for less.",
            agent=None,
            evidence={"agents": agents, "steps": int(min(told[a].n for a in agents))},
        )
    ]


def exploding_normalisation(view: View) -> list[Alarm]:
    """A signal divided by a deviation that is not its own."""
    found = []
    for agent in view.shape.agents:
        exploded, largest = view.steps(f"exploded/{agent}"), view.recent.get(f"largest/{agent}")
        if exploded is None or largest is None or exploded.total < EXPLOSIONS:
            continue
        found.append(
            Alarm(
                level="warn",
                name="exploding_normalisation",
                title=f"{agent}'s credit explodes",
                what=f"In {exploded.total:.0f} of {exploded.n:.0f} steps {agent} was paid 20 deviations or more: what it was divided by is "
                "not the deviation of these values, and single rollouts rule the gradient.",
                remedy="bound the deviation (credit.sigma_floor: 0.1) and leave out groups without spread (credit.skip_flat: true, "
                "credit.center: true); an estimator that normalises by group (advantage: grpo); optim.max_grad_norm near the gradient's usual size.",
                agent=agent,
                evidence={"steps": int(exploded.total), "of": int(exploded.n), "largest_mean": largest.mean},
            )
        )
    return found


def engine_mismatch(view: View) -> list[Alarm]:
    """An engine that does not sample from the policy that is trained."""
    found = []
    for agent in view.shape.agents:
        drift, drifted = view.steps(f"drift/{agent}"), view.steps(f"drifted/{agent}")
        if drift is None or drifted is None or drifted.mean < DRIFTED:
            continue
        found.append(
            Alarm(
                level="warn",
                name="engine_mismatch",
                title=f"{agent}'s engine and learner disagree",
                what=f"The engine samples from another distribution than the learner trains: {drift.mean:.3f} nats of KL a token. "
                "The gradient is that of another policy.",
                remedy="float32 in the engine (model.decode: float32); old log-probs from the learner (loss.old_logprobs: learner) with truncated "
                "importance weights (loss.importance_cap: 2); under trainer.async_depth: 1 a lower optim.lr; "
                "check that temperature and weights are those of the learner.",
                agent=agent,
                evidence={"k3": drift.mean, "share_of_steps": drifted.mean, "steps": int(drift.n)},
            )
        )
    return found
