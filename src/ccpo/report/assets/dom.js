// Elements are made here and nowhere else: text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "text") node.textContent = value;
    else if (key === "vars") for (const [name, v] of Object.entries(value)) node.style.setProperty(name, v);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child);
  }
  return node;
}

const el = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const svg = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

// A table: columns are {label, num}; a cell is text or a node, or {node, class}; the first cell of a row is its header.
function dataTable(caption, columns, rows, props) {
  const head = el("tr", null, columns.map((c) => el("th", { scope: "col", class: c.num ? "num" : null }, c.label)));
  const body = rows.map((cells) => el("tr", null, cells.map((cell, i) => {
    const spec = cell !== null && typeof cell === "object" && "node" in cell ? cell : { node: cell };
    const names = [columns[i].num ? "num" : "", spec.class || ""].join(" ").trim() || null;
    return el(i ? "td" : "th", { class: names, scope: i ? null : "row" }, spec.node);
  })));
  const table = el("table", props, el("caption", { class: "quiet" }, caption), el("thead", null, head), el("tbody", null, body));
  return el("div", { class: "tablebox", tabindex: "0", role: "region", "aria-label": caption }, table);
}

const options = (pairs, chosen) =>
  pairs.map(([value, label]) => el("option", { value, selected: String(value) === String(chosen) }, label));

function select(id, label, pairs, chosen, change) {
  const box = el("select", { id, onchange: (event) => change(event.target.value) }, options(pairs, chosen));
  return el("label", { class: "field", for: id }, el("span", null, label), box);
}

function field(id, label, props, change) {
  return el("label", { class: "field", for: id }, el("span", null, label), el("input", { id, ...props, oninput: (event) => change(event.target.value) }));
}

// Buttons of which one is pressed.
function segmented(label, pairs, chosen, change) {
  const group = el("div", { class: "segmented", role: "group", "aria-label": label });
  for (const [value, text] of pairs) {
    group.append(el("button", {
      type: "button", "aria-pressed": String(value === chosen), onclick: (event) => {
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === event.currentTarget));
        change(value);
      },
    }, text));
  }
  return group;
}

let serial = 0;
const freshId = (stem) => `${stem}-${(serial += 1)}`;

function section(id, title, lead, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title), lead ? el("p", { class: "lead" }, lead) : null, ...children);
}

// Shared by every part: which run is shown, and how the curves are looked at.
const ui = {
  run: 0,
  window: 0,
  teamWindow: 0,
  view: { x0: null, x1: null, smooth: 0, listeners: new Set() },
  hidden: new Set(),
  filters: null,
  chosen: null,
};

function changeView(change) {
  Object.assign(ui.view, change);
  for (const listener of ui.view.listeners) listener();
}

const agentColor = (i) => (i < 0 ? "var(--muted)" : `var(--a${i % 7})`);
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4"];
