// Curves over steps: zoom by dragging, series on and off in the legend, smoothing, values under the pointer or the arrow keys.
// A series is {name, label, color, dash, x, y, points, low, high}; points: marks with intervals in place of a line.

const H = 210;
const PAD = { top: 10, bottom: 26, left: 46 };

class LineChart {
  constructor(spec) {
    this.spec = spec;
    this.series = spec.series.filter((s) => s.y.some(isNumber));
    this.cursor = null;
    this.plot = el("div", { class: "plot", tabindex: "0", role: "img", "aria-roledescription": "chart", "aria-label": this.summary(), onkeydown: (e) => this.key(e), onblur: () => this.point(null) });
    this.tip = el("div", { class: "tip", hidden: true });
    this.live = el("p", { class: "sr", role: "status" });
    this.legend = el("div", { class: "legend", role: "group", "aria-label": `Curves of ${spec.title}` }, this.series.map((s) => this.key_of(s)));
    this.numbers = el("details", { class: "numbers", id: `numbers-${spec.id}`, ontoggle: () => this.table() }, el("summary", null, "numbers"));
    this.node = el("figure", { class: "chart", id: `chart-${spec.id}` },
      el("figcaption", null, el("strong", null, spec.title), spec.note ? el("span", { class: "quiet" }, ` ${spec.note}`) : null),
      el("div", { class: "frame" }, this.plot, this.tip), this.legend, this.numbers, this.live);
    this.listener = () => this.draw();
    ui.view.listeners.add(this.listener);
    new ResizeObserver(() => this.resized()).observe(this.plot);
  }

  key_of(s) {
    const swatch = svg("svg", { width: 22, height: 10, "aria-hidden": "true" }, s.points
      ? svg("circle", { cx: 11, cy: 5, r: 4, fill: s.color })
      : svg("line", { x1: 1, x2: 21, y1: 5, y2: 5, stroke: s.color, "stroke-width": 2.5, "stroke-dasharray": s.dash }));
    return el("button", {
      type: "button", "aria-pressed": String(!this.off(s)), title: "show or hide", onclick: (event) => {
        const key = this.id(s);
        if (!ui.hidden.delete(key)) ui.hidden.add(key);
        event.currentTarget.setAttribute("aria-pressed", String(!this.off(s)));
        this.draw();
      },
    }, swatch, el("span", null, s.label));
  }

  id(s) {
    return `${this.spec.id}/${s.name}`;
  }

  off(s) {
    return ui.hidden.has(this.id(s));
  }

  summary() {
    const said = this.series.map((s) => {
      const first = s.y.findIndex(isNumber);
      const last = s.y.findLastIndex(isNumber);
      return first === last ? `${s.label}: ${brief(s.y[first])}` : `${s.label}: from ${brief(s.y[first])} to ${brief(s.y[last])}`;
    });
    return `${this.spec.title}. ${said.slice(0, 12).join("; ")}. Arrow keys read the values.`;
  }

  resized() {
    const width = this.plot.clientWidth;
    if (width && width !== this.width) {
      this.width = width;
      this.draw();
    }
  }

  domain() {
    const [low, high] = extentOf(this.series.flatMap((s) => [s.x[0], s.x[s.x.length - 1]]));
    const free = this.spec.free; // an axis of its own, which the zoom over steps does not move
    const from = free || ui.view.x0 === null ? low : Math.max(low, ui.view.x0);
    const to = free || ui.view.x1 === null ? high : Math.min(high, ui.view.x1);
    return from < to ? [from, to] : [low, high > low ? high : low + 1];
  }

  draw() {
    const width = this.width;
    if (!width || !this.node.isConnected) {
      if (this.drawn && !this.node.isConnected) ui.view.listeners.delete(this.listener);
      return;
    }
    this.drawn = true;
    const shown = this.series.filter((s) => !this.off(s));
    const [x0, x1] = this.domain();
    const labelled = width >= 430 && shown.length <= 9;
    const right = labelled ? Math.min(width / 3, 14 + Math.max(0, ...shown.map((s) => textWidth(this.endLabel(s, smoothed(s.y, s.points ? 0 : ui.view.smooth)))))) : 10;
    this.x = linear([x0, x1], [PAD.left, width - right]);
    this.lines = shown.map((s) => ({ s, y: s.points ? s.y : smoothed(s.y, ui.view.smooth) }));
    const inside = [];
    for (const { s, y } of this.lines) {
      for (let i = 0; i < s.x.length; i += 1) if (s.x[i] >= x0 && s.x[i] <= x1) inside.push(y[i], s.y[i], s.low?.[i], s.high?.[i]);
    }
    const [y0, y1] = this.spec.range || extent(inside, this.spec.zero);
    this.y = linear([y0, y1], [H - PAD.bottom, PAD.top]);
    const clip = freshId("clip");
    const root = svg("svg", { width, height: H, viewBox: `0 0 ${width} ${H}`, "aria-hidden": "true" },
      svg("defs", null, svg("clipPath", { id: clip }, svg("rect", { x: PAD.left, y: 0, width: Math.max(0, width - right - PAD.left + 5), height: H }))),
      this.axes([x0, x1], [y0, y1], width - right), svg("g", { "clip-path": `url(#${clip})` }, this.lines.map((line) => this.trace(line))));
    if (labelled) root.append(this.ends([x0, x1], width - right + 7));
    this.mark = svg("g");
    root.append(this.mark, this.catcher(width - right));
    this.plot.replaceChildren(root);
    this.point(this.cursor);
  }

