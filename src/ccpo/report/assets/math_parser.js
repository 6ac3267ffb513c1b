// A safe subset of LaTeX to MathML. What it cannot read raises MathError, and the source is shown as it stands.

class MathError extends Error {}

const MATHML = "http://www.w3.org/1998/Math/MathML";
const MAX_DEPTH = 40;
const MAX_TOKENS = 2500;
const mml = (tag, props, ...children) => fill(document.createElementNS(MATHML, tag), props, children);

function tokens(source) {
  const found = [];
  const pattern = /\\([a-zA-Z]+\*?|[\s\S])|(\d+(?:[.,]\d+)*)|(\s+)|([\s\S])/gu;
  for (const match of source.matchAll(pattern)) {
    if (match[1] !== undefined) found.push({ kind: "command", value: match[1] });
    else if (match[2] !== undefined) found.push({ kind: "number", value: match[2] });
    else if (match[3] !== undefined) found.push({ kind: "space", value: match[3] });
    else if (match[4] !== undefined) found.push({ kind: "character", value: match[4] });
    if (found.length > MAX_TOKENS) throw new MathError("too long");
  }
  return found;
}

function toMathML(source, display) {
  const parser = new MathParser(tokens(source));
  const row = parser.row(() => false);
  if (parser.more()) throw new MathError(`unexpected ${parser.peek().value}`);
  if (!row.childNodes.length) throw new MathError("nothing to show");
  return mml("math", { display: display ? "block" : "inline", "aria-label": source.replace(HIDDEN, "\ufffd").slice(0, 500) }, row);
}

class MathParser {
  constructor(list) {
    this.list = list;
    this.at = 0;
    this.depth = 0;
    this.variant = null;
  }

  more() {
    return this.at < this.list.length;
  }

  peek() {
    return this.list[this.at] || { kind: "end", value: "the end" };
  }

  is(kind, value) {
    const token = this.peek();
    return token.kind === kind && token.value === value;
  }

  next() {
    const token = this.peek();
    this.at += 1;
    return token;
  }

  spaces() {
    while (this.peek().kind === "space") this.at += 1;
  }

  expect(value) {
    this.spaces();
    if (!this.is("character", value)) throw new MathError(`${value} expected, found ${this.peek().value}`);
    this.at += 1;
  }

  row(stop) {
    const row = mml("mrow");
    for (this.spaces(); this.more() && !stop(this.peek()); this.spaces()) {
      if (this.is("character", "}")) break;
      const node = this.scripted();
      if (node) row.append(node);
    }
    return row;
  }

  group() {
    this.expect("{");
    const row = this.row(() => false);
    this.expect("}");
    return row;
  }

  argument() {
    this.spaces();
    if (this.is("character", "{")) return this.group();
    if (this.peek().kind === "number" && this.peek().value.length > 1) {
      const token = this.peek(); // \frac12 is one half
      const first = token.value[0];
      this.list[this.at] = { kind: "number", value: token.value.slice(1) };
      return mml("mn", null, first);
    }
    if (!this.more()) throw new MathError("an argument is missing");
    const node = this.atom();
    if (!node) throw new MathError("an argument is missing");
    return node;
  }

  raw() {
    this.expect("{");
    let text = "";
    for (let depth = 1; ; ) {
      const token = this.next();
      if (token.kind === "end") throw new MathError("} expected");
      if (token.kind === "character" && token.value === "{") depth += 1;
      if (token.kind === "character" && token.value === "}" && (depth -= 1) === 0) return text;
      if (token.kind === "command") text += SPACES.has(token.value) || token.value === " " ? " " : OPERATORS.get(token.value) ?? `\\${token.value}`;
      else if (!(token.kind === "character" && (token.value === "$" || token.value === "{" || token.value === "}"))) text += token.value;
    }
  }

  optional() {
    this.spaces();
    if (!this.is("character", "[")) return null;
    this.at += 1;
    const row = this.row((token) => token.kind === "character" && token.value === "]");
    this.expect("]");
    return row;
  }

