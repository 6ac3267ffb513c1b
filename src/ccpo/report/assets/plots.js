// Drawings that are not curves. Each is an image with its numbers in words, and stands beside a table or carries its own labels.

// Before and after with 95% intervals on one axis: rows of {label, color, before: [mean, low, high], after, strong}.
function dumbbell(rows, title) {
  const there = rows.flatMap((r) => [r.before, r.after]).filter(Boolean);
  const high = Math.max(1, ...there.map((v) => v[2]));
  const low = Math.min(0, ...there.map((v) => v[1]));
  const figure = (row) => {
    const width = 400;
    const height = 30;
    const x = linear([low, high], [8, width - 8]);
    const said = `${row.label}: before ${interval(row.before)}, after ${interval(row.after)}`;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said, class: "dumbbell", preserveAspectRatio: "xMinYMid" },
      [0, 0.25, 0.5, 0.75, 1].map((v) => svg("line", { x1: x(v), x2: x(v), y1: 0, y2: height, class: v === 0 || v === 1 ? "zero" : "grid" })));
    if (row.before && row.after) {
      root.append(svg("line", { x1: x(row.before[0]), x2: x(row.after[0]), y1: 15, y2: 15, stroke: row.color, "stroke-width": 2, opacity: 0.45 }));
    }
    const mark = (v, hollow, dy) => v && root.append(
      svg("line", { x1: x(v[1]), x2: x(v[2]), y1: 15 + dy, y2: 15 + dy, stroke: row.color, "stroke-width": 1.5 }),
      svg("circle", { cx: x(v[0]), cy: 15 + dy, r: 5, fill: hollow ? "var(--surface)" : row.color, stroke: row.color, "stroke-width": 2 }));
    mark(row.before, true, row.after ? -4 : 0);
    mark(row.after, false, row.before ? 4 : 0);
    return root;
  };
  const columns = [{ label: "" }, { label: "before", num: true }, { label: "after", num: true }, { label: "change", num: true }, { label: "○ before  ● after, on 0 to 1" }];
  return dataTable(title, columns, rows.map((row) => [
    { node: row.label, class: row.strong ? "strong" : "" },
    { node: estimate(row.before) },
    { node: estimate(row.after), class: row.strong ? "strong" : "" },
    { node: row.before && row.after ? signed(row.after[0] - row.before[0], 3) : "–", class: row.before && row.after && apart(row.before, row.after) ? sign(row.after[0] - row.before[0]) : "" },
    { node: figure(row), class: "drawn" },
  ]), { class: "dumbbells" });
}

const estimate = (v) => (v ? el("span", null, num(v[0]), el("small", { class: "range" }, ` ${num(v[1], 2)}–${num(v[2], 2)}`)) : "–");
const apart = (a, b) => a[2] < b[1] || b[2] < a[1];

// Box plots of credit, two for each agent, on one axis.
function boxPlots(agents, names, title) {
  const boxes = agents.flatMap((a) => [a.correct, a.wrong]).filter(Boolean);
  if (!boxes.length) return el("p", { class: "quiet" }, "No credit was paid in these steps.");
  const width = 760;
  const left = 190;
  const rowHeight = 26;
  const gap = 14;
  const height = agents.length * (2 * rowHeight + gap) + 44;
  const [low, high] = extent(boxes.flatMap((b) => [b.low, b.high, b.mean]), false);
  const x = linear([low, high], [left, width - 64]);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${agents.map((a) => `${a.agent}: ${boxSaid("team right", a.correct)}; ${boxSaid("team wrong", a.wrong)}`).join(". ")}`, class: "boxes" });
  root.append(svg("text", { x: width, y: 10, class: "end" }, "median"));
  for (const v of ticks(low, high, 7)) {
    root.append(svg("line", { x1: x(v), x2: x(v), y1: 14, y2: height - 26, class: v === 0 ? "zero" : "grid" }), svg("text", { x: x(v), y: height - 8, class: "x" }, brief(v)));
  }
  agents.forEach((a, i) => {
    const top = i * (2 * rowHeight + gap) + 16;
    const color = agentColor(names.indexOf(a.agent));
    root.append(svg("text", { x: 0, y: top + rowHeight + 5, fill: color, class: "who" }, oneLine(a.agent, 14)));
    [["correct", "✓ team right"], ["wrong", "✗ team wrong"]].forEach(([key, label], j) => {
      const y = top + j * rowHeight + rowHeight / 2;
      root.append(svg("text", { x: left - 10, y: y + 4, class: "y" }, label));
      oneBox(root, a[key], x, y, color, key === "correct", width);
    });
  });
  return el("div", { class: "widebox", tabindex: "0", role: "region", "aria-label": title }, root);
}

const boxSaid = (label, b) => (b ? `${label} median ${num(b.median)}, quartiles ${num(b.q1)} to ${num(b.q3)}, ${whole(b.n)} rollouts` : `${label}: none`);

function oneBox(root, b, x, y, color, filled, width) {
  if (!b) {
    root.append(svg("text", { x: 198, y: y + 4, class: "none" }, "none"));
    return;
  }
  const line = (x1, x2, props) => svg("line", { x1: x(x1), x2: x(x2), y1: y, y2: y, stroke: color, "stroke-width": 1.5, ...props });
  root.append(svg("g", null,
    svg("title", null, `${boxSaid("", b)}; mean ${num(b.mean)}; from ${num(b.min)} to ${num(b.max)}; ${whole(b.outside)} outside the whiskers`),
    line(b.low, b.q1), line(b.q3, b.high),
    svg("rect", { x: x(b.q1) - 0.5, y: y - 8, width: Math.max(2, x(b.q3) - x(b.q1) + 1), height: 16, rx: 2, fill: filled ? color : "var(--surface)", "fill-opacity": filled ? 0.3 : 1, stroke: color, "stroke-width": 1.5, "stroke-dasharray": filled ? null : "4 2" }),
    svg("line", { x1: x(b.median), x2: x(b.median), y1: y - 8, y2: y + 8, stroke: color, "stroke-width": 3 }),
    svg("path", { d: `M${x(b.mean)} ${y - 4}l4 4l-4 4l-4 -4z`, fill: "var(--ink)" })),
  svg("text", { x: width, y: y + 4, class: "end" }, signed(b.median)));
}

// Joint against solo: how often the team is right, by how often it is right without the agent.
const KINDS = [
  ["helped", "the reward is higher with it"],
  ["hurt", "lower with it"],
  ["redundant", "the same, and right"],
  ["hopeless", "the same, and wrong"],
];

function matrix(agent, [...pairs], color) {
  const graded = pairs.pop() > 0; // rewards between 0 and 1 are neither right nor wrong, so the headings would not hold
  const total = pairs.reduce((a, b) => a + b, 0);
  const cell = (kind) => {
    const share = total ? pairs[kind] / total : 0;
    return { node: el("div", { class: `cell k${kind}`, vars: { "--share": share } }, el("strong", null, percent(share)), el("span", null, KINDS[kind][0])), class: "matrix" };
  };
  const table = dataTable(`${agent}: ${plural(total, "pair")} of a rollout and a play without it`,
    graded ? [{ label: "" }, { label: "no difference" }, { label: "a difference" }] : [{ label: "" }, { label: `right without ${agent}` }, { label: `wrong without ${agent}` }],
    graded ? [["right / better", cell(2), cell(0)], ["wrong / worse", cell(3), cell(1)]] : [["team right", cell(2), cell(0)], ["team wrong", cell(1), cell(3)]], { class: "joint" });
  return el("figure", { class: "jointbox", vars: { "--agent": color } }, table);
}