  axes([x0, x1], [y0, y1], right) {
    const g = svg("g", { class: "axes" });
    const format = this.spec.format || brief;
    for (const v of ticks(y0, y1, 4)) {
      const y = this.y(v);
      g.append(svg("line", { x1: PAD.left, x2: right, y1: y, y2: y, class: v === 0 ? "zero" : "grid" }), svg("text", { x: PAD.left - 7, y: y + 4, class: "y" }, format(v)));
    }
    for (const v of ticks(x0, x1, Math.max(2, Math.floor((right - PAD.left) / 80)))) {
      g.append(svg("text", { x: this.x(v), y: H - 8, class: "x" }, brief(v)));
    }
    g.append(svg("line", { x1: PAD.left, x2: right, y1: H - PAD.bottom, y2: H - PAD.bottom, class: "base" }));
    return g;
  }

  trace({ s, y }) {
    const g = svg("g");
    if (s.points) {
      for (let i = 0; i < s.x.length; i += 1) {
        if (!isNumber(y[i])) continue;
        const cx = this.x(s.x[i]);
        if (isNumber(s.low?.[i])) g.append(svg("line", { x1: cx, x2: cx, y1: this.y(s.low[i]), y2: this.y(s.high[i]), stroke: s.color, "stroke-width": 1.5 }));
        g.append(svg("circle", { cx, cy: this.y(y[i]), r: 3.5, fill: s.color }));
      }
    }
    if (s.points !== true) {
      const props = { fill: "none", stroke: s.color, "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": s.dash };
      if (ui.view.smooth && !s.points) g.append(svg("path", { ...props, d: this.path(s.x, s.y), "stroke-width": 1, opacity: 0.28, "stroke-dasharray": null }));
      g.append(svg("path", { ...props, d: this.path(s.x, y) }));
      if (s.x.length === 1 && !s.points) g.append(svg("circle", { cx: this.x(s.x[0]), cy: this.y(y[0]), r: 3, fill: s.color }));
    }
    return g;
  }

