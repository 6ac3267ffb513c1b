// Numbers and names as the page writes them.

const isNumber = (v) => typeof v === "number" && Number.isFinite(v);
const MINUS = "\u2212";
const minus = (text) => text.replace(/^-/, MINUS);

function num(v, digits = 3) {
  if (!isNumber(v)) return "–";
  const size = Math.abs(v);
  if (size !== 0 && (size >= 1e6 || size < 0.5 * 10 ** -digits)) return minus(v.toExponential(1));
  return minus(v.toFixed(digits));
}

const signed = (v, digits = 2) => (isNumber(v) && v > 0 ? `+${num(v, digits)}` : num(v, digits));
const whole = (v) => (isNumber(v) ? minus(Math.round(v).toLocaleString("en-US")) : "–");
const percent = (v) => (isNumber(v) ? `${(100 * v).toFixed(v > 0 && v < 0.095 ? 1 : 0)}%` : "–");

// Ticks and tooltips: as many digits as the number needs.
function brief(v) {
  if (!isNumber(v)) return "–";
  const size = Math.abs(v);
  if (size >= 1e6) return minus(`${+(v / 1e6).toPrecision(3)}M`);
  if (size >= 1e4) return minus(`${+(v / 1e3).toPrecision(3)}k`);
  if (size !== 0 && size < 1e-3) return minus(v.toExponential(1));
  return minus(String(+v.toPrecision(size >= 1000 ? 4 : 3)));
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const interval = (three) => (three ? `${num(three[0])} [${num(three[1])}, ${num(three[2])}]` : "–");
const plural = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;
const listed = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names[names.length - 1]}`);
const sign = (v) => (!isNumber(v) ? "" : v > 0 ? "good" : v < 0 ? "bad" : "");
const lastOf = (values) => {
  for (let i = (values || []).length - 1; i >= 0; i -= 1) if (isNumber(values[i])) return values[i];
  return null;
};
const meanOf = (values) => {
  const there = (values || []).filter(isNumber);
  return there.length ? there.reduce((a, b) => a + b, 0) / there.length : null;
};