  scripted() {
    const base = this.atom();
    let low = null;
    let high = null;
    for (this.spaces(); ; this.spaces()) {
      if (this.is("command", "limits") || this.is("command", "nolimits")) this.at += 1;
      else if (this.is("character", "_") && !low) (this.at += 1), (low = this.argument());
      else if (this.is("character", "^") && !high) (this.at += 1), (high = this.argument());
      else if (this.is("character", "'")) {
        let primes = "";
        while (this.is("character", "'")) (primes += "′"), (this.at += 1);
        high = high ? mml("mrow", null, high, mml("mo", null, primes)) : mml("mo", null, primes);
      } else break;
    }
    if (!low && !high) return base;
    const under = base && base.dataset && base.dataset.limits;
    const names = under ? ["munder", "mover", "munderover"] : ["msub", "msup", "msubsup"];
    const start = base || mml("mrow");
    if (low && high) return mml(names[2], null, start, low, high);
    return low ? mml(names[0], null, start, low) : mml(names[1], null, start, high);
  }

  atom() {
    if ((this.depth += 1) > MAX_DEPTH) throw new MathError("nested too deeply");
    const node = this.single();
    this.depth -= 1;
    return node;
  }

  single() {
    const token = this.next();
    if (token.kind === "number") return mml("mn", null, [...token.value].map((c) => styled(c, this.variant)).join(""));
    if (token.kind === "command") return this.command(token.value);
    if (token.kind === "end") throw new MathError("unexpected end");
    const c = token.value;
    if (c === "{") {
      this.at -= 1;
      return this.group();
    }
    if (c === "^" || c === "_") {
      this.at -= 1;
      return null; // a script without a base
    }
    if (c === "&" || c === "#" || c === "$" || c === "}") throw new MathError(`unexpected ${c}`);
    if (c === "~") return mml("mspace", { width: "0.33em" });
    HIDDEN.lastIndex = 0;
    if (HIDDEN.test(c)) throw new MathError("a hidden character");
    if (/\p{L}/u.test(c)) return this.letter(c);
    return mml("mo", /[|/]/.test(c) ? { stretchy: "false" } : null, c === "-" ? "−" : c === "*" ? "∗" : c);
  }

  letter(c) {
    const upright = this.variant === "normal" ? { mathvariant: "normal" } : null;
    return mml("mi", upright, styled(c, this.variant));
  }

  command(name) {
    if (IDENTIFIERS.has(name)) return mml("mi", null, IDENTIFIERS.get(name));
    if (OPERATORS.has(name)) return mml("mo", null, OPERATORS.get(name));
    if (BIG.has(name)) return mml("mo", { "data-limits": BIG.get(name) < "∫" || BIG.get(name) > "∮" ? "1" : null }, BIG.get(name));
    if (FUNCTIONS.has(name)) return mml("mi", { "data-limits": UNDER.has(name) ? "1" : null }, name);
    if (SPACES.has(name) || name === " " || name === "\n") return mml("mspace", { width: `${SPACES.get(name) ?? 0.33}em` });
    if (STYLES.has(name)) return null;
    if (TEXTS.has(name)) return mml("mtext", null, this.raw().replace(HIDDEN, "\ufffd"));
    if (VARIANTS.has(name)) return this.inVariant(VARIANTS.get(name));
    if (ACCENTS.has(name)) return mml("mover", { accent: "true" }, this.argument(), mml("mo", { stretchy: String(/over|wide/.test(name)) }, ACCENTS.get(name)));
    if (UNDERS.has(name)) return mml("munder", null, this.argument(), mml("mo", { stretchy: "true" }, UNDERS.get(name)));
    const known = MATH_COMMANDS.get(name.replace(/\*$/, ""));
    if (!known) throw new MathError(`\\${name} is not known`);
    return known(this);
  }

  inVariant(variant) {
    const before = this.variant;
    this.variant = variant;
    const node = this.argument();
    this.variant = before;
    return node;
  }

  delimiter() {
    this.spaces();
    const token = this.next();
    if (token.kind === "character" && "()[]|/.<>".includes(token.value)) return { ".": "", "<": "⟨", ">": "⟩" }[token.value] ?? token.value;
    if (token.kind === "command" && OPERATORS.has(token.value)) return OPERATORS.get(token.value);
    throw new MathError(`${token.value} is no delimiter`);
  }

