// The graph of turns, with what flows along its edges.

const BOX = { w: 156, h: 62 };

function layout(graph, upright) {
  const levels = [];
  for (const turn of graph.turns) (levels[turn.level] ||= []).push(turn.name);
  if (graph.decision) levels.push(["\u0000answer"]);
  const rows = levels.filter(Boolean);
  const across = Math.max(1, ...rows.map((r) => r.length));
  const gap = upright ? { along: 84, across: 18 } : { along: 150, across: 26 };
  const along = (upright ? BOX.h : BOX.w) + gap.along;
  const side = (upright ? BOX.w : BOX.h) + gap.across;
  const at = new Map();
  rows.forEach((names, i) => names.forEach((name, j) => {
    const a = i * along;
    const b = (j + (across - names.length) / 2) * side;
    at.set(name, upright ? { x: b, y: a } : { x: a, y: b });
  }));
  const size = [rows.length * along - gap.along, across * side - gap.across];
  return { at, width: (upright ? size[1] : size[0]) + 4, height: (upright ? size[0] : size[1]) + 8 };
}

function edges(graph) {
  const found = graph.turns.flatMap((turn) => turn.reads.map((from) => [from, turn.name]));
  return graph.decision ? [...found, ...graph.decision.reads.map((from) => [from, "\u0000answer"])] : found;
}

function curve(a, b, upright) {
  const [x1, y1] = upright ? [a.x + BOX.w / 2, a.y + BOX.h] : [a.x + BOX.w, a.y + BOX.h / 2];
  const [x2, y2] = upright ? [b.x + BOX.w / 2, b.y - 7] : [b.x - 7, b.y + BOX.h / 2];
  const mid = upright ? (y1 + y2) / 2 : (x1 + x2) / 2;
  const d = upright ? `M${x1} ${y1}C${x1} ${mid} ${x2} ${mid} ${x2} ${y2}` : `M${x1} ${y1}C${mid} ${y1} ${mid} ${y2} ${x2} ${y2}`;
  return { d, x: (x1 + x2) / 2, y: (y1 + y2) / 2 };
}

function drawTeam(run, win, tokens) {
  const graph = run.graph;
  const upright = document.documentElement.clientWidth < 700;
  const { at, width, height } = layout(graph, upright);
  const paid = new Map(win ? win.agents.map((a) => [a.agent, a.mean]) : []);
  const speaker = new Map(graph.turns.map((t) => [t.name, t.agent]));
  const list = edges(graph);
  const most = Math.max(1, ...graph.turns.map((t) => own(tokens, t.name)?.mean || 0));
  const root = svg("svg", { viewBox: `-2 -2 ${width} ${height}`, class: "graph", role: "img", "aria-label": `The team's graph: ${list.map(([a, b]) => `${a} to ${b.replace("\u0000", "the ")}`).join(", ")}.`, width: Math.min(width, 1100) },
    svg("defs", null, svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 7, markerHeight: 7, markerUnits: "userSpaceOnUse", orient: "auto" }, svg("path", { d: "M0 0L8 4L0 8z", fill: "var(--muted)" }))));
  const labels = svg("g");
  for (const [from, to] of list) {
    const line = curve(at.get(from), at.get(to), upright);
    const mean = own(tokens, from)?.mean;
    root.append(svg("path", { d: line.d, class: "edge", stroke: agentColor(run.agents.indexOf(speaker.get(from))), "stroke-width": isNumber(mean) ? 1.2 + 3.3 * (mean / most) : 1.5, "marker-end": "url(#arrow)" }));
    if (list.length <= 12) {
      const value = paid.get(speaker.get(from));
      const [x, anchor] = upright ? [line.x + 9, "start"] : [line.x, "middle"];
      labels.append(svg("text", { x, y: line.y - 8, class: "flow", "text-anchor": anchor }, isNumber(mean) ? `${brief(mean)} tokens` : ""), svg("text", { x, y: line.y + (upright ? 8 : 18), class: `flow ${sign(value)}`, "text-anchor": anchor }, isNumber(value) ? `credit ${signed(value)}` : ""));
    }
  }
  for (const turn of graph.turns) root.append(turnBox(turn, at.get(turn.name), run, paid, tokens));
  if (graph.decision) {
    const { x, y } = at.get("\u0000answer");
    root.append(svg("g", null, svg("rect", { x, y, width: BOX.w, height: BOX.h, rx: 31, class: "answer" }), svg("text", { x: x + BOX.w / 2, y: y + 27, class: "mid strong" }, "answer"), svg("text", { x: x + BOX.w / 2, y: y + 44, class: "mid small" }, oneLine((graph.decision.kind || "").replaceAll("_", " "), 22))));
  }
  root.append(labels);
  return root;
}

