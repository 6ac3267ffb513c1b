// What each agent contributes, where `ccpo diagnose free-riding` has measured it.

function freeRiding(run) {
  const found = run.free_riding;
  const box = el("div", { id: "free-riding" }, el("h3", null, "Who helps and who coasts"));
  if (!found) {
    box.append(el("p", { class: "quiet" }, `Not measured: ccpo diagnose free-riding ${oneLine(run.folder, 80)} plays the team without each agent, with its messages blank, and with its texts spoken again.`));
    return box;
  }
  const figures = [["removal", "removal"], ["blank", "blank"], ["replay", "replay"], ["shapley", "Shapley"]];
  const rows = found.agents.map((a) => [
    { node: el("span", { class: "agent", vars: { "--agent": agentColor(run.agents.indexOf(a.agent)) } }, oneLine(a.agent, 40)) },
    ...figures.map(([key]) => ({ node: a[key] ? estimate(a[key]) : "–" })),
    { node: oneLine(a.verdict, 40) },
  ]);
  const of = [found.data, found.checkpoint, found.problems === null ? null : plural(found.problems, "problem")].filter(Boolean).map((t) => oneLine(t, 80));
  box.append(dataTable(of.join(", "), [{ label: "agent" }, ...figures.map(([, label]) => ({ label, num: true })), { label: "in words" }], rows));
  box.append(el("p", { class: "quiet" }, "Points of reward with 95% intervals. Removal: what the team loses without the agent; blank: with its messages empty; replay: how far the reward moves with what it says; Shapley: what it adds to the parts of the team."));
  for (const line of found.untold) box.append(el("p", { class: "quiet" }, `Not told: ${oneLine(line, 400)}`));
  return box;
}