  environment() {
    const name = this.raw().replace(/\*$/, "");
    const pair = FENCED.get(name);
    if (!pair) throw new MathError(`environment ${name} is not known`);
    if (name === "array" || name === "alignat") this.raw();
    const rows = [[]];
    const stop = (token) => (token.kind === "character" && token.value === "&") || (token.kind === "command" && (token.value === "\\" || token.value === "end"));
    for (;;) {
      rows[rows.length - 1].push(this.row(stop));
      const token = this.next();
      if (token.kind === "character" && token.value === "&") continue;
      if (token.kind === "command" && token.value === "\\") {
        this.optional();
        rows.push([]);
      } else if (token.kind === "command" && token.value === "end") break;
      else throw new MathError(`\\end expected, found ${token.value}`);
    }
    if (this.raw().replace(/\*$/, "") !== name) throw new MathError(`\\end{${name}} expected`);
    const filled = rows.filter((cells) => cells.length > 1 || cells[0].childNodes.length);
    const table = mml("mtable", { class: /align|split|eqnarray/.test(name) ? "aligned" : null }, filled.map((cells) => mml("mtr", null, cells.map((cell) => mml("mtd", null, cell)))));
    return pair === "." ? table : fenced(pair[0], table, pair[1]);
  }
}

const fence = (c) => (c && c !== "." ? mml("mo", { fence: "true", stretchy: "true" }, c) : null);
const fenced = (open, inside, close) => mml("mrow", null, fence(open), inside, fence(close));
const fraction = (parser, props) => mml("mfrac", props, parser.argument(), parser.argument());

const MATH_COMMANDS = new Map([
  ["frac", (p) => fraction(p)],
  ["dfrac", (p) => mml("mstyle", { displaystyle: "true" }, fraction(p))],
  ["tfrac", (p) => fraction(p)],
  ["cfrac", (p) => fraction(p)],
  ["binom", (p) => fenced("(", fraction(p, { linethickness: "0" }), ")")],
  ["dbinom", (p) => fenced("(", fraction(p, { linethickness: "0" }), ")")],
  ["sqrt", (p) => {
    const index = p.optional();
    return index ? mml("mroot", null, p.argument(), index) : mml("msqrt", null, p.argument());
  }],
  ["boxed", (p) => mml("mrow", { class: "boxed" }, p.argument())],
  ["fbox", (p) => mml("mrow", { class: "boxed" }, p.argument())],
  ["pmod", (p) => mml("mrow", null, mml("mspace", { width: "0.6em" }), mml("mo", null, "("), mml("mi", null, "mod"), mml("mspace", { width: "0.3em" }), p.argument(), mml("mo", null, ")"))],
  ["bmod", () => mml("mo", null, "mod")],
  ["overset", (p) => { const over = p.argument(); return mml("mover", null, p.argument(), over); }],
  ["stackrel", (p) => { const over = p.argument(); return mml("mover", null, p.argument(), over); }],
  ["underset", (p) => { const under = p.argument(); return mml("munder", null, p.argument(), under); }],
  ["not", (p) => mml("mrow", { class: "negated" }, p.argument())],
  ["left", (p) => {
    const open = p.delimiter();
    const inside = p.row((token) => token.kind === "command" && token.value === "right");
    if (!p.is("command", "right")) throw new MathError("\\right expected");
    p.at += 1;
    return fenced(open, inside, p.delimiter());
  }],
  ["middle", (p) => fence(p.delimiter())],
  ["big", (p) => fence(p.delimiter())], ["Big", (p) => fence(p.delimiter())], ["bigg", (p) => fence(p.delimiter())],
  ["bigl", (p) => fence(p.delimiter())], ["bigr", (p) => fence(p.delimiter())], ["Bigl", (p) => fence(p.delimiter())], ["Bigr", (p) => fence(p.delimiter())],
  ["substack", (p) => p.argument()],
  ["phantom", (p) => mml("mphantom", null, p.argument())],
  ["tag", (p) => mml("mtext", null, ` (${p.raw()})`)],
  ["label", (p) => { p.raw(); return null; }],
  ["color", (p) => { p.raw(); return null; }],
  ["begin", (p) => p.environment()],
]);
