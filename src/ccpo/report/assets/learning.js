// Curves over steps.

const TEAM = { name: "team", label: "team", color: "var(--ink)" };

// Metrics whose name fits: [name, what the pattern caught].
function metricsLike(run, pattern) {
  return Object.keys(run.metrics.values).map((name) => [name, pattern.exec(name)]).filter(([, m]) => m).map(([name, m]) => [name, m]);
}

function series(run, name, label, color, dash) {
  return { name, label, color, dash, x: run.metrics.step, y: own(run.metrics.values, name) || [] };
}

function perAgent(run, stem, leaf, dash = null, suffix = "") {
  return run.agents.map((agent, i) => series(run, `${stem}/${agent}/${leaf}`, `${agent}${suffix}`, agentColor(i), dash));
}

function accuracySeries(run, set) {
  const exams = run.evaluations.filter((e) => e.reports[set]);
  const line = (label, color, dash, pick, points) => {
    const values = exams.map((e) => [e.step, pick(e.reports[set])]).filter(([, v]) => v);
    return { name: label, label, color, dash, points, x: values.map(([s]) => s), y: values.map(([, v]) => v[0]), low: values.map(([, v]) => v[1]), high: values.map(([, v]) => v[2]) };
  };
  return [line("team", TEAM.color, null, (r) => r.team, "joined"),
    ...run.agents.map((a, i) => line(`without ${a}`, agentColor(i), DASHES[1], (r) => own(r.without, a), "joined")),
    ...run.agents.map((a, i) => line(`${a} alone`, agentColor(i), DASHES[2], (r) => own(r.alone, a), "joined"))];
}

function rewardSeries(run) {
  const without = metricsLike(run, /^reward\/without_(.+)$/).map(([name, m]) => {
    const i = run.agents.indexOf(m[1]);
    return series(run, name, `without ${m[1].replaceAll("_", ", ")}`, agentColor(i), DASHES[1]);
  });
  const owned = metricsLike(run, /^reward\/(.+)_own$/).map(([name, m]) => series(run, name, `${m[1]}, own answer`, agentColor(run.agents.indexOf(m[1])), DASHES[2]));
  return [series(run, "reward/team", "team", TEAM.color, null), ...without, ...owned];
}

const PHASES = [["decode", "sampling"], ["verify", "verdicts"], ["rate", "ratings"], ["credit", "credit"], ["update", "update"], ["refresh", "refresh"], ["step", "whole step"]];
const TOKENS = [["joint", "joint"], ["counterfactual", "counterfactual"], ["rating", "ratings"]];
const phases = (run, stem, list) => list.map(([key, label], i) => series(run, `${stem}/${key}`, label, key === "step" ? TEAM.color : agentColor(i), DASHES[i === 6 ? 0 : i]));

function curves(run) {
  const sets = [...new Set(run.evaluations.flatMap((e) => Object.keys(e.reports)))].slice(0, 6);
  return [
    ...sets.map((set, i) => ({ id: `accuracy-${i}`, title: `Accuracy on ${set}`, note: "with 95% intervals", range: null, bridge: true, series: accuracySeries(run, set) })),
    { id: "reward", title: "Reward in training", note: "mean over the step's rollouts", series: rewardSeries(run) },
    { id: "credit-mean", title: "Mean credit", note: "what each agent is paid", series: perAgent(run, "credit", "mean") },
    { id: "share", title: "Share of credit", note: "of the mean absolute credit of all", range: [0, 1], format: percent, series: perAgent(run, "credit", "share") },
    { id: "gate", title: "Gate", note: "weight of the joint signal for the decider", range: [0, 1], series: perAgent(run, "credit", "gate") },
    { id: "kl", title: "KL", note: "of the old to the new policy; dashed: to the reference", zero: true, series: [...perAgent(run, "actor", "approx_kl"), ...perAgent(run, "actor", "kl", DASHES[1], ", reference")] },
    { id: "entropy", title: "Entropy", note: "mean over tokens, in nats", zero: true, series: perAgent(run, "actor", "entropy") },
    { id: "length", title: "Length", note: "mean tokens of a turn", zero: true, series: perAgent(run, "completions", "mean_length") },
    { id: "truncated", title: "Cut off", note: "share of turns that reached the limit", zero: true, format: percent, series: perAgent(run, "completions", "clipped_ratio") },
    { id: "tokens", title: "Tokens", note: "sampled in each step", zero: true, series: phases(run, "tokens", TOKENS) },
    { id: "seconds", title: "Seconds", note: "of each step, by phase", zero: true, series: phases(run, "seconds", PHASES) },
    { id: "grad", title: "Gradient", note: "norm before clipping", zero: true, series: perAgent(run, "actor", "grad_norm") },
    { id: "mismatch", title: "Engine and learner", note: "mean absolute difference of log-probs", zero: true, series: perAgent(run, "actor", "mismatch_mean") },
  ];
}

function viewControls() {
  const { view } = ui;
  const out = el("output", { for: "smooth" }, view.smooth.toFixed(2));
  const from = el("input", { id: "zoom-from", type: "number", min: 0, value: view.x0 ?? "", placeholder: "first", onchange: (e) => changeView({ x0: e.target.value === "" ? null : +e.target.value }) });
  const to = el("input", { id: "zoom-to", type: "number", min: 0, value: view.x1 ?? "", placeholder: "last", onchange: (e) => changeView({ x1: e.target.value === "" ? null : +e.target.value }) });
  view.listeners.add(() => {
    from.value = view.x0 ?? "";
    to.value = view.x1 ?? "";
  });
  return el("div", { class: "controls", role: "group", "aria-label": "How the curves are shown" },
    el("label", { class: "field", for: "smooth" }, el("span", null, "smoothing ", out), el("input", { id: "smooth", type: "range", min: 0, max: 0.98, step: 0.02, value: view.smooth, oninput: (e) => { out.textContent = (+e.target.value).toFixed(2); changeView({ smooth: +e.target.value }); } })),
    el("label", { class: "field", for: "zoom-from" }, el("span", null, "from step"), from),
    el("label", { class: "field", for: "zoom-to" }, el("span", null, "to step"), to),
    el("button", { type: "button", id: "zoom-reset", onclick: () => changeView({ x0: null, x1: null }) }, "All steps"),
    el("span", { class: "quiet hint" }, "Drag across a chart to zoom, double-click to go back."));
}

function anyMetric(run) {
  const names = Object.keys(run.metrics.values).sort();
  if (!names.length) return null;
  const place = el("div", { class: "any" });
  const show = (name) => {
    ui.metric = name;
    place.replaceChildren(lineChart({ id: "any", title: name, series: [series(run, name, name.split("/").pop(), "var(--a0)", null)] }));
  };
  const chosen = names.includes(ui.metric) ? ui.metric : names.find((n) => n.endsWith("/loss")) || names[0];
  const box = el("details", { id: "any-metric", ontoggle: () => box.open && !place.childElementCount && show(chosen) },
    el("summary", null, `Any other of the ${whole(names.length)} metrics`), select("metric", "metric", names.map((n) => [n, n]), chosen, show), place);
  return box;
}

function learning(run) {
  const drawn = curves(run).map(lineChart).filter(Boolean);
  if (!drawn.length) return section("learning", "Learning", "No step has been logged yet.");
  return section("learning", "Learning", null, viewControls(), el("div", { class: "charts" }, drawn), anyMetric(run));
}
