// Who earned what.

function windowPicker(run, chosen, label, change) {
  const all = run.credit;
  if (all.length < 2) return null;
  return segmented(label, all.map((w, i) => [i, i ? `${w.name} (${w.from}–${w.to})` : w.name]), chosen, change);
}

function creditTable(run, win) {
  const columns = [{ label: "agent" }, { label: "mean credit", num: true }, { label: "team right", num: true }, { label: "team wrong", num: true }, { label: "helped", num: true }, { label: "hurt", num: true }, { label: "r with shared reward", num: true }, { label: "effective signal", num: true }];
  const rows = win.agents.map((a) => {
    const total = a.pairs ? a.pairs.slice(0, 4).reduce((x, y) => x + y, 0) : 0;
    return [
      { node: el("span", { class: "agent", vars: { "--agent": agentColor(run.agents.indexOf(a.agent)) } }, oneLine(a.agent, 40)) },
      { node: signed(a.mean, 3) },
      { node: a.correct ? signed(a.correct.median) : "–" },
      { node: a.wrong ? signed(a.wrong.median) : "–" },
      { node: total ? percent(a.pairs[0] / total) : "–" },
      { node: total ? percent(a.pairs[1] / total) : "–" },
      { node: num(a.corr, 2) },
      { node: percent(a.signal) },
    ];
  });
  return el("div", null, dataTable(`${win.name}: ${plural(win.rollouts, "rollout")}, mean reward ${num(win.reward)}`, columns, rows),
    el("p", { class: "quiet" }, "Team right and wrong: median credit. r: correlation of credit with the team's reward over all rollouts; near 1, credit says little that shared reward does not. Effective signal: share of groups in which some rollout has an advantage that is not 0. A rollout is right where its reward is full (at least 0.999)."));
}

function creditWindow(run, win) {
  const paid = win.agents.filter((a) => a.correct || a.wrong);
  const paired = win.agents.filter((a) => a.pairs);
  return [creditTable(run, win),
    el("h3", null, "Credit when the team is right, and when it is wrong"),
    boxPlots(paid, run.agents, "Credit by agent"),
    el("p", { class: "quiet" }, "Box: quartiles; line: median, its value at the right; diamond: mean; whiskers: the last value within 1.5 box lengths. An agent whose two boxes agree is paid alike for right and wrong answers."),
    el("h3", null, "Joint against solo"),
    paired.length ? el("div", { class: "joints" }, paired.map((a) => matrix(oneLine(a.agent, 40), a.pairs, agentColor(run.agents.indexOf(a.agent))))) : el("p", { class: "quiet" }, "No play without a single agent was drawn in these steps, so there is nothing to compare with."),
    paired.length ? el("p", { class: "quiet" }, KINDS.map(([name, what]) => `${name}: ${what}`).join("; "), ".", deciderNote(run, win)) : null];
}

function deciderNote(run, win) {
  const lacking = win.agents.filter((a) => !a.pairs && (a.correct || a.wrong)).map((a) => a.agent);
  return lacking.length ? ` Without ${listed(lacking)} nothing was played: nobody answers, or the rule did not ask.` : "";
}

function lazyTest(run) {
  const exams = run.evaluations.filter((e) => Object.values(e.reports).some((r) => Object.keys(r.blank).length));
  const box = el("div", { id: "lazy" }, el("h3", null, "Lazy agents"));
  if (!exams.length) {
    box.append(el("p", { class: "quiet" }, "No evaluation with ablations is in the run: they are made before and after training unless eval.ablations is false."));
    return box;
  }
  const last = exams[exams.length - 1];
  const first = exams[0] === last ? null : exams[0];
  for (const [set, report] of Object.entries(last.reports)) {
    const rows = run.agents.filter((a) => own(report.blank, a)).map((agent) => {
      const before = first?.reports[set];
      const cost = report.team[0] - report.blank[agent][0];
      return [
        { node: el("span", { class: "agent", vars: { "--agent": agentColor(run.agents.indexOf(agent)) } }, oneLine(agent, 40)) },
        { node: before ? signed(before.team[0] - (own(before.blank, agent)?.[0] ?? NaN), 3) : "–" },
        { node: estimate(report.team) }, { node: estimate(report.blank[agent]) }, { node: signed(cost, 3), class: apart(report.team, report.blank[agent]) ? sign(cost) : "" },
        { node: verdict(report.team, report.blank[agent]) },
      ];
    });
    if (rows.length) box.append(dataTable(`${set}, step ${last.step}: the team with an agent's messages blank`, [{ label: "agent" }, { label: "cost before", num: true }, { label: "team", num: true }, { label: "agent blank", num: true }, { label: "cost now", num: true }, { label: "in words" }], rows));
  }
  box.append(el("p", { class: "quiet" }, "Cost: what the team loses when the agent's messages are there and empty. An agent that can be blanked at no cost adds nothing."));
  return box;
}

function verdict(team, blank) {
  if (!apart(team, blank)) return "no clear difference: it may be coasting";
  return team[0] > blank[0] ? "its messages matter" : "the team is better without them";
}

const lowest = (run) => Math.min(0, ...run.agents.flatMap((a) => (own(run.metrics.values, `credit/${a}/shared_corr`) || []).filter(isNumber)));

function credit(run) {
  if (!run.credit.length) return section("credit", "Credit", "No episodes are there yet, so credit cannot be shown.", lazyTest(run), freeRiding(run));
  const place = el("div", { id: "credit-window", "aria-live": "off" });
  const show = (i) => {
    ui.window = i;
    place.replaceChildren(...creditWindow(run, run.credit[i]).flat().filter(Boolean));
  };
  show(Math.min(ui.window, run.credit.length - 1));
  const rates = [
    { id: "helped", title: "Helped", note: "how often the reward is above the one without it", range: [0, 1], format: percent, series: perAgent(run, "credit", "helped") },
    { id: "hurt", title: "Hurt", note: "how often below", zero: true, format: percent, series: perAgent(run, "credit", "hurt") },
    { id: "shared-corr", title: "Correlation with shared reward", note: "of advantages; at 1 the counterfactual says nothing", range: [lowest(run) < 0 ? -1 : 0, 1], series: perAgent(run, "credit", "shared_corr") },
    { id: "signal", title: "Without signal", note: "share of problems whose advantages are all 0", range: [0, 1], format: percent, series: perAgent(run, "credit", "no_signal") },
  ].map(lineChart).filter(Boolean);
  return section("credit", "Credit", null, windowPicker(run, ui.window, "Steps", show), place, lazyTest(run), freeRiding(run), rates.length ? el("h3", null, "Over the steps") : null, el("div", { class: "charts" }, rates));
}
