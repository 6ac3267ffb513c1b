// Text that nobody vouches for: hidden characters are shown, mathematics is typeset where it can be read, and nothing runs.

// Controls, bidirectional overrides, zero-width and other invisible characters, byte-order marks, lone surrogates, tags.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\udb40[\udc00-\udfff]/g;
const FIRST = 4000; // characters shown before "show all"

const codePoint = (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

function plainText(parent, text) {
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match[0] === "\r" && text[match.index + 1] === "\n") continue;
    parent.append(text.slice(from, match.index));
    parent.append(el("span", { class: "hidden-char", title: "a character that is not visible" }, codePoint(match[0])));
    from = match.index + match[0].length;
  }
  parent.append(text.slice(from));
  return parent;
}

// One line, for lists.
const oneLine = (text, most = 160) => {
  const line = text.slice(0, 4 * most).replace(HIDDEN, "\ufffd").replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most)}…` : line;
};

// Where mathematics begins and ends: $$…$$, \[…\], \(…\), $…$ on a line, an environment, or a lone \boxed{…}.
const MATH = /\$\$([^$]{1,4000}?)\$\$|\\\[([\s\S]{1,4000}?)\\\]|\\\(([\s\S]{1,4000}?)\\\)|\$(?![\s$])([^$\n]{1,1000}?)(?<![\s\\])\$(?!\d)|(\\begin\{(?:align|aligned|equation|gather|cases|[pbvV]?matrix)\*?\}[\s\S]{1,4000}?\\end\{\w+\*?\})|(\\boxed\{)/g;

function closing(text, open) {
  let depth = 0;
  for (let i = open; i < text.length && i < open + 2000; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "{") depth += 1;
    else if (text[i] === "}" && (depth -= 1) === 0) return i + 1;
  }
  return -1;
}

function richText(parent, text) {
  let from = 0;
  MATH.lastIndex = 0;
  for (let match = MATH.exec(text); match; match = MATH.exec(text)) {
    let end = match.index + match[0].length;
    let source = match[1] ?? match[2] ?? match[3] ?? match[4] ?? match[5];
    if (match[6]) {
      end = closing(text, end - 1);
      if (end < 0) continue;
      source = text.slice(match.index, end);
      MATH.lastIndex = end;
    }
    plainText(parent, text.slice(from, match.index));
    parent.append(formula(source, match[1] !== undefined || match[2] !== undefined || match[5] !== undefined, text.slice(match.index, end)));
    from = end;
  }
  return plainText(parent, text.slice(from));
}

// A formula as MathML; as its source where it cannot be read.
function formula(source, display, whole) {
  try {
    return toMathML(source, display);
  } catch (error) {
    if (!(error instanceof MathError)) throw error;
    return plainText(el("code", { class: "tex", title: `not typeset: ${error.message}` }), whole);
  }
}

// A message: a text, or its beginning, how much was left out, and its end. Long ones open on demand.
function message(text) {
  const box = el("div", { class: "message", dir: "auto" });
  if (text === null || text === undefined || text === "") {
    box.classList.add("empty");
    box.append("(empty)");
    return box;
  }
  const [head, left, tail] = Array.isArray(text) ? text : [text, 0, ""];
  const rest = () => {
    box.replaceChildren();
    richText(box, head);
    if (left) box.append(el("span", { class: "left-out" }, ` … ${whole(left)} characters are not in this page … `));
    if (tail) richText(box, tail);
  };
  if (head.length + tail.length <= FIRST) {
    rest();
    return box;
  }
  richText(box, head.slice(0, FIRST / 2));
  box.append(" … ", el("button", { type: "button", class: "link", onclick: rest }, `show all ${whole(head.length + left + tail.length)} characters`));
  return box;
}
