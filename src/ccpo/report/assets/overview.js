// What was trained, what came of it, what it cost, what to be wary of.

function firstSet(run, exam) {
  const names = exam ? Object.keys(exam.reports) : [];
  return names.length ? exam.reports[names[0]] : null;
}

// The evaluation before training, and the last one; of the latter the last with ablations too, where there is one.
function beforeAfter(run) {
  const exams = run.evaluations;
  if (!exams.length) return null;
  const before = exams[0].step === 0 ? exams[0] : null;
  const after = exams[exams.length - 1];
  return { before, after: after === before ? null : after };
}

function resultRows(run, set) {
  const { before, after } = beforeAfter(run);
  const b = before?.reports[set];
  const a = after?.reports[set];
  const rows = [{ label: "team", color: "var(--ink)", before: b?.team, after: a?.team, strong: true }];
  for (const [kind, label] of [["without", (n) => `team without ${n}`], ["blank", (n) => `team with ${n} blank`], ["alone", (n) => `${n} alone`]]) {
    run.agents.forEach((name, i) => {
      const pair = [own(b?.[kind], name), own(a?.[kind], name)];
      if (pair[0] || pair[1]) rows.push({ label: label(name), color: agentColor(i), before: pair[0], after: pair[1] });
    });
  }
  return rows;
}

const own = (object, key) => (object && Object.hasOwn(object, key) ? object[key] : null);

function inOneSentence(run) {
  const kinds = run.made.kinds;
  const who = run.agents.length ? `${plural(run.agents.length, "agent")} (${listed(run.agents)})` : "A team";
  const task = kinds.task ? ` on ${kinds.task}` : "";
  const rule = kinds.credit ? `, paid by ${kinds.credit}` : "";
  return `${who}${kinds.team ? ` as ${kinds.team}` : ""}${task}${rule}.`;
}

function resultSentence(run) {
  const found = beforeAfter(run);
  const set = found && Object.keys((found.after || found.before).reports)[0];
  const after = set && found.after?.reports[set]?.team;
  const before = set && found.before?.reports[set]?.team;
  if (!after && !before) return "It has not been evaluated yet.";
  const on = `on ${plural((found.after || found.before).reports[set].problems || 0, "problem")} of ${set}`;
  if (!after) return `Before training its accuracy is ${num(before[0])} ${on}; there is no evaluation after it yet.`;
  if (!before) return `Its accuracy at step ${found.after.step} is ${num(after[0])} ${on}.`;
  const verdict = apart(before, after) ? "" : " The intervals overlap: no clear change.";
  return `Accuracy ${on} went from ${num(before[0])} to ${num(after[0])} in ${plural(found.after.step, "step")}.${verdict}`;
}

function stateSentence(run) {
  const p = run.progress;
  if (p.failed) return "failed: the batch that broke it is in failure/";
  if (p.finished) return `finished at step ${whole(p.step)}`;
  const of = p.steps && p.steps < 1e6 ? ` of ${whole(p.steps)}` : p.budget ? `, ${whole(p.budget)} tokens in all` : "";
  return `not finished: step ${whole(p.step)}${of}`;
}

const fact = (label, value, note) => el("div", { class: "fact" }, el("dt", null, label), el("dd", null, el("b", null, value), note ? el("span", { class: "quiet" }, note) : null));

function facts(run) {
  const found = beforeAfter(run);
  const set = found && Object.keys((found.after || found.before).reports)[0];
  const last = set && (found.after || found.before).reports[set].team;
  const spent = run.spent;
  const extra = (spent.counterfactual || 0) + (spent.rating || 0);
  const share = spent.joint ? `${percent(extra / spent.joint)} on top for counterfactuals${spent.rating ? " and ratings" : ""}` : null;
  const time = isNumber(spent.total) ? `${duration(spent.total)} in all${spent.bootstrap ? `, ${duration(spent.bootstrap)} of it for the base model` : ""}` : null;
  return el("dl", { class: "facts" },
    fact("accuracy of the team", last ? num(last[0]) : "–", last ? `95%: ${num(last[1])}–${num(last[2])}` : null),
    fact("steps", whole(run.progress.step), stateSentence(run)),
    fact("tokens sampled in training", whole((spent.joint || 0) + extra), share),
    fact("time in training", duration(spent.seconds), time),
    fact("rollouts", whole(run.rollouts.seen), run.rollouts.shown < run.rollouts.seen ? `${whole(run.rollouts.shown)} are in this page` : "all are in this page"));
}

function warningList(run) {
  const box = el("div", { class: "warnings", id: "warnings" }, el("h3", null, "Warnings"));
  for (const w of run.warnings) {
    box.append(el("article", { class: `warning ${w.level}` }, el("h4", null, `${w.level === "warn" ? "⚠ " : "ℹ "}${w.title}`), el("p", null, w.what), w.try ? el("p", null, el("b", null, "Try: "), w.try) : null));
  }
  if (!run.warnings.length) box.append(el("p", { class: "quiet" }, "None."));
  if (run.notes.length) {
    box.append(el("details", { id: "notes", open: run.notes.length <= 4 }, el("summary", null, `${plural(run.notes.length, "note")} on what this page leaves out`), el("ul", null, run.notes.map((n) => el("li", null, n)))));
  }
  return box;
}

function making(run) {
  const made = run.made;
  const pairs = [
    ["command", made.command ? el("code", null, oneLine(made.command, 2000)) : "not recorded"],
    ["commit", made.commit ? el("code", null, oneLine(made.commit)) : "not recorded"],
    ["versions", Object.entries(made.versions).map(([k, v]) => `${k} ${v}`).join(", ") || "not recorded"],
    ["folder", el("code", null, oneLine(run.folder, 400))],
    ["last written", run.progress.written || "–"],
    ...Object.entries(made.objects).map(([k, v]) => [`${k}, from Python`, el("code", null, oneLine(v || ""))]),
  ];
  return el("div", null, el("h3", null, "How it was made"),
    el("dl", { class: "pairs" }, pairs.map(([k, v]) => [el("dt", null, k), el("dd", null, v)])),
    made.config.length ? el("details", { id: "recipe" }, el("summary", null, `The whole recipe: ${plural(made.config.length, "key")}`),
      dataTable("The recipe, with every default", [{ label: "key" }, { label: "value" }], made.config.map(([k, v]) => [el("code", null, oneLine(k)), el("span", null, oneLine(v, 500))]), { class: "recipe" })) : null);
}

function overview(run) {
  const found = beforeAfter(run);
  const sets = found ? Object.keys((found.after || found.before).reports) : [];
  const results = sets.map((set) => dumbbell(resultRows(run, set), `${set}: accuracy before and after training, with 95% intervals`));
  const single = sets.flatMap((set) => ["pass@k", "majority@k"].map((kind) => [set, kind, Object.entries((found.after || found.before).reports[set][kind])]).filter(([, , v]) => v.length > 1));
  return section("overview", "Overview", `${inOneSentence(run)} ${resultSentence(run)}`, facts(run), warningList(run), results,
    single.map(([set, kind, values]) => el("p", { class: "quiet" }, `${set}, ${kind}: ${values.map(([k, v]) => `${k}: ${num(v)}`).join(", ")}`)), making(run));
}
