// A list of any length, of which only the rows in sight are in the document.

const ROW = 56;

class RowList {
  constructor(data, choose) {
    this.data = data;
    this.choose = choose;
    this.rows = [];
    this.active = -1;
    this.space = el("div", { class: "space", role: "presentation" });
    this.box = el("div", { class: "rows", id: "rows", tabindex: "0", role: "listbox", "aria-label": "Rollouts", onscroll: () => this.draw(), onkeydown: (e) => this.key(e), onclick: (e) => this.click(e) }, this.space);
    this.empty = el("p", { class: "quiet none", hidden: true }, "No rollout fits these filters.");
    this.count = el("p", { class: "count", role: "status" });
    this.node = el("div", { class: "listing" }, this.count, this.box, this.empty);
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  // Show other rows, from the first on; at the start from the chosen one.
  show(rows, all) {
    const started = this.rows.length > 0;
    this.rows = rows;
    this.count.textContent = rows.length === all ? plural(all, "rollout") : `${whole(rows.length)} of ${plural(all, "rollout")}`;
    this.box.hidden = !rows.length;
    this.empty.hidden = rows.length > 0;
    this.space.style.height = `${rows.length * ROW}px`;
    this.active = rows.findIndex((row) => keyOf(row) === ui.chosen);
    if (started || this.active < 0) this.box.scrollTop = 0;
    else this.reveal();
    this.draw();
  }

  draw() {
    const top = this.box.scrollTop;
    const first = Math.max(0, Math.floor(top / ROW) - 6);
    const last = Math.min(this.rows.length, Math.ceil((top + (this.box.clientHeight || 560)) / ROW) + 6);
    const made = [];
    for (let i = first; i < last; i += 1) made.push(this.row(i));
    this.space.replaceChildren(...made);
    if (this.active >= first && this.active < last) this.box.setAttribute("aria-activedescendant", `row-${this.active}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(i) {
    const row = this.rows[i];
    const answer = row.answer === null ? "no answer" : `→ ${oneLine(this.data.string(row.answer), 40)}`;
    const node = el("div", { id: `row-${i}`, role: "option", class: `row ${isRight(row) ? "right" : "wrong"}`, "aria-selected": String(i === this.active), "aria-setsize": this.rows.length, "aria-posinset": i + 1, "data-i": i },
      el("div", { class: "first" }, el("span", { class: "outcome" }, isRight(row) ? "✓" : "✗", el("span", { class: "sr" }, isRight(row) ? "team right" : "team wrong")), el("bdi", null, oneLine(this.data.string(row.group.problem)) || "(no text)")),
      el("div", { class: "second" }, el("span", null, `step ${row.group.step}`), el("bdi", { class: "answer" }, answer), this.chips(row)));
    node.style.transform = `translateY(${i * ROW}px)`;
    return node;
  }

  // The credit of at most three agents, first of the one that is filtered by.
  chips(row) {
    const paid = this.data.agents.map((agent, a) => [agent, a]).filter(([, a]) => isNumber(row.credit[a]));
    paid.sort(([x], [y]) => (y === ui.filters.agent) - (x === ui.filters.agent));
    return [...paid.slice(0, 3).map(([agent, a]) => this.chip(row, agent, a)), paid.length > 3 ? el("span", null, `+${paid.length - 3}`) : null];
  }

  chip(row, agent, a) {
    return el("span", { class: "chip", vars: { "--agent": agentColor(a) } }, oneLine(agent, 12), " ", el("b", null, signed(row.credit[a])));
  }

  click(event) {
    const node = event.target.closest("[data-i]");
    if (node) this.go(+node.dataset.i);
  }

  go(i) {
    this.active = i;
    this.reveal();
    this.draw();
    this.choose(this.rows[i]);
  }

  reveal() {
    const top = this.active * ROW;
    const height = this.box.clientHeight || 560;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW > this.box.scrollTop + height) this.box.scrollTop = top + ROW - height;
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key === "Enter") document.getElementById("detail").focus();
    if (!(event.key in moves) || !this.rows.length) return;
    event.preventDefault();
    const from = this.active < 0 ? (moves[event.key] > 0 ? -1 : 0) : this.active;
    this.go(Math.max(0, Math.min(this.rows.length - 1, from + moves[event.key])));
  }
}

const keyOf = (row) => `${row.group.step}/${row.group.place}/${row.n}`;

// The section: filters, list and detail. The table is decoded when the section comes near the screen.
function rolloutsSection(run, load) {
  const lead = run.rollouts.shown < run.rollouts.seen
    ? `A sample: ${whole(run.rollouts.shown)} of ${whole(run.rollouts.seen)} rollouts, all those of some problems.`
    : run.rollouts.seen ? null : "No episodes are there, so there are no rollouts to show.";
  const place = el("div", { id: "browser" });
  const node = section("rollouts", "Rollouts", lead, place);
  if (!run.rollouts.shown) return { node, open: () => null, isOpen: () => false };
  let opened = null;
  const open = () => (opened ??= browse(place, load()));
  place.append(el("p", { class: "quiet pending" }, "The rollouts are read when this part comes into sight."));
  const watcher = new IntersectionObserver((seen) => {
    if (seen.some((s) => s.isIntersecting)) {
      watcher.disconnect();
      open();
    }
  }, { rootMargin: "600px" });
  watcher.observe(place);
  return { node, open, isOpen: () => opened !== null };
}

function browse(place, data) {
  ui.filters ||= { ...NO_FILTER };
  const detail = el("article", { id: "detail", tabindex: "-1", "aria-label": "The chosen rollout" });
  const choose = (row, quiet) => {
    ui.chosen = keyOf(row);
    detail.replaceChildren(...rolloutDetail(data, row, go));
    detail.scrollTop = 0;
    if (!quiet) history.replaceState(null, "", `#rollouts/${ui.chosen}`);
  };
  const list = new RowList(data, choose);
  const refresh = () => list.show(chosenRows(data, ui.filters), data.rows.length);
  const go = (row) => {
    choose(row);
    list.active = list.rows.indexOf(row);
    if (list.active >= 0) list.reveal();
    list.draw();
    detail.focus({ preventScroll: true });
  };
  place.replaceChildren(filterForm(data, refresh), el("div", { class: "split" }, list.node, detail));
  const chosen = ui.chosen && data.find(...ui.chosen.split("/").map(Number));
  if (chosen) choose(chosen, true);
  else if (data.rows.length) choose(data.rows[0], true);
  refresh();
  return { choose: (key) => { const row = data.find(...key.split("/").map(Number)); if (row) go(row); return row; } };
}
