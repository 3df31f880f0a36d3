"use strict";
const $ = id => document.getElementById(id);
const D = JSON.parse($("data").textContent), T = D.T, N = D.windows.length * T;
const unpack = (text, type) => text && new type(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const valid = unpack(D.valid, Uint8Array), token = unpack(D.token, Uint16Array), kind = unpack(D.kind, Uint8Array);
const refLoss = unpack(D.ref_loss, Float32Array), refEntropy = unpack(D.ref_entropy, Float32Array);
const snaps = D.snapshots.map(s => ({
  step: s.step, loss: unpack(s.loss, Float32Array), entropy: unpack(s.entropy, Uint8Array),
  own: unpack(s.own, Float32Array), id: unpack(s.top_id, Uint16Array), p: unpack(s.top_p, Uint8Array),
}));
const state = {
  k: D.k < 1 ? D.k : 0.6, snap: snaps.length - 1, mode: "excess", score: "excess", scope: D.scope, source: -1,
  sort: "order", kinds: new Set(D.kinds ? D.kinds.keys() : []),
};

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---- selection, as in slm.py: keep_top, n_keep, choose
const nKeep = (n, k) => n > 0 ? Math.max(1, Math.floor(k * n + 0.5)) : 0;
const SCORES = {
  excess: (s, i) => Math.fround(s.loss[i] - refLoss[i]), loss: (s, i) => s.loss[i],
  ref_loss: (s, i) => -refLoss[i], ref_entropy: (s, i) => -refEntropy[i],
};
// A score of the run that only slm.py can compute.
if (snaps[0].own) SCORES[D.score] = (s, i) => s.own[i];
const COMBINED = { ref_and: (a, b) => a && b, ref_or: (a, b) => a || b };
const groupOf = { micro: row => D.micro[row], sequence: row => row, batch: row => D.batch[row] };
let rankings, kept = new Uint8Array(N);

function ranking(name) {           // rank of each valid token in its group, and the groups' sizes
  const groups = new Map(), rank = new Int32Array(N), size = new Int32Array(N), score = new Float32Array(N);
  for (let i = 0; i < N; i++) {
    if (!valid[i]) continue;
    const group = groupOf[state.scope](Math.floor(i / T));
    score[i] = SCORES[name](snaps[state.snap], i);
    groups.has(group) ? groups.get(group).push(i) : groups.set(group, [i]);
  }
  for (const members of groups.values()) {
    members.sort((a, b) => score[b] - score[a]);       // stable: among ties the lowest position wins
    members.forEach((i, r) => { rank[i] = r; size[i] = members.length; });
  }
  return { rank, size };
}
function rankAgain() {
  rankings = (COMBINED[state.score] ? ["ref_loss", "ref_entropy"] : [state.score]).map(ranking);
}
function select() {
  const [a, b] = rankings, within = (r, i) => r.rank[i] < nKeep(r.size[i], state.k);
  const chosen = i => b ? COMBINED[state.score](within(a, i), within(b, i)) : within(a, i);
  for (let i = 0; i < N; i++) kept[i] = valid[i] && (state.k === 1 || chosen(i));
}

// ---- colour: blue to orange for signed values, one hue for the others; every step is readable under its text
const BINS = 21, ENTROPY = 16;     // the page holds entropies in sixteenths of a nat
const VALUE = {
  excess: (s, i) => s.loss[i] - refLoss[i], loss: (s, i) => s.loss[i], ref: (s, i) => refLoss[i],
  entropy: (s, i) => s.entropy[i] / ENTROPY, kept: (s, i) => kept[i],
};
const NAMES = {
  excess: "Excess loss, nats", loss: "Student's loss, nats", ref: "Reference's loss, nats",
  entropy: "Student's entropy, nats", kept: "Kept or dropped",
};
function quantile(read, q) {       // of every third token in all snapshots, up to the next half nat
  const values = [];
  for (const s of snaps) for (let i = 0; i < N; i += 3) if (valid[i]) values.push(Math.abs(read(s, i)));
  values.sort((a, b) => a - b);
  return Math.max(0.5, Math.ceil(2 * (values[Math.floor(q * (values.length - 1))] || 0)) / 2);
}
const LIMIT = { excess: quantile(VALUE.excess, .85), entropy: quantile(VALUE.entropy, .96), kept: 1 };
LIMIT.loss = LIMIT.ref = Math.max(quantile(VALUE.loss, .96), quantile(VALUE.ref, .96));
const bounds = mode => [mode === "excess" ? -LIMIT.excess : 0, LIMIT[mode]];
function bin(value, [low, high]) {
  return Math.max(0, Math.min(BINS - 1, Math.round((value - low) / (high - low) * (BINS - 1))));
}
const PAINT = {
  light: { base: [255, 255, 255], hot: [240, 138, 36], cold: [112, 170, 232], one: [64, 176, 166], text: "#111" },
  dark: { base: [23, 23, 28], hot: [168, 90, 0], cold: [44, 104, 176], one: [16, 116, 108], text: "#f4f4f6" },
};
function shade(theme, signed, b) {
  const paint = PAINT[theme], share = b / (BINS - 1), strength = signed ? Math.abs(share * 2 - 1) : share;
  const end = !signed ? paint.one : share > .5 ? paint.hot : paint.cold;
  return `rgb(${paint.base.map((from, i) => Math.round(from + (end[i] - from) * strength))})`;
}
const sheet = document.head.appendChild(make("style")).sheet;
for (const theme of ["light", "dark"]) for (const name of ["d", "s"]) for (let b = 0; b < BINS; b++) {
  const rule = `background:${shade(theme, name === "d", b)}; color:${PAINT[theme].text}`;
  sheet.insertRule(`:root[data-theme=${theme}] .${name}${b} { ${rule} }`);
}

// ---- the text
const spans = new Array(N), text = $("text"), word = i => D.spelt[i] ?? D.words[token[i]];
const CONTEXT = "context only: the window's first token is a target of the window before";
const articles = D.pieces.map(([row, start, end, source], n) => {
  const line = make("div", { className: "text", dir: "auto" }), window = D.windows[row];
  if (start === 0) line.append(make("span", { className: "t x", textContent: D.words[D.first[row]], title: CONTEXT }));
  for (let i = row * T + start; i < row * T + end; i++) {
    spans[i] = make("span", { className: "t", textContent: word(i), tabIndex: -1 });
    spans[i].dataset.i = i;
    line.append(spans[i]);
  }
  const where = `window ${window}, micro-batch ${D.micro[row] + 1}, token ${window * T + 1 + start}`;
  const from = D.sources.length > 1 ? `, ${D.sources[source]}` : "";
  const article = make("article", {}, make("h3", { textContent: `document ${n + 1}: ${where}${from}` }), line);
  return Object.assign(article, { first: row * T + start, last: row * T + end, source, number: n });
});
const reachable = spans.find(s => s);
if (reachable) reachable.tabIndex = 0;

const shown = i => valid[i] && (!kind || state.kinds.has(kind[i]));
function paint() {
  const mode = state.mode, range = bounds(mode), s = snaps[state.snap], prefix = mode === "excess" ? "d" : "s";
  text.className = (mode === "kept" ? "mode-kept " : "") + ($("mark").checked ? "mark" : "");
  for (let i = 0; i < N; i++) {
    if (!spans[i]) continue;
    const tint = mode === "kept" ? "" : ` ${prefix}${bin(VALUE[mode](s, i), range)}`;
    spans[i].className = !valid[i] ? "t x" : "t" + (kept[i] ? " k" : "") + tint + (shown(i) ? "" : " off");
  }
  for (const a of articles) {
    let sum = 0, n = 0, chosen = 0;
    for (let i = a.first; i < a.last; i++) if (shown(i)) { sum += VALUE[mode](s, i); n++; chosen += kept[i]; }
    a.hidden = !n || state.source >= 0 && a.source !== state.source;
    a.mean = n ? sum / n : -Infinity;
    a.share = n ? chosen / n : -Infinity;
  }
  arrange();
  summary();
  histogram();
  legend();
  if (current !== null) describe(current);
}
const ORDER = {
  order: () => 0, high: (a, b) => b.mean - a.mean, low: (a, b) => a.mean - b.mean, kept: (a, b) => b.share - a.share,
};
function arrange() {
  const wanted = [...articles].sort((a, b) => ORDER[state.sort](a, b) || a.number - b.number);
  if (wanted.every((a, n) => text.children[n] === a)) return;
  const focus = document.activeElement;
  text.replaceChildren(...wanted);
  if (text.contains(focus)) focus.focus({ preventScroll: true });
}

// ---- beside the text
const percent = (a, b) => b ? `${(100 * a / b).toFixed(0)}%` : "–";
const boxes = (D.kinds || []).map((name, i) => {
  const box = make("input", { type: "checkbox", checked: true });
  const bar = make("span", { className: "bar" }), number = make("span");
  box.dataset.kind = name;
  box.onchange = () => { box.checked ? state.kinds.add(i) : state.kinds.delete(i); paint(); };
  $("kinds").append(make("label", {}, box, make("span", { textContent: name }), bar, number));
  return { box, bar, number };
});
function summary() {
  let all = 0, n = 0;
  const counts = boxes.map(() => [0, 0]);
  for (let i = 0; i < N; i++) {
    if (!valid[i]) continue;
    all++;
    n += kept[i];
    if (kind) { counts[kind[i]][0] += kept[i]; counts[kind[i]][1]++; }
  }
  $("share").textContent = `Kept: ${n.toLocaleString("en")} of ${all.toLocaleString("en")} (${percent(n, all)})`;
  boxes.forEach(({ bar, number }, i) => {
    bar.style.width = `${60 * counts[i][0] / (counts[i][1] || 1)}px`;
    number.textContent = percent(...counts[i]);
  });
}
for (const [id, on] of [["all", true], ["none", false]]) $(id).onclick = () => {
  boxes.forEach(({ box }, i) => { box.checked = on; on ? state.kinds.add(i) : state.kinds.delete(i); });
  paint();
};
$("which").hidden = !D.kinds;
if (innerWidth <= 760) document.querySelectorAll("#side details").forEach(d => { d.open = false; });

function histogram() {
  const mode = state.mode === "kept" ? "excess" : state.mode, range = bounds(mode), s = snaps[state.snap];
  const W = 300, H = 90, w = W / BINS, counts = Array.from({ length: BINS }, () => [0, 0]), sums = [0, 0];
  for (const a of articles) {
    if (a.hidden) continue;
    for (let i = a.first; i < a.last; i++) {
      if (shown(i)) { counts[bin(VALUE[mode](s, i), range)][kept[i]]++; sums[kept[i]]++; }
    }
  }
  const top = Math.max(1, ...counts.map(([a, b]) => a + b));
  const label = `${NAMES[mode]} of the tokens shown: ${sums[1]} kept (solid), ${sums[0]} dropped (grey)`;
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H + 14}`, role: "img", "aria-label": label });
  const column = (x, y, height, fill) => picture.append(svg("rect", { x: x + .5, width: w - 1, y, height, fill }));
  counts.forEach(([dropped, chosen], b) => {
    const h = H * chosen / top, g = H * dropped / top;
    column(b * w, H - h, h, "var(--bar)");
    column(b * w, H - h - g, g, "var(--rest)");
  });
  ["start", "middle", "end"].forEach((anchor, n) => picture.append(
    svg("text", { x: n * W / 2, y: H + 12, "text-anchor": anchor }, `${range[0] + n * (range[1] - range[0]) / 2}`)));
  $("histogram").replaceChildren(picture, make("span", { textContent: label }));
}
function legend() {
  const mode = state.mode, theme = document.documentElement.dataset.theme, [low, high] = bounds(mode);
  const stops = [0, (BINS - 1) / 2, BINS - 1].map(b => shade(theme, mode === "excess", b));
  const colours = mode === "kept" ? "var(--bg) 50%, var(--kept) 50%" : stops.join();
  const ends = {
    excess: [`≤ ${low}: reference is worse`, "0", `≥ ${high}: to learn`], kept: ["dropped, grey", "", "kept"],
  };
  $("legend_name").textContent = NAMES[mode];
  $("legend").firstElementChild.style.background = `linear-gradient(90deg, ${colours})`;
  (ends[mode] || [low, "", `≥ ${high}`]).forEach((t, i) => {
    $("legend").lastElementChild.children[i].textContent = t;
  });
}

// ---- one token
let current = null;
const quoted = t => make("b", { textContent: `“${t}”` });
const cell = value => make("td", { className: "n", textContent: value });
const row = (name, value) => make("tr", {}, make("th", { textContent: name }), cell(value));
function describe(i) {
  current = i;
  const s = snaps[state.snap], rows = [row("", !valid[i] ? "not a target" : kept[i] ? "kept" : "dropped")];
  const loss = x => `${x.toFixed(3)} (p ${Math.exp(-x).toPrecision(2)})`;
  if (valid[i]) {
    rows.push(row("excess loss", (s.loss[i] - refLoss[i]).toFixed(3)), row("student's loss", loss(s.loss[i])),
      row("reference's loss", loss(refLoss[i])), row("student's entropy", VALUE.entropy(s, i).toFixed(1)));
    if (refEntropy) rows.push(row("reference's entropy", refEntropy[i].toFixed(2)));
    rows.push(row(`rank by ${state.score}`, rankings.map(r => `${r.rank[i] + 1} of ${r.size[i]}`).join(", ")));
  }
  if (kind) rows.push(row("kind", D.kinds[kind[i]]));
  const parts = [make("div", {}, quoted(word(i))), make("table", {}, ...rows)];
  if (valid[i]) parts.push(...likeliest(i), ...trajectory(i));
  $("details").replaceChildren(...parts);
}
function likeliest(i) {
  const s = snaps[state.snap], from = s.id ? s : snaps[snaps.length - 1], list = make("table");
  for (let j = i * D.top; j < (i + 1) * D.top; j++)
    list.append(make("tr", {}, make("td", {}, quoted(D.words[from.id[j]])), cell((from.p[j] / 255).toFixed(2))));
  const title = from === s ? "likeliest here, and their probability:" : `likeliest after step ${from.step}:`;
  return [make("div", { textContent: title }), list];
}
function trajectory(i) {
  if (snaps.length < 2) return [];
  const W = 300, H = 44, losses = snaps.map(s => s.loss[i]), top = Math.max(refLoss[i], ...losses, .1);
  const y = v => 4 + (H - 8) * (1 - v / top), x = n => 4 + (W - 8) * n / (snaps.length - 1), level = y(refLoss[i]);
  const label = `loss over the run: ${losses.map(l => l.toFixed(2)).join(", ")}`;
  return [make("div", { textContent: "loss over the run; dashed: the reference" }),
    svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label },
      svg("line", { x1: 0, x2: W, y1: level, y2: level, stroke: "currentColor", "stroke-dasharray": "4 4" }),
      svg("polyline", { points: losses.map((l, n) => `${x(n)},${y(l)}`).join(" "), fill: "none", stroke: "var(--bar)",
                        "stroke-width": 2 }),
      svg("circle", { cx: x(state.snap), cy: y(losses[state.snap]), r: 4, fill: "var(--bar)" }))];
}
const on = (name, act) => text.addEventListener(name, event => {
  const span = event.target.closest(".t[data-i]");
  if (span) act(+span.dataset.i, event);
});
on("mouseover", describe);
on("click", i => spans[i].focus());
on("focusin", i => {
  text.querySelectorAll('[tabindex="0"]').forEach(t => { t.tabIndex = -1; });
  spans[i].tabIndex = 0;
  describe(i);
});
on("keydown", (i, event) => {
  const order = [...text.children].filter(a => !a.hidden), at = order.findIndex(a => i >= a.first && i < a.last);
  if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const here = order[at], before = order[at - 1], after = order[at + 1];
  const target = {
    ArrowRight: i + 1 < here.last ? i + 1 : after?.first, ArrowLeft: i > here.first ? i - 1 : before && before.last - 1,
    ArrowDown: after?.first, ArrowUp: before?.first, Home: here.first, End: here.last - 1,
  };
  if (!(event.key in target)) return;
  event.preventDefault();
  if (target[event.key] !== undefined) spans[target[event.key]].focus();
});

// ---- controls
function options(id, entries) {
  $(id).append(...entries.map(([value, name]) => make("option", { value, textContent: name })));
}
const withEntropy = [["ref_entropy", "lowest reference entropy"], ["ref_and", "both of these"],
  ["ref_or", "either of these"]];
options("score", [["excess", "excess loss"], ["loss", "student's loss"], ["ref_loss", "lowest reference loss"],
  ...(refEntropy ? withEntropy : []), ...(snaps[0].own ? [[D.score, `the run's own: ${D.score}`]] : [])]);
options("scope", [["micro", "micro-batch"], ["sequence", "window"], ...(D.batch ? [["batch", "batch"]] : [])]);
options("source", [[-1, "all"], ...D.sources.map((name, i) => [i, name])]);
$("source_label").hidden = D.sources.length < 2;
if ([...$("score").options].some(o => o.value === D.score)) state.score = D.score;
if (!D.batch && state.scope === "batch") state.scope = "micro";
if (Math.abs(state.k * 20 - Math.round(state.k * 20)) > 1e-9) $("k").step = "any";
$("snap").max = snaps.length - 1;
$("title").textContent = document.title = D.title;
$("note").textContent = `${D.windows.length} windows of ${T} tokens. Orange: the reference knows it better than the ` +
  "student, there is something to learn; blue: the reference knows it less." +
  (snaps[0].id ? "" : " Predictions are the last model's.");

function update(again) {
  if (again) rankAgain();
  select();
  $("k").value = state.k;
  $("k_out").textContent = state.k.toFixed(2);
  $("snap").value = state.snap;
  $("snap_out").textContent = `${snaps[state.snap].step} steps`;
  for (const id of ["mode", "score", "scope", "source", "sort"]) $(id).value = state[id];
  paint();
}
$("k").oninput = () => { state.k = +$("k").value; update(false); };
$("snap").oninput = () => { state.snap = +$("snap").value; update(true); };
for (const id of ["mode", "sort"]) $(id).onchange = () => { state[id] = $(id).value; paint(); };
for (const id of ["score", "scope"]) $(id).onchange = () => { state[id] = $(id).value; update(true); };
$("source").onchange = () => { state.source = +$("source").value; paint(); };
$("mark").onchange = paint;
$("controls").onsubmit = event => event.preventDefault();
function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
}
$("theme").onclick = () => { theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); legend(); };
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
update(true);
