// The rollouts of a run, decoded from its table once they are needed.

class Rollouts {
  constructor(raw) {
    this.raw = raw;
    this.agents = raw.agents;
    this.texts = raw.texts;
    this.lower = new Array(raw.texts.length);
    this.groups = raw.groups.map(([step, place, id, problem, answer, plays], index) => ({ index, step, place, id: this.text(id), problem, answer, plays: plays.map(play), rows: [] }));
    this.rows = raw.rows.map(([g, n, reward, answer, turns, credit, advantage], index) => ({ index, group: this.groups[g], n, reward, answer, turns: turns.map(spoken), credit, advantage, delta: null }));
    for (const row of this.rows) row.group.rows.push(row);
    for (const row of this.rows) row.delta = this.agents.map((_, a) => meanOf(this.playsWithout(row, a).map((p) => row.reward - p.reward)));
    this.steps = extentOf([this.groups[0], this.groups[this.groups.length - 1]].map((g) => g?.step));
    this.byProblem = Map.groupBy ? Map.groupBy(this.groups, (g) => this.problemKey(g)) : grouped(this.groups, (g) => this.problemKey(g));
  }

  text(i) {
    return i === null || i === undefined ? null : this.texts[i];
  }

  string(i) {
    const text = this.text(i);
    return Array.isArray(text) ? `${text[0]} … ${text[2]}` : text ?? "";
  }

  lowered(i) {
    if (i === null || i === undefined) return "";
    return (this.lower[i] ??= this.string(i).toLowerCase());
  }

  problemKey(group) {
    return group.id ? `id ${group.id}` : `text ${group.problem}`;
  }

  // Plays without one agent that answer to a rollout.
  playsWithout(row, agent) {
    return row.group.plays.filter((p) => p.removed.length === 1 && p.removed[0] === agent && (p.rollout === null || p.rollout === row.n));
  }

  // All plays that answer to a rollout, by who was removed.
  coalitions(row) {
    return grouped(row.group.plays.filter((p) => p.rollout === null || p.rollout === row.n), (p) => p.removed.join(","));
  }

  turn(i) {
    const [name, agent] = this.raw.turns[i] || ["?", "?"];
    return { name, agent, place: this.agents.indexOf(agent) };
  }

  find(step, place, n) {
    return this.rows.find((r) => r.group.step === step && r.group.place === place && r.n === n);
  }
}

const play = ([removed, rollout, draw, reward, answer, cached, turns]) => ({ removed, rollout, draw, reward, answer, cached, turns: turns.map(spoken) });
const spoken = ([turn, text, tokens, cut, score]) => ({ turn, text, tokens, cut, score: score ?? null });
const isRight = (row) => row.reward >= 0.999;

function grouped(items, key) {
  const map = new Map();
  for (const item of items) {
    const k = key(item);
    if (map.has(k)) map.get(k).push(item);
    else map.set(k, [item]);
  }
  return map;
}

// What the removal of an agent does to a rollout, in a word.
function effect(row, agent, plays) {
  const delta = row.delta[agent];
  if (delta === null) return null;
  if (delta > 0) return "helped";
  if (delta < 0) return "hurt";
  return isRight(row) && plays.every((p) => p.reward >= 0.999) ? "redundant" : "hopeless";
}