function turnBox(turn, { x, y }, run, paid, tokens) {
  const color = agentColor(run.agents.indexOf(turn.agent));
  const mean = own(tokens, turn.name)?.mean;
  const value = paid.get(turn.agent);
  const said = [isNumber(mean) ? `${brief(mean)} tok` : null, isNumber(value) ? `credit ${signed(value)}` : null].filter(Boolean).join(" · ");
  return svg("g", null, svg("rect", { x, y, width: BOX.w, height: BOX.h, rx: 8, class: "turn", stroke: color }),
    svg("text", { x: x + BOX.w / 2, y: y + (turn.name === turn.agent ? 27 : 22), class: "mid strong", fill: color }, oneLine(turn.name, 18)),
    turn.name === turn.agent ? null : svg("text", { x: x + BOX.w / 2, y: y + 37, class: "mid small" }, `by ${oneLine(turn.agent, 16)}`),
    svg("text", { x: x + BOX.w / 2, y: y + (turn.name === turn.agent ? 45 : 53), class: "mid small" }, said));
}

function edgeTable(run, win, tokens) {
  const speaker = new Map(run.graph.turns.map((t) => [t.name, t.agent]));
  const paid = new Map(win ? win.agents.map((a) => [a.agent, a]) : []);
  const rows = edges(run.graph).map(([from, to]) => [oneLine(from, 40), to.startsWith("\u0000") ? "the answer" : oneLine(to, 40), brief(own(tokens, from)?.mean), percent(own(tokens, from)?.cut), signed(paid.get(speaker.get(from))?.mean ?? null, 3)]);
  return el("details", { id: "edges" }, el("summary", null, "The same as a table"), dataTable("Edges of the graph", [{ label: "from" }, { label: "to" }, { label: "tokens", num: true }, { label: "cut off", num: true }, { label: "credit of the speaker", num: true }], rows));
}

function team(run) {
  const graph = run.graph;
  if (!graph.turns.length) return section("team", "Team", run.agents.length ? `Agents: ${listed(run.agents)}. The run does not say how they are wired: a team that is a function has no graph.` : "No episodes are there yet, and the recipe does not say who is in the team.");
  const place = el("div");
  const show = (i) => {
    ui.teamWindow = i;
    const win = run.credit[i];
    const tokens = graph.windows[i]?.tokens || {};
    place.replaceChildren(el("div", { class: "widebox", tabindex: "0", role: "region", "aria-label": "Drawing of the team" }, drawTeam(run, win, tokens)), edgeTable(run, win, tokens));
  };
  show(Math.min(ui.teamWindow, Math.max(0, run.credit.length - 1)));
  const prompts = Object.entries(graph.prompts);
  const lead = graph.source === "prompts" ? "The run does not hold its graph; this one is drawn from whose words are found in whose prompts." : null;
  return section("team", "Team", lead, windowPicker(run, ui.teamWindow, "Steps", show), place,
    el("p", { class: "quiet" }, "An arrow is a message that is read; its width follows the mean tokens of the turn, its numbers are those tokens and the mean credit of the agent that speaks."),
    prompts.length ? el("details", { id: "prompts" }, el("summary", null, "What each turn was first shown"), prompts.map(([name, text]) => el("div", null, el("h4", null, oneLine(name, 40)), plainText(el("pre", { class: "prompt" }), text)))) : null);
}
