const E = JSON.parse(document.getElementById("run").textContent);
const root = document.documentElement, out = document.querySelector("main");

/* small tools: h() makes elements, svgNode() shapes; a data-tip attribute is shown under the pointer */
function make(ns, tag, attrs, kids) {
  const node = ns ? document.createElementNS(ns, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attrs ?? {})) {
    if (typeof value === "function") node.addEventListener(key, value);
    else node.setAttribute(key === "tip" ? "data-tip" : key, value);
  }
  for (const kid of kids.flat(Infinity)) if (kid || kid === 0) node.append(kid);
  return node;
}
const h = (tag, attrs, ...kids) => make(null, tag, attrs, kids);
const svgNode = (tag, attrs, ...kids) => make("http://www.w3.org/2000/svg", tag, attrs, kids);
const share = (x, digits = 1) => (100 * x).toFixed(digits) + "%";
const millis = (s) => (1e3 * s).toLocaleString("en", { maximumFractionDigits: s >= 1 ? 0 : s >= 0.01 ? 1 : 2 });
const span = (s) => s >= 5400 ? (s / 3600).toFixed(1) + " h" : s >= 90 ? (s / 60).toFixed(1) + " min" : s >= 1 ? s.toFixed(s < 10 ? 2 : 1) + " s" : millis(s) + " ms";
// As telemetry/text.py says sizes.
const bytes = (b) => b >= 2 ** 30 ? (b / 2 ** 30).toFixed(b >= 10 * 2 ** 30 ? 1 : 2) + " GiB"
  : b > 0 && b < 2 ** 20 ? (b / 2 ** 10).toFixed(0) + " KiB" : (b / 2 ** 20).toFixed(0) + " MiB";
const card = (title, sub, ...kids) => { const node = h("section", {}, h("h2", {}, title), h("p", { class: "sub" }, sub), ...kids); out.append(node); return node; };
const painters = [];
/* a chart is drawn as wide as its place, so that its words stay readable on a narrow screen */
function chart(holder, draw) {
  let wide = 0;
  const paint = () => { const w = Math.max(300, Math.round(holder.clientWidth || 1100)); if (w !== wide) { wide = w; holder.replaceChildren(draw(w)); } };
  addEventListener("resize", paint);
  paint();
  return () => { wide = 0; paint(); };
}

