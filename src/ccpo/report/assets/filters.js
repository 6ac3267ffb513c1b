// Which rollouts are listed.

const NO_FILTER = { query: "", scope: "problem", outcome: "all", agent: "any", effect: "any", from: "", to: "", low: "", high: "", sort: "step" };
const OUTCOMES = [["all", "any"], ["right", "✓ team right"], ["wrong", "✗ team wrong"], ["none", "no answer"], ["cut", "a turn was cut off"]];
const EFFECTS = [["any", "any"], ["helped", "helped"], ["hurt", "hurt"], ["redundant", "redundant"], ["hopeless", "hopeless"]];
const SORTS = [["step", "first steps first"], ["late", "last steps first"], ["rich", "highest credit first"], ["poor", "lowest credit first"]];
const OUTCOME = {
  all: () => true,
  right: isRight,
  wrong: (row) => !isRight(row),
  none: (row) => row.answer === null,
  cut: (row) => row.turns.some((t) => t.cut),
};

function chosenRows(data, f) {
  const heard = search(data, f);
  const agents = f.agent === "any" ? data.agents.map((_, i) => i) : [data.agents.indexOf(f.agent)];
  const bound = (v, otherwise) => (v === "" || Number.isNaN(+v) ? otherwise : +v);
  const [from, to] = [bound(f.from, -Infinity), bound(f.to, Infinity)];
  const [low, high] = [bound(f.low, -Infinity), bound(f.high, Infinity)];
  const ranged = f.low !== "" || f.high !== "";
  const outcome = OUTCOME[f.outcome] || OUTCOME.all;
  const rows = data.rows.filter((row) =>
    row.group.step >= from && row.group.step <= to && outcome(row) && heard(row)
    && (f.effect === "any" || agents.some((a) => a >= 0 && effect(row, a, data.playsWithout(row, a)) === f.effect))
    && (!ranged || agents.some((a) => isNumber(row.credit[a]) && row.credit[a] >= low && row.credit[a] <= high)));
  return sorted(rows, f.sort, agents);
}

function sorted(rows, how, agents) {
  if (how === "late") return rows.reverse();
  if (how !== "rich" && how !== "poor") return rows;
  const pick = how === "rich" ? Math.max : Math.min;
  const missing = how === "rich" ? -Infinity : Infinity;
  const key = new Map(rows.map((row) => [row, pick(...agents.map((a) => row.credit[a] ?? missing), ...(agents.length ? [] : [missing]))]));
  const up = how === "rich" ? -1 : 1;
  return rows.sort((a, b) => (key.get(a) === key.get(b) ? a.index - b.index : up * (key.get(a) - key.get(b))));
}

// A test of rows for the words that are searched: each text is looked at once.
function search(data, f) {
  const query = f.query.trim().toLowerCase();
  if (!query) return () => true;
  const known = new Map();
  const has = (i) => {
    if (i === null || i === undefined) return false;
    if (!known.has(i)) known.set(i, data.lowered(i).includes(query));
    return known.get(i);
  };
  const inProblem = new Map(data.groups.map((g) => [g, has(g.problem) || g.id.toLowerCase().includes(query)]));
  if (f.scope === "problem") return (row) => inProblem.get(row.group);
  const inPlays = new Map(data.groups.map((g) => [g, g.plays.some((p) => has(p.answer) || p.turns.some((t) => has(t.text)))]));
  return (row) => inProblem.get(row.group) || inPlays.get(row.group) || has(row.answer) || row.turns.some((t) => has(t.text));
}

function filterForm(data, change) {
  const f = ui.filters;
  const set = (key) => (value) => {
    f[key] = value;
    change();
  };
  const agents = [["any", "any agent"], ...data.agents.map((a) => [a, oneLine(a, 40)])];
  const box = el("form", { class: "controls filters", role: "search", "aria-label": "Filter rollouts", onsubmit: (e) => e.preventDefault() },
    field("f-query", "search", { type: "search", value: f.query, placeholder: "words in the problem", autocomplete: "off", spellcheck: "false" }, set("query")),
    select("f-scope", "in", [["problem", "the problem"], ["all", "all texts"]], f.scope, set("scope")),
    select("f-outcome", "outcome", OUTCOMES, f.outcome, set("outcome")),
    select("f-agent", "agent", agents, f.agent, set("agent")),
    select("f-effect", "its effect", EFFECTS, f.effect, set("effect")),
    field("f-from", "from step", { type: "number", value: f.from, min: 0, placeholder: String(data.steps[0]) }, set("from")),
    field("f-to", "to step", { type: "number", value: f.to, min: 0, placeholder: String(data.steps[1]) }, set("to")),
    field("f-low", "credit from", { type: "number", step: "any", value: f.low }, set("low")),
    field("f-high", "credit to", { type: "number", step: "any", value: f.high }, set("high")),
    select("f-sort", "order", SORTS, f.sort, set("sort")),
    el("button", { type: "reset", id: "f-reset", onclick: (event) => {
      event.preventDefault();
      ui.filters = { ...NO_FILTER };
      box.replaceWith(filterForm(data, change));
      change();
      document.getElementById("f-reset").focus();
    } }, "Reset"));
  return box;
}