  path(xs, ys) {
    let d = "";
    let pen = "M";
    for (let i = 0; i < xs.length; i += 1) {
      if (!isNumber(ys[i])) {
        if (!this.spec.bridge) pen = "M";
        continue;
      }
      d += `${pen}${this.x(xs[i]).toFixed(1)} ${this.y(ys[i]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  ends([x0, x1], at) {
    const labels = [];
    for (const { s, y } of this.lines) {
      for (let i = s.x.length - 1; i >= 0; i -= 1) {
        if (isNumber(y[i]) && s.x[i] >= x0 && s.x[i] <= x1) {
          labels.push({ y: this.y(y[i]), text: this.endLabel(s, [y[i]]), color: s.color });
          break;
        }
      }
    }
    return svg("g", { class: "ends" }, spread(labels, 14, PAD.top + 4, H - PAD.bottom).map((l) => svg("text", { x: at, y: l.y + 4, fill: l.color }, l.text)));
  }

  endLabel(s, y) {
    return `${oneLine(s.label, 26)} ${(this.spec.format || brief)(lastOf(y))}`;
  }

  catcher(right) {
    let from = null;
    const band = svg("rect", { y: PAD.top, height: H - PAD.bottom - PAD.top, width: 0, class: "band" });
    const inside = (event) => Math.max(PAD.left, Math.min(right, event.clientX - this.plot.getBoundingClientRect().left));
    const area = svg("rect", {
      x: PAD.left, y: 0, width: Math.max(0, right - PAD.left), height: H, class: "catcher",
      onpointerdown: (e) => { if (!this.spec.free && e.button === 0) { from = inside(e); area.setPointerCapture(e.pointerId); } },
      onpointermove: (e) => {
        const x = inside(e);
        if (from !== null) fill(band, { x: Math.min(from, x), width: Math.abs(x - from) }, []);
        this.point(this.nearest(x));
      },
      onpointerup: (e) => {
        const to = inside(e);
        if (from !== null && Math.abs(to - from) > 6) {
          const [a, b] = [from, to].sort((p, q) => p - q).map((x) => this.at(x, right));
          changeView({ x0: Math.floor(a), x1: Math.ceil(b) });
        }
        from = null;
        band.setAttribute("width", 0);
      },
      onpointerleave: () => this.point(null),
      ondblclick: () => changeView({ x0: null, x1: null }),
    });
    return svg("g", null, band, area);
  }

  at(x, right) {
    const [x0, x1] = this.domain();
    return x0 + ((x - PAD.left) / (right - PAD.left)) * (x1 - x0);
  }

  places() {
    const [x0, x1] = this.domain();
    return [...new Set(this.lines.flatMap(({ s }) => s.x))].filter((x) => x >= x0 && x <= x1).sort((a, b) => a - b);
  }

  nearest(px) {
    let best = null;
    for (const x of this.places()) if (best === null || Math.abs(this.x(x) - px) < Math.abs(this.x(best) - px)) best = x;
    return best;
  }

  point(x) {
    this.cursor = x;
    if (!this.mark) return;
    this.mark.replaceChildren();
    const rows = x === null ? [] : this.values(x);
    this.tip.hidden = !rows.length;
    if (!rows.length) return;
    const px = this.x(x);
    this.mark.append(svg("line", { x1: px, x2: px, y1: PAD.top, y2: H - PAD.bottom, class: "cursor" }),
      ...rows.map((r) => svg("circle", { cx: px, cy: this.y(r.value), r: 3.5, fill: r.color, class: "dot" })));
    this.tip.replaceChildren(el("strong", null, `${this.spec.xName || "step"} ${brief(x)}`),
      ...rows.map((r) => el("div", null, el("i", { vars: { background: r.color } }), `${r.label} `, el("b", null, r.text))));
    const left = px > this.width / 2;
    this.tip.style.left = left ? "" : `${px + 12}px`;
    this.tip.style.right = left ? `${this.width - px + 12}px` : "";
  }

  values(x) {
    const found = [];
    for (const { s, y } of this.lines) {
      const i = s.x.indexOf(x);
      if (i < 0 || !isNumber(y[i])) continue;
      const format = this.spec.format || brief;
      const range = isNumber(s.low?.[i]) ? ` [${format(s.low[i])}, ${format(s.high[i])}]` : "";
      found.push({ label: s.label, color: s.color, value: y[i], text: format(y[i]) + range });
    }
    return found;
  }

  key(event) {
    const places = this.lines ? this.places() : [];
    const i = places.indexOf(this.cursor);
    const moves = { ArrowRight: i < 0 ? 0 : Math.min(i + 1, places.length - 1), ArrowLeft: i < 0 ? places.length - 1 : Math.max(i - 1, 0), Home: 0, End: places.length - 1 };
    if (!(event.key in moves) || !places.length) {
      if (event.key === "Escape") this.point(null);
      return;
    }
    event.preventDefault();
    this.point(places[moves[event.key]]);
    this.live.textContent = this.tip.innerText.replace(/\n/g, ", ");
  }

  table() {
    if (!this.numbers.open || this.numbers.childElementCount > 1) return;
    const xs = [...new Set(this.series.flatMap((s) => s.x))].sort((a, b) => a - b);
    const every = Math.ceil(xs.length / 200);
    const rows = xs.filter((_, i) => i % every === 0 || i === xs.length - 1).map((x) => [whole(x), ...this.series.map((s) => {
      const i = s.x.indexOf(x);
      return i < 0 ? "" : brief(s.y[i]);
    })]);
    const columns = [{ label: this.spec.xName || "step", num: true }, ...this.series.map((s) => ({ label: s.label, num: true }))];
    this.numbers.append(dataTable(every > 1 ? `${this.spec.title}: every ${every}th step` : this.spec.title, columns, rows));
  }
}

const pen = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  pen.font = `560 12px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

function extentOf(values) {
  const there = values.filter(isNumber);
  return there.length ? [Math.min(...there), Math.max(...there)] : [0, 1];
}

const lineChart = (spec) => {
  const chart = new LineChart(spec);
  return chart.series.length ? chart.node : null;
};
