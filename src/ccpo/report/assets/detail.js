// One rollout: what every agent said, beside what the team answered without it.

function rolloutDetail(data, row, go) {
  const group = row.group;
  return [
    el("header", null,
      el("p", { class: "where" }, el("span", { class: `badge ${isRight(row) ? "right" : "wrong"}` }, isRight(row) ? "✓ team right" : "✗ team wrong"), ` reward ${num(row.reward, 2)} · step ${group.step} · problem ${group.place + 1} · rollout ${row.n + 1} of ${group.rows.length}`),
      el("h3", { class: "sr" }, "Problem"), message(data.text(group.problem)),
      el("dl", { class: "answers" }, el("dt", null, "the team's answer"), el("dd", null, row.answer === null ? el("i", null, "none") : message(data.text(row.answer))), el("dt", null, "reference"), el("dd", null, message(data.text(group.answer))))),
    payTable(data, row),
    ...saidByAgent(data, row),
    ...otherCoalitions(data, row),
    siblings(data, row, go),
  ];
}

function payTable(data, row) {
  const rows = data.agents.map((agent, a) => {
    const plays = data.playsWithout(row, a);
    const word = effect(row, a, plays);
    return { a, cells: [{ node: el("span", { class: "agent", vars: { "--agent": agentColor(a) } }, oneLine(agent, 40)) }, { node: signed(row.credit[a], 3), class: sign(row.credit[a]) }, { node: signed(row.advantage[a], 3), class: sign(row.advantage[a]) }, { node: plays.length ? num(meanOf(plays.map((p) => p.reward)), 2) : "–" }, { node: word ? el("span", { class: `effect ${word}` }, word) : "–" }] };
  }).filter(({ cells }) => cells.slice(1).some((c) => c.node !== "–"));
  if (!rows.length) return null;
  return dataTable("Pay", [{ label: "agent" }, { label: "credit", num: true }, { label: "advantage", num: true }, { label: "reward without it", num: true }, { label: "effect" }], rows.map((r) => r.cells));
}

function saidByAgent(data, row) {
  const shown = new Set();
  return row.turns.map((t) => {
    const turn = data.turn(t.turn);
    const first = !shown.has(turn.agent);
    shown.add(turn.agent);
    return el("section", { class: "pair", vars: { "--agent": agentColor(turn.place) } },
      el("div", { class: "said" }, turnHead(turn, t), message(data.text(t.text))),
      el("div", { class: "instead" }, first ? without(data, row, turn) : el("p", { class: "quiet" }, `Without ${oneLine(turn.agent, 40)}: see above.`)));
  });
}

function turnHead(turn, t) {
  const name = turn.name === turn.agent ? oneLine(turn.name, 40) : `${oneLine(turn.agent, 40)}: ${oneLine(turn.name, 40)}`;
  return el("h4", null, el("span", { class: "agent" }, name), el("small", { class: "quiet" },
    isNumber(t.tokens) ? ` ${plural(t.tokens, "token")}` : "", t.score !== null ? ` · score ${num(t.score, 2)}` : ""), t.cut ? el("span", { class: "tag" }, "cut off") : null);
}

function without(data, row, turn) {
  const plays = turn.place < 0 ? [] : data.playsWithout(row, turn.place);
  const head = el("h4", null, `Without ${oneLine(turn.agent, 40)}`);
  if (!plays.length) return [head, el("p", { class: "quiet" }, "Nothing was played without it: nobody answers then, or the rule did not ask.")];
  const right = plays.filter((p) => p.reward >= 0.999).length;
  const about = plays.length > 1 ? el("small", { class: "quiet" }, ` right in ${right} of ${plays.length} draws`) : null;
  head.append(...(about ? [about] : []));
  return [head, ...foldAfter(plays.map((p) => playBox(data, p)), 3)];
}

function playBox(data, p) {
  const right = p.reward >= 0.999;
  return el("div", { class: "play" },
    el("p", null, el("span", { class: `badge ${right ? "right" : "wrong"}` }, right ? "✓" : "✗", el("span", { class: "sr" }, right ? " right" : " wrong")), ` reward ${num(p.reward, 2)}, `,
      p.answer === null ? el("i", null, "no answer") : el("bdi", null, "answer ", el("b", null, oneLine(data.string(p.answer), 80))), p.cached ? el("small", { class: "quiet" }, " (reward reused; its text is not kept)") : null),
    p.turns.map((t) => {
      const turn = data.turn(t.turn);
      return el("div", { class: "replayed", vars: { "--agent": agentColor(turn.place) } }, turnHead(turn, t), message(data.text(t.text)));
    }));
}

function foldAfter(nodes, most) {
  if (nodes.length <= most + 1) return nodes;
  return [...nodes.slice(0, most), el("details", null, el("summary", null, `${nodes.length - most} more draws`), nodes.slice(most))];
}

// Plays without several agents at once.
function otherCoalitions(data, row) {
  const found = [...data.coalitions(row)].filter(([, plays]) => plays[0].removed.length !== 1);
  return found.map(([, plays]) => {
    const names = listed(plays[0].removed.map((a) => oneLine(data.agents[a] ?? "?", 40)));
    return el("details", { class: "coalition" }, el("summary", null, `Without ${names}: reward ${num(meanOf(plays.map((p) => p.reward)), 2)}`), plays.slice(0, 20).map((p) => playBox(data, p)));
  });
}

// The other rollouts of this problem, here and in other steps.
function siblings(data, row, go) {
  const link = (other, text, current) => el("button", { type: "button", class: `sib ${isRight(other) ? "right" : "wrong"}`, "aria-current": current ? "true" : null, onclick: () => go(other), title: `step ${other.group.step}, reward ${num(other.reward, 2)}` }, text, el("span", { class: "mark" }, isRight(other) ? " ✓" : " ✗"));
  const here = el("p", { class: "sibs" }, el("span", { class: "quiet" }, "This problem, this step: "), row.group.rows.map((r) => link(r, `${r.n + 1}`, r === row)));
  const groups = data.byProblem.get(data.problemKey(row.group)).filter((g) => g !== row.group && g.rows.length);
  const other = el("p", { class: "sibs" }, el("span", { class: "quiet" }, "At other steps: "), groups.length ? groups.slice(0, 60).map((g) => {
    const mean = meanOf(g.rows.map((r) => r.reward));
    const button = link(g.rows[0], `step ${g.step}`, false);
    button.lastChild.textContent = ` ${num(mean, 2)}`;
    return button;
  }) : el("span", { class: "quiet" }, "it was not played."));
  return el("nav", { "aria-label": "Other rollouts of this problem" }, here, other);
}
