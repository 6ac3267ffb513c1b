// From the data to the page; theme, navigation, printing, and following a run that goes on.

const SECTIONS = [["overview", "Overview"], ["learning", "Learning"], ["credit", "Credit"], ["team", "Team"], ["rollouts", "Rollouts"], ["compare", "Compare"]];
const root = document.documentElement;
const shared = { document: null, tables: [], browser: null };

function readBlock(id) {
  const block = document.getElementById(id);
  return block ? JSON.parse(block.textContent) : null;
}

function tableOf(i) {
  return new Rollouts(root.dataset.mode === "live" ? shared.tables[i] : readBlock(`rollouts-${i}`));
}

function remembered(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch {
    return null; // a browser that keeps nothing for files
  }
  return value;
}

function setTheme(theme) {
  root.dataset.theme = theme;
  remembered("ccpo-theme", theme);
}

function themeButton() {
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const label = () => (dark() ? "Light" : "Dark");
  const button = el("button", { type: "button", id: "theme", onclick: () => {
    setTheme(dark() ? "light" : "dark");
    button.textContent = label();
  } }, label());
  return button;
}

function heading(run) {
  const { runs, generated } = shared.document;
  const names = runNames(runs);
  document.title = `${names[ui.run]} · ccpo report`;
  const chooser = runs.length > 1 ? select("run", "run", names.map((n, i) => [i, n]), ui.run, (i) => {
    ui.run = +i;
    ui.filters = null;
    ui.chosen = null;
    render();
  }) : null;
  return [el("div", { class: "title" }, el("p", { class: "brand" }, "ccpo report"), el("h1", null, names[ui.run])),
    el("p", { class: "state" }, el("span", { class: `state-dot ${run.progress.failed ? "bad" : run.progress.finished ? "good" : "going"}` }), stateSentence(run), el("span", { class: "quiet", id: "generated" }, ` · page of ${generated}`)),
    el("div", { class: "tools" }, chooser, themeButton())];
}

function navigation() {
  return SECTIONS.map(([id, title]) => el("a", { href: `#${id}` }, title));
}

// What a drawing anew would lose: what is open, where the focus is.
function held() {
  const open = new Map([...document.querySelectorAll("details[id]")].map((d) => [d.id, d.open]));
  const focus = document.activeElement?.id;
  const scroll = [scrollX, scrollY];
  const rows = document.getElementById("rows")?.scrollTop;
  const place = focus && document.activeElement.selectionStart !== undefined && /search|text/.test(document.activeElement.type) ? document.activeElement.selectionStart : null;
  return () => {
    for (const [id, was] of open) {
      const box = document.getElementById(id);
      if (box) box.open = was;
    }
    scrollTo(...scroll);
    const list = document.getElementById("rows");
    if (list && rows) list.scrollTop = rows;
    const again = focus && document.getElementById(focus);
    if (again && again !== document.body) {
      again.focus({ preventScroll: true });
      if (place !== null) again.setSelectionRange(place, place);
    }
  };
}

function render() {
  const restore = held();
  const wasOpen = shared.browser?.isOpen();
  const run = shared.document.runs[ui.run];
  document.getElementById("top").replaceChildren(...heading(run));
  document.getElementById("nav").replaceChildren(...navigation());
  shared.browser = rolloutsSection(run, () => tableOf(ui.run));
  document.getElementById("main").replaceChildren(overview(run), learning(run), credit(run), team(run), shared.browser.node, compare(shared.document.runs));
  document.getElementById("foot").replaceChildren(el("p", { class: "quiet" }, root.dataset.mode === "live" ? "Served by ccpo watch, from this machine alone; texts are the models' own words." : "Written by ccpo report. Everything on this page is in this file; texts are the models' own words."));
  if (wasOpen) shared.browser.open();
  restore();
  follow();
}

// The section in sight is marked in the navigation.
let spy = null;
function follow() {
  spy?.disconnect();
  const seen = new Map();
  spy = new IntersectionObserver((entries) => {
    for (const e of entries) seen.set(e.target.id, e.isIntersecting);
    const current = SECTIONS.map(([id]) => id).find((id) => seen.get(id));
    for (const link of document.querySelectorAll("#nav a")) {
      if (link.getAttribute("href") === `#${current}`) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-80px 0px -55% 0px" });
  for (const [id] of SECTIONS) spy.observe(document.getElementById(id));
}

// #rollouts/STEP/PROBLEM/N leads to a rollout, #SECTION to a section.
function route() {
  if (location.hash === "#compare") shared.browser?.open(); // what lies above it gets its height before it is scrolled to
  const match = /^#rollouts\/(\d+\/\d+\/\d+)$/.exec(location.hash);
  if (match) {
    ui.chosen = match[1];
    shared.browser?.open()?.choose(match[1]);
  }
  document.getElementById(match ? "rollouts" : location.hash.slice(1))?.scrollIntoView();
}

function problem(text) {
  document.getElementById("main").replaceChildren(el("p", { class: "lead", role: "alert" }, text));
}

async function poll(tag) {
  try {
    const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status === 200) {
      const { document: found, tables } = await answer.json();
      tag = answer.headers.get("ETag");
      const first = !shared.document;
      Object.assign(shared, { document: found, tables });
      render();
      if (first) route();
    }
    root.dataset.lost = "no";
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    root.dataset.lost = "yes"; // the server has ended; the page stays as it was
    const note = document.getElementById("generated");
    if (note) note.textContent = " · the server has ended; this is the last that it said";
    else problem("The server does not answer.");
  }
  setTimeout(poll, 2500, tag);
}

function start() {
  const theme = remembered("ccpo-theme");
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  addEventListener("hashchange", route);
  addEventListener("beforeprint", () => shared.browser?.open());
  if (root.dataset.mode === "live") {
    poll(null);
    return;
  }
  shared.document = readBlock("document");
  if (!shared.document) {
    problem("This file holds no data.");
    return;
  }
  render();
  if (location.hash) route();
}

start();