/* theme: the system's, ?theme= or the button */
const system = matchMedia("(prefers-color-scheme: dark)");
function dress(dark) { root.dataset.theme = dark ? "dark" : "light"; painters.forEach((paint) => paint()); }
dress((new URLSearchParams(location.search).get("theme") ?? (system.matches ? "dark" : "light")) === "dark");
system.addEventListener("change", (e) => dress(e.matches));
const tip = h("div", { id: "tip" });
document.body.append(tip);
function point(text, e) {
  tip.textContent = text; tip.style.display = "block";
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(e.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
}
document.addEventListener("mousemove", (e) => {
  const on = e.target.closest?.("[data-tip]");
  if (on) point(on.dataset.tip, e); else if (e.target.tagName !== "CANVAS") tip.style.display = "none";
});

/* each term has one colour everywhere */
const FIXED = { useful: "--useful", compute: "--useful", padding: "--pad", recompute: "--redo", matmul_below_peak: "--below", compute_below_peak: "--below",
  other_compute: "--elem", optimizer: "--opt", bubble: "--bubble", launch: "--gap", data: "--data", straggler: "--late", gc: "--gc", unattributed: "--rest" };
const AXES = ["--c1", "--c2", "--c3", "--c4"];
const seen = [];
function hue(name) {
  if (FIXED[name]) return FIXED[name];
  if (name.startsWith("stall/")) return "--stall";
  if (!seen.includes(name)) seen.push(name);
  return AXES[seen.indexOf(name) % AXES.length];
}
/* phases take the colours of the terms that they mostly become */
const TONE = { forward: "useful", backward: "matmul_below_peak", optimizer: "optimizer", other: "unattributed", data: "data", h2d: "data", gc: "gc", recompute: "recompute", stall: "stall/" };
const phaseKey = (name) => TONE[name] ?? name;
const phaseWords = (name) => ({ gc: "garbage collection", h2d: "copy to device" })[name] ?? name.replace("comm/", "communication ");
const fill = (name) => `background:var(${hue(name)})`;
const legend = (names, words) => h("div", { class: "legend" }, names.map((n) => h("span", {}, h("i", { style: fill(n) }), words[n] ?? n)));

/* head */
const W = E.waterfall, F = E.facts;
const worst = W && W.terms.filter((t) => !["useful", "compute"].includes(t.name)).sort((a, b) => b.seconds - a.seconds)[0];
const about = [F.model, Object.entries(F.layout).map(([k, v]) => `${k}=${v}`).join(" × "), `${F.world} rank${F.world > 1 ? "s" : ""}`, F.hardware, F.dtype,
  `${E.status} after ${F.steps.toLocaleString("en")} steps`].filter(Boolean);
out.append(h("header", {}, h("div", {}, h("h1", {}, E.verdicts[0]?.title ?? (worst ? `${E.name}: most time goes to ${worst.label}, ${share(worst.share)} of each step` : E.name)),
  h("p", { class: "sub" }, `trainsys explain · ${E.name} · ` + about.join(" · ")), E.reason ? h("p", { class: "warn" }, E.reason) : null),
  h("button", { click: () => dress(root.dataset.theme !== "dark") }, "light / dark")));
const tile = (value, word, kind) => h("div", { class: "tile " + (kind ?? "") }, h("b", {}, value), h("span", {}, word));
out.append(h("div", { class: "tiles" },
  W && W.mfu !== null ? tile(share(W.mfu), "MFU of the steps", "hero") : null,
  W ? tile(span(W.step_s), "per step, mean over ranks") : null,
  tile(share(E.goodput_share), `goodput of ${span(E.goodput.wall_s)}`),
  E.memory ? tile(bytes(E.memory.peak), E.memory.capacity ? `peak memory, ${share(E.memory.peak / E.memory.capacity, 0)} of the device` : "peak memory, rank " + E.memory.rank) : null,
  tile(String(E.verdicts.length), E.verdicts.length === 1 ? "verdict" : "verdicts", E.verdicts.length ? "alarm" : "")));
E.origin.forEach((line) => out.append(h("p", {}, line)));
E.missing.forEach((m) => out.append(h("p", { class: "warn" }, m)));

/* waterfall: from the whole step down to the useful time */
if (W) {
  const ms = (t) => h("span", { class: "num" }, millis(t) + " ms"), grid = h("div", { class: "fall" });
  const known = W.mfu !== null;
  for (const [word, kind] of [["", ""], ["", ""], ["per step", "num"], ["share", "num"], [known ? "MFU without it" : "", "num wide"]]) grid.append(h("span", { class: "th " + kind }, word));
  const line = (name, words, kind, from, width, seconds, mfu, hint) => {
    grid.append(h("span", { class: kind }, words), h("div", { class: "lane" }, h("i", { class: "ghost", style: `left:0;width:${100 * (from + width)}%;${fill(name)}` }),
      h("i", { style: `left:${100 * from}%;width:${100 * width}%;${fill(name)}`, tip: hint })), ms(seconds), h("span", { class: "num" }, share(seconds / W.wall_s)), h("span", { class: "num wide" }, mfu));
  };
  let top = 1;
  line("unattributed", "wall time of a step", "sum", 0, 1, W.wall_s, "", "step time and stalls: the terms below sum to it");
  const goal = W.terms.find((t) => t.name === "useful") ?? W.terms.find((t) => t.name === "compute");
  const nothing = W.terms.filter((t) => t !== goal && t.seconds < 0.0005 * W.wall_s), folded = nothing.length > 1 ? nothing : [];
  for (const t of [...W.terms].reverse()) {
    if (t === goal || folded.includes(t)) continue;
    const wide = Math.max(0, t.seconds / W.wall_s);
    top -= wide;
    line(t.name, t.label, t.estimated ? "est" : "", Math.max(0, top), wide, t.seconds, t.mfu_without === null ? "" : share(t.mfu_without),
      `${t.label}: ${millis(t.seconds)} ms per step, mean over ranks\nmost on rank ${t.slowest_rank}: ${millis(t.slowest_s)} ms`);
  }
  if (folded.length) {
    const rest = folded.reduce((s, t) => s + Math.max(0, t.seconds), 0), wide = rest / W.wall_s;
    top -= wide;
    line("unattributed", `${folded.length} others`, "", Math.max(0, top), wide, rest, "", folded.map((t) => `${t.label}: ${millis(t.seconds)} ms`).join("\n"));
  }
  if (goal) line(goal.name, goal.label, "sum", 0, Math.max(0, goal.seconds / W.wall_s), goal.seconds, known ? `MFU ${share(W.mfu)}` : "", F.peak_label ? `MFU counts ${F.mfu_counts}\nof ${F.peak_label}` : "");
  card("Where each step goes", `From the wall time of a step down to the work that nothing could shorten; mean of ${W.steps.toLocaleString("en")} steps and of all ranks, ${W.clock} clock` + (F.peak_label ? `; MFU is of ${F.peak_label}` : ""),
    grid, ...W.notes.map((n) => h("p", { class: "note" }, n)), W.terms.some((t) => t.estimated) ? h("p", { class: "note" }, "~ split by a formula or by a capture, not timed in each step") : null);
}

/* verdicts and advice */
const pair = h("div", { class: "two" });
pair.append(h("div", {}, h("h2", {}, "Stragglers"), h("p", { class: "sub" }, "Work between collectives, compared among ranks that do the same"),
  E.verdicts.length ? E.verdicts.map((v) => h("div", { class: "verdict" }, h("div", { class: "share" }, share(v.share, v.share < 0.0995 ? 1 : 0)), h("div", { class: "title" }, v.title),
    h("div", { class: "why" }, `${millis(v.cost_s)} ms of each step, since step ${v.since}${v.until === null ? "" : " to " + v.until}. ${v.evidence}`), h("div", { class: "try" }, v.advice)))
    : h("div", { class: "verdict calm" }, E.ranks.length > 1 ? "No rank, node or link stands out." : "One rank: nobody to compare with."),
  E.said_live.length ? [h("h2", { class: "again" }, "While it trained"), h("p", { class: "sub" }, "What the watch beside rank 0 said, and whether the whole record shows it"),
    E.said_live.map((s) => h("div", { class: "verdict" + (s.confirmed ? "" : " calm") }, s.confirmed ? h("div", { class: "share" }, "step " + s.at_step) : null, h("div", { class: "title" }, (s.confirmed ? "" : `step ${s.at_step}: `) + s.title),
      h("div", { class: "why" }, `${millis(s.cost_s)} ms of each step, since step ${s.since}${s.until === null ? "" : " to " + s.until}; ${s.confirmed ? "the whole record shows it too" : "withdrawn: the whole record does not show it"}`)))] : null,
  E.what_if.length ? [h("h2", { class: "again" }, "What if"), h("p", { class: "sub" }, "The step, replayed with one thing ideal"),
    h("div", { class: "ifs" }, E.what_if.slice(0, 7).map((w) => [h("span", {}, w.what), h("div", { class: "lane" }, h("i", { class: "ghost", style: `left:0;width:100%;${fill("unattributed")}` }),
      h("i", { style: `left:0;width:${100 * (1 - w.gain)}%;${fill("optimizer")}`, tip: `${millis(w.step_s)} ms per step instead of ${millis(W.wall_s)} ms` })), h("span", { class: "num" }, millis(w.step_s) + " ms"), h("span", { class: "num good" }, "−" + share(w.gain))]))] : null));
pair.append(h("div", {}, h("h2", {}, "What to change"), h("p", { class: "sub" }, "Upper bounds: each takes its term away whole"),
  E.advice.length + E.fit.length ? [...E.advice.map((a) => h("div", { class: "verdict gain" }, h("div", { class: "share" }, share(a.gain, a.gain < 0.0995 ? 1 : 0)), h("div", { class: "title" }, a.what),
    h("div", { class: "why" }, a.basis + (a.mfu === null ? "" : `; MFU would be ${share(a.mfu)}`)))), ...E.fit.map((f) => h("div", { class: "verdict calm" }, "to fit: " + f))]
    : h("div", { class: "verdict calm" }, "Nothing would gain 2% or more.")));
out.append(h("section", {}, pair));

/* over time */
if (E.over_time && E.over_time.steps.length > 1) {
  const O = E.over_time, names = Object.keys(O.terms), first = ["useful", "compute", "compute_below_peak", "matmul_below_peak", "other_compute"];
  names.sort((a, b) => (first.indexOf(a) + 1 || 99) - (first.indexOf(b) + 1 || 99));
  const n = O.steps.length, HT = 250, L = 62, B = 22, totals = O.steps.map((_, i) => names.reduce((s, k) => s + Math.max(0, O.terms[k][i]), 0));
  const sorted = [...totals].sort((a, b) => a - b), cap = Math.min(sorted[n - 1], 3 * sorted[n >> 1]) * 1.04 || 1;
  const holder = h("div", {});
  let relative = false;
  const draw = (WD) => {
    const pic = svgNode("svg", { viewBox: `0 0 ${WD} ${HT}`, role: "img" }), full = relative ? 1 : cap, Y = (v) => 6 + (1 - Math.min(v, full) / full) * (HT - B - 6), w = (WD - L - 8) / n;
    for (let k = 0; k <= 4; k++) pic.append(svgNode("line", { x1: L, x2: WD - 8, y1: Y((full * k) / 4), y2: Y((full * k) / 4), stroke: "var(--line)" }),
      svgNode("text", { x: L - 8, y: Y((full * k) / 4) + 4, "text-anchor": "end" }, relative ? share(k / 4, 0) : millis((full * k) / 4) + " ms"));
    O.steps.forEach((step, i) => {
      let low = 0;
      const bar = svgNode("g", { tip: `from step ${step}: ${millis(totals[i])} ms\n` + names.filter((k) => O.terms[k][i] > 0.001 * totals[i]).map((k) => `${O.labels[k]}  ${millis(O.terms[k][i])} ms  ${share(O.terms[k][i] / totals[i])}`).join("\n") });
      for (const k of names) {
        const v = Math.max(0, O.terms[k][i]) / (relative ? totals[i] || 1 : 1);
        if (v > 0 && low < full) bar.append(svgNode("rect", { x: L + i * w, width: w + 0.3, y: Y(low + v), height: Math.max(0, Y(low) - Y(low + v)), style: `fill:var(${hue(k)})`, "shape-rendering": "crispEdges" }));
        low += v;
      }
      pic.append(bar);
      if (low > 1.0001 * full) pic.append(svgNode("path", { d: `M${L + i * w},6 l${w / 2},-6 l${w / 2},6 z`, style: "fill:var(--soft)", tip: `cut off: ${millis(totals[i])} ms` }));
    });
    const marks = WD < 600 ? 3 : 5;
    for (let k = 0; k <= marks; k++) { const i = Math.round((k / marks) * (n - 1)); pic.append(svgNode("text", { x: k === marks ? WD - 8 : k ? L + (i + 0.5) * w : L, y: HT - 6, "text-anchor": k === marks ? "end" : k ? "middle" : "start" }, `${k ? "" : "step "}${O.steps[i]}`)); }
    return pic;
  };
  const pick = h("select", { change: () => { relative = pick.value === "share"; again(); } }, h("option", { value: "ms" }, "milliseconds"), h("option", { value: "share" }, "share of the step"));
  card("The same over time", "Every bar is a stretch of the run; warm-up is in the picture and not in the means above", legend(names, O.labels), h("div", { class: "tools" }, pick), holder);
  const again = chart(holder, draw);
}

/* timeline: the slowest rank, a typical one, then all, on one axis */
if (E.timelines.length) {
  const holder = h("div", {}), pick = h("select", { "aria-label": "which steps", change: () => show() }, E.timelines.map((t, i) => h("option", { value: i }, t.title)));
  let again = null;
  const show = () => { holder.replaceChildren(); again = drawTimeline(holder, E.timelines[+pick.value], (k) => hue(phaseKey(k)), phaseWords, point, () => { tip.style.display = "none"; }); };
  card("Timeline", `${E.timelines[0].title}: all ranks on one axis` + (E.timelines[0].lanes.length > 2 ? "; the slowest first, then a typical one" : ""), E.timelines.length > 1 ? h("div", { class: "tools" }, pick) : null, holder);
  show();
  painters.push(() => again());
}

/* loss */
if (E.loss && E.loss.steps.length > 1) {
  const C = E.loss, n = C.steps.length, HT = 230, L = 70, B = 40, holder = h("div", {});
  let log = false;
  const draw = (WD) => {
    const scaled = (v) => (log ? Math.log10(v) : v), low = Math.min(...C.low), top = Math.max(...C.high), pad = 0.04 * (scaled(top) - scaled(low)) || Math.abs(scaled(top)) * 0.05 || 1;
    const y0 = scaled(low) - pad, y1 = scaled(top) + pad, s0 = C.steps[0], s1 = C.steps[n - 1];
    const X = (s) => L + ((s - s0) / Math.max(1, s1 - s0)) * (WD - L - 12), Y = (v) => 8 + ((y1 - scaled(v)) / (y1 - y0)) * (HT - B - 8);
    const pic = svgNode("svg", { viewBox: `0 0 ${WD} ${HT}`, role: "img", "aria-label": `loss by step, from ${C.mean[0]} to ${C.mean[n - 1]}` });
    for (let k = 0; k <= 4; k++) { const at = y0 + ((y1 - y0) * k) / 4, v = log ? 10 ** at : at; pic.append(svgNode("line", { x1: L, x2: WD - 12, y1: Y(v), y2: Y(v), stroke: "var(--line)" }), svgNode("text", { x: L - 8, y: Y(v) + 4, "text-anchor": "end" }, v.toPrecision(4))); }
    const marks = WD < 600 ? 3 : 5;
    for (let k = 0; k <= marks; k++) { const s = Math.round(s0 + ((s1 - s0) * k) / marks); pic.append(svgNode("text", { x: X(s), y: HT - 22, "text-anchor": k === marks ? "end" : k ? "middle" : "start" }, s.toLocaleString("en"))); }
    pic.append(svgNode("text", { x: (L + WD) / 2, y: HT - 5, "text-anchor": "middle" }, "step"), svgNode("text", { x: 0, y: 0, transform: `translate(12 ${(HT - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, log ? "loss (log)" : "loss"));
    if (C.per_bin > 1) pic.append(svgNode("polygon", { points: C.steps.map((s, i) => `${X(s)},${Y(C.high[i])}`).concat(C.steps.map((s, i) => `${X(s)},${Y(C.low[i])}`).reverse()).join(" "), style: "fill:var(--opt);fill-opacity:.2" }));
    pic.append(svgNode("polyline", { class: "curve", points: C.steps.map((s, i) => `${X(s)},${Y(C.mean[i])}`).join(" "), style: "fill:none;stroke:var(--opt);stroke-width:1.6" }));
    for (const s of C.not_finite) pic.append(svgNode("path", { class: "lost", d: `M${X(s) - 4},8 l8,0 l-4,8 z`, style: "fill:var(--late)", tip: `step ${s}: the loss was not finite` }));
    const wide = (WD - L - 12) / n;
    C.steps.forEach((s, i) => pic.append(svgNode("rect", { x: X(s) - wide / 2, y: 8, width: Math.max(wide, 1), height: HT - B - 8, style: "fill:transparent",
      tip: C.per_bin > 1 ? `from step ${s}: mean ${C.mean[i]}, ${C.low[i]} to ${C.high[i]}` : `step ${s}: ${C.mean[i]}` })));
    return pic;
  };
  const pick = h("select", { "aria-label": "scale of the loss", change: () => { log = pick.value === "log"; again(); } }, h("option", { value: "linear" }, "linear"), C.low.every((v) => v > 0) ? h("option", { value: "log" }, "logarithmic") : null);
  card("Loss", `As rank ${C.rank} recorded it` + (C.per_bin > 1 ? `; line: mean of ${C.per_bin} steps, area: lowest to highest of them` : "") + (C.not_finite.length ? `; ${C.not_finite.length} step${C.not_finite.length > 1 ? "s were" : " was"} not finite, marked at the top` : ""), h("div", { class: "tools" }, pick), holder);
  const again = chart(holder, draw);
}

/* pipeline timeline */
if (E.pipeline) {
  const P = E.pipeline, ops = { F: ["forward", "--pf"], B: ["backward", "--pb"], I: ["gradients of inputs", "--pi"], W: ["gradients of weights", "--pw"] };
  const stages = P.ranks.length, holder = h("div", {}), used = Object.keys(ops).filter((op) => P.ranks.some((r) => r.some((x) => x[0] === op)));
  const node = card("Pipeline, a typical step", `${P.schedule}: what each rank does when, replayed from the times it recorded; ${millis(P.step_s)} ms, of which ranks wait ${share(P.bubble)}; ` +
    (P.step_s - P.ideal_s > 0.01 * P.step_s ? `${millis(P.ideal_s)} ms if all stages were alike` : "the stages are alike") + ` (measured: ${millis(P.measured_s)} ms, with waiting that the replay does not know)`,
    P.ranks.some((r) => r.length) ? h("div", { class: "legend" }, used.map((op) => h("span", {}, h("i", { style: `background:var(${ops[op][1]})` }), ops[op][0]))) : null, holder);
  if (P.ranks.some((r) => r.length)) chart(holder, (WD) => {
    const L = 54, R = 26, pic = svgNode("svg", { viewBox: `0 0 ${WD} ${stages * R + 20}`, role: "img" }), X = (s) => L + (s / P.step_s) * (WD - L - 4);
    P.ranks.forEach((spans, r) => {
      pic.append(svgNode("rect", { x: L, y: r * R + 2, width: WD - L - 4, height: R - 4, rx: 4, style: "fill:var(--hover)" }), svgNode("text", { x: L - 8, y: r * R + R / 2 + 4, "text-anchor": "end" }, `rank ${r}`));
      for (const [op, stage, micro, from, to] of spans) {
        const w = X(to) - X(from), deep = stage >= stages && Math.floor(stage / stages) % 2 === 1;
        pic.append(svgNode("rect", { x: X(from), y: r * R + 2, width: Math.max(0.5, w - 0.6), height: R - 4, rx: Math.min(3, w / 4), style: `fill:var(${ops[op][1]});fill-opacity:${deep ? 0.65 : 1}`,
          tip: `${ops[op][0]}, stage ${stage}, micro-batch ${micro}\n${millis(to - from)} ms, from ${millis(from)} ms` }));
        if (w >= 16) pic.append(svgNode("text", { x: X(from) + w / 2, y: r * R + R / 2 + 4, "text-anchor": "middle", style: "fill:var(--on);pointer-events:none" }, `${micro}`));
      }
    });
    pic.append(svgNode("text", { x: L, y: stages * R + 16 }, "0"), svgNode("text", { x: WD - 4, y: stages * R + 16, "text-anchor": "end" }, `${millis(P.step_s)} ms`));
    return pic;
  });
  else node.append(h("p", { class: "note" }, "too many micro-batches for a picture"));
}

/* heat map */
if (E.heat) {
  const M = E.heat, cols = M.steps.length, rows = M.ranks.length, tall = Math.max(40, Math.min(460, rows * (rows <= 16 ? 26 : rows <= 64 ? 12 : 5)));
  const flat = M.values.flat().map(Math.abs).sort((a, b) => a - b), most = Math.max(0.1, flat[Math.floor(0.99 * (flat.length - 1))]);
  const cv = h("canvas", { style: `height:${tall}px;border-radius:8px` });
  const rgb = (name) => { const probe = h("i", { style: `color:var(${name})` }); document.body.append(probe); const c = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number); probe.remove(); return c; };
  const paint = () => {
    const wide = (cv.width = (cv.clientWidth || 1100) * devicePixelRatio), high = (cv.height = tall * devicePixelRatio), g = cv.getContext("2d");
    const ends = [rgb("--cold"), rgb("--mid"), rgb("--late")], gap = rows <= 64 ? 1 : 0;
    M.values.forEach((row, y) => row.forEach((v, x) => {
      const t = Math.max(-1, Math.min(1, v / most)), [from, to] = t < 0 ? [ends[1], ends[0]] : [ends[1], ends[2]], a = Math.pow(Math.abs(t), 0.7);
      g.fillStyle = `rgb(${from.map((c, i) => Math.round(c + a * (to[i] - c))).join(",")})`;
      g.fillRect(Math.floor((x * wide) / cols), Math.floor((y * high) / rows), Math.ceil(wide / cols), Math.ceil(high / rows) - gap);
    }));
  };
  cv.addEventListener("mousemove", (e) => {
    const box = cv.getBoundingClientRect(), x = Math.floor(((e.clientX - box.left) / box.width) * cols), y = Math.floor(((e.clientY - box.top) / box.height) * rows), v = M.values[y]?.[x];
    if (v !== undefined) point(`rank ${M.ranks[y]}, from step ${M.steps[x]}\n${v >= 0 ? "+" : ""}${share(v)} work against its peers`, e);
  });
  card("Rank by time", "A rank's own work against the median of the ranks that do the same: a red row is a slow rank, a red column a slow moment" + (M.left_out ? `; the ${rows} slowest of ${rows + M.left_out} ranks` : ""),
    h("p", { class: "note" }, "faster", h("i", { class: "ramp" }), `slower; full colour is ${share(most, 0)}`), cv,
    h("div", { class: "axis" }, h("span", {}, `rank ${M.ranks[0]} (top) to ${M.ranks[rows - 1]} · from step ${M.steps[0]}`), h("span", {}, `to step ${M.steps[cols - 1]}`)));
  painters.push(paint); paint();
}

/* phases by rank */
const phaseNames = Object.keys(E.phases).filter((k) => E.phases[k].some((v) => v > 0));
if (phaseNames.length && E.ranks.length) {
  const order = ["data", "h2d", "forward", "recompute", "backward", "optimizer", "gc"];
  phaseNames.sort((a, b) => (order.indexOf(a) + 1 || 50 + (a === "other" ? 1 : 0)) - (order.indexOf(b) + 1 || 50 + (b === "other" ? 1 : 0)));
  const total = E.ranks.map((_, i) => phaseNames.reduce((s, k) => s + E.phases[k][i], 0)), longest = Math.max(...total), thin = E.ranks.length > 24;
  card("Phases by rank", "As the rank's own clock cut them: a late rank has more work, and less communication, than the ones that wait for it",
    h("div", { class: "legend" }, phaseNames.map((k) => h("span", {}, h("i", { style: fill(phaseKey(k)) }), phaseWords(k)))),
    h("div", { class: "bars" + (thin ? " thin" : "") }, E.ranks.map((rank, i) => h("div", { class: "row" }, h("span", { class: "label" }, `rank ${rank}`),
      h("div", { class: "track" }, phaseNames.map((k) => E.phases[k][i] > 0 ? h("i", { style: `width:${(100 * E.phases[k][i]) / longest}%;${fill(phaseKey(k))}`, tip: `rank ${rank}, ${k}: ${millis(E.phases[k][i])} ms (${share(E.phases[k][i] / total[i])})` }) : null)),
      h("span", { class: "value" }, millis(total[i]) + " ms")))));
}

/* memory */
if (E.memory) {
  const M = E.memory, tones = ["--opt", "--elem", "--redo", "--c1", "--c3", "--bubble", "--rest", "--gap"], all = M.capacity ?? M.peak, parts = M.parts.filter(([, v]) => v > 0);
  const bar = h("div", { class: "whole" }, parts.map(([name, v], i) => h("i", { style: `width:${(100 * v) / all}%;background:var(${tones[name === "other" ? 6 : i % 6]})`, tip: `${name}: ${bytes(v)} (${share(v / M.peak)} of the peak)` })),
    M.fragmentation > 0 && M.capacity ? h("i", { class: "pieces", style: `width:${(100 * Math.min(M.fragmentation, M.capacity - M.peak)) / all}%`, tip: `reserved in pieces (fragmentation): ${bytes(M.fragmentation)}` }) : null,
    M.capacity ? h("i", { style: `flex:1;background:var(--hover)`, tip: `free: ${bytes(Math.max(0, M.capacity - M.peak - M.fragmentation))}` }) : null);
  const known = M.compared.filter((p) => p.predicted !== null);
  const holder = h("div", {});
  const draw = (WD) => {
    const a = M.over_time, top = Math.max(...a.map((p) => Math.max(p[1], p[2]))) * 1.08, s0 = a[0][0], s1 = a[a.length - 1][0], R = WD - 8;
    const pic = svgNode("svg", { viewBox: `0 0 ${WD} 180`, role: "img" }), X = (s) => 66 + ((s - s0) / Math.max(1, s1 - s0)) * (R - 66), Y = (v) => 8 + (1 - v / top) * 146;
    for (let k = 0; k <= 3; k++) pic.append(svgNode("line", { x1: 66, x2: R, y1: Y((top * k) / 3), y2: Y((top * k) / 3), stroke: "var(--line)" }), svgNode("text", { x: 60, y: Y((top * k) / 3) + 4, "text-anchor": "end" }, bytes((top * k) / 3)));
    pic.append(svgNode("polygon", { points: `66,${Y(0)} ` + a.map((p) => `${X(p[0])},${Y(p[1])}`).join(" ") + ` ${R},${Y(0)}`, style: "fill:var(--opt);fill-opacity:.25" }),
      svgNode("polyline", { points: a.map((p) => `${X(p[0])},${Y(p[2])}`).join(" "), style: "fill:none;stroke:var(--late);stroke-width:1.6" }),
      svgNode("text", { x: 66, y: 174 }, `step ${s0}`), svgNode("text", { x: R, y: 174, "text-anchor": "end" }, `${s1}`));
    return pic;
  };
  card("Memory at the peak", `Rank ${M.rank}, ${bytes(M.peak)}` + (M.capacity ? ` of ${bytes(M.capacity)}` : "") + (M.predicted_total === null ? "" : `; the planner's model predicts ${bytes(M.predicted_total)}`) + (M.leak_bytes_per_step ? `; grows by ${bytes(M.leak_bytes_per_step)} a step` : ""),
    bar, h("div", { class: "legend" }, parts.map(([name, v], i) => h("span", {}, h("i", { style: `background:var(${tones[name === "other" ? 6 : i % 6]})` }), `${name} ${bytes(v)}`)), M.fragmentation > 0 ? h("span", {}, h("i", { class: "pieces" }), `fragmentation, beyond the peak ${bytes(M.fragmentation)}`) : null),
    M.would_have_fitted ? h("p", { class: "warn" }, M.would_have_fitted) : null,
    h("div", { class: "two" }, h("div", {}, h("h2", {}, "Predicted beside measured"), known.length ? h("table", {}, h("tr", {}, ["part", "predicted", "measured"].map((t) => h("th", {}, t))),
      known.map((p) => h("tr", {}, h("td", {}, p.name), h("td", {}, bytes(p.predicted)), h("td", {}, p.measured === null ? "–" : bytes(p.measured))))) : h("p", { class: "note" }, "no prediction")),
      h("div", {}, h("h2", {}, "Over time"), h("p", { class: "note" }, "area: between steps; line: highest"), holder)),
    Object.keys(M.by_stage).length > 1 ? h("p", { class: "note" }, "peak by stage: " + Object.entries(M.by_stage).map(([s, v]) => `${s}: ${bytes(v)}`).join(", ")) : null, ...M.notes.map((t) => h("p", { class: "note" }, t)));
  if (M.over_time.length > 1) chart(holder, draw);
}

/* goodput */
{
  const G = E.goodput, tones = ["--c1", "--bubble", "--late", "--data", "--elem", "--gap", "--stall", "--rest"], lost = Object.entries(G.lost);
  card("Goodput", `${share(E.goodput_share)} of ${span(G.wall_s)} trained for good: ${G.steps.toLocaleString("en")} steps in ${G.attempts} attempt${G.attempts > 1 ? "s" : ""}` + (G.lost_steps ? `, ${G.lost_steps} of them trained again` : ""),
    h("div", { class: "whole" }, h("i", { style: `width:${100 * E.goodput_share}%;background:var(--useful)`, tip: `training: ${span(G.productive_s)}` }),
      lost.map(([k, s], i) => h("i", { style: `width:${(100 * s) / G.wall_s}%;background:var(${tones[i % tones.length]})`, tip: `${k}: ${span(s)}` }))),
    h("div", { class: "legend" }, h("span", {}, h("i", { style: "background:var(--useful)" }), `training ${span(G.productive_s)}`), lost.map(([k, s], i) => h("span", {}, h("i", { style: `background:var(${tones[i % tones.length]})` }), `${k} ${span(s)}`))));
}
