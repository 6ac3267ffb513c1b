// Several runs over one another.

function runNames(runs) {
  const seen = new Map();
  return runs.map((run) => {
    const name = oneLine(run.name, 40);
    const count = (seen.get(name) || 0) + 1;
    seen.set(name, count);
    return runs.filter((r) => r.name === run.name).length > 1 ? `${name} ${count}` : name;
  });
}

const AXES = [["step", "by steps"], ["tokens", "by generated tokens"]];
const OVERLAID = [["reward/team", "Reward in training"], ["tokens/counterfactual", "Counterfactual tokens of each step"], ["seconds/step", "Seconds of each step"]];

function overlaid(runs, names, metric, title, axis) {
  return {
    id: `compare-${metric}`, title, xName: axis === "step" ? "step" : "tokens", free: true, series: runs.map((run, i) => {
      const x = axis === "step" ? run.metrics.step : own(run.metrics.values, "tokens/total") || [];
      const y = own(run.metrics.values, metric) || [];
      const there = x.map((v, j) => [v, y[j]]).filter(([v]) => isNumber(v));
      return { name: String(i), label: names[i], color: agentColor(i), dash: DASHES[i % DASHES.length], x: there.map(([v]) => v), y: there.map(([, v]) => v ?? null) };
    }),
  };
}

function examined(runs, names, set, axis) {
  return {
    id: `compare-eval-${set}`, title: `Accuracy on ${set}`, note: "with 95% intervals", xName: axis === "step" ? "step" : "tokens", free: true, series: runs.map((run, i) => {
      const exams = run.evaluations.filter((e) => e.reports[set] && isNumber(axis === "step" ? e.step : e.tokens));
      const at = (k) => exams.map((e) => e.reports[set].team[k]);
      return { name: String(i), label: names[i], color: agentColor(i), dash: DASHES[i % DASHES.length], points: "joined", x: exams.map((e) => (axis === "step" ? e.step : e.tokens)), y: at(0), low: at(1), high: at(2) };
    }),
  };
}

function comparison(runs, names) {
  const columns = [{ label: "run" }, { label: "credit" }, { label: "steps", num: true }, { label: "before", num: true }, { label: "after", num: true }, { label: "tokens", num: true }, { label: "time", num: true }];
  return dataTable("The runs: accuracy of the team on the first data set, with 95% intervals", columns, runs.map((run, i) => {
    const { before, after } = beforeAfter(run) || {};
    const spent = run.spent;
    return [{ node: el("span", { class: "agent", vars: { "--agent": agentColor(i) } }, names[i]) }, run.made.kinds.credit || "–", whole(run.progress.step), estimate(firstSet(run, before)?.team), estimate(firstSet(run, after)?.team), whole((spent.joint || 0) + (spent.counterfactual || 0) + (spent.rating || 0)), duration(spent.seconds)];
  }));
}

function differences(runs, names) {
  const all = runs.map((run) => new Map(run.made.config));
  const keys = [...new Set(all.flatMap((m) => [...m.keys()]))].filter((k) => !/^run\.(dir|name|overwrite)$/.test(k) && new Set(all.map((m) => m.get(k))).size > 1);
  if (!keys.length) return el("p", { class: "quiet" }, "Their recipes say the same.");
  return dataTable("Where their recipes differ", [{ label: "key" }, ...names.map((label) => ({ label }))], keys.map((k) => [el("code", null, oneLine(k)), ...all.map((m) => oneLine(m.get(k) ?? "–", 120))]));
}

function compare(runs) {
  if (runs.length < 2) return section("compare", "Compare", "One run is shown. Name several to lay their curves over one another: ccpo report RUN RUN …");
  const names = runNames(runs);
  const sets = [...new Set(runs.flatMap((run) => run.evaluations.flatMap((e) => Object.keys(e.reports))))].slice(0, 6);
  const place = el("div", { class: "charts" });
  const show = (axis) => {
    ui.axis = axis;
    const specs = [...sets.map((set) => examined(runs, names, set, axis)), ...OVERLAID.map(([metric, title]) => overlaid(runs, names, metric, title, axis))];
    place.replaceChildren(...specs.map(lineChart).filter(Boolean));
  };
  show(ui.axis || "step");
  return section("compare", "Compare", null, comparison(runs, names), segmented("Horizontal axis", AXES, ui.axis || "step", show), place, el("h3", null, "Recipes"), differences(runs, names));
}
