const R = JSON.parse(document.getElementById("report").textContent);
const main = document.querySelector("main");
const TERMS = [
  ["matmul", "Matmuls", "--matmul"], ["other_compute", "Other compute", "--other"],
  ["comm_exposed", "Exposed communication", "--comm"], ["memcpy_exposed", "Exposed copies", "--copy"], ["idle", "Idle", "--idle"],
];
const KIND = { matmul: "--matmul", other_compute: "--other", communication: "--comm", memcpy: "--copy" };
const ms = (ns, digits) => (ns / 1e6).toLocaleString("en", { minimumFractionDigits: digits ?? 2, maximumFractionDigits: digits ?? 2 });
const pct = (x, d) => (100 * x).toFixed(d ?? 1) + "%";
const gib = (b) => (b / 2 ** 30).toFixed(2);

function el(tag, attrs, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs || {})) {
    if (k === "tip") node.dataset.tip = v;
    else if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else node.setAttribute(k, v);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined).map((c) => (c instanceof Node ? c : String(c))));
  return node;
}
function svg(tag, attrs, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attrs || {})) {
    if (k === "tip") node.dataset.tip = v; else node.setAttribute(k, v);
  }
  node.append(...children);
  return node;
}
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function section(title, sub, ...children) {
  const node = el("section", {}, el("h2", {}, title), el("p", { class: "sub" }, sub), ...children);
  main.append(node);
  return node;
}
const redraws = [];
function drawn(draw) { redraws.push(draw); draw(); }

/* theme and tooltip */
const wanted = matchMedia("(prefers-color-scheme: dark)");
function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  redraws.forEach((d) => d());
}
document.documentElement.dataset.theme = (new URLSearchParams(location.search).get("theme") ?? (wanted.matches ? "dark" : "light"));
wanted.addEventListener("change", (e) => theme(e.matches));
const tip = el("div", { id: "tip" });
document.body.append(tip);
function showTip(text, event) {
  tip.textContent = text;
  tip.style.display = "block";
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
}
document.addEventListener("mousemove", (event) => {
  const on = event.target.closest && event.target.closest("[data-tip]");
  if (on) showTip(on.dataset.tip, event);
  else if (!(event.target instanceof HTMLCanvasElement)) tip.style.display = "none";
});

function legend(items) {
  return el("div", { class: "legend" }, items.map(([name, c]) => el("span", {}, el("i", { style: `background:var(${c})` }), name)));
}
function stack(terms, longest) {
  const span = terms.end - terms.start;
  return el("div", { class: "track", style: `width:${(100 * span) / longest}%` }, TERMS.map(([key, name, c]) =>
    terms[key] > 0 && el("i", { style: `width:${(100 * terms[key]) / span}%;background:var(${c})`,
      tip: `${name}: ${ms(terms[key], 3)} ms (${pct(terms[key] / span)})` })).filter(Boolean));
}
function barList(entries, total, c, unit) {
  const most = Math.max(...entries.map((e) => e[1]), 1);
  return el("div", {}, entries.map(([name, value]) => el("div", { class: "row wide" },
    el("span", { class: "label", title: name }, name),
    el("div", { class: "track" }, el("i", { style: `width:${(100 * value) / most}%;background:var(${c});border-radius:5px` })),
    el("span", { class: "value" }, unit ? unit(value) : `${ms(value)} ms`, total ? ` · ${pct(value / total)}` : ""))));
}
function table(head, rows, options) {
  const body = el("tbody", {});
  const text = options?.text ?? [0];
  let order = null, down = true;
  const fill = (filter) => {
    let shown = filter ? rows.filter((r) => (r[0] instanceof Node ? r[0].title + r[0].textContent : String(r[0])).toLowerCase().includes(filter)) : rows.slice();
    if (order !== null) shown.sort((a, b) => (sortable(a[order]) > sortable(b[order]) ? 1 : -1) * (down ? -1 : 1));
    body.replaceChildren(...shown.slice(0, 400).map((r) => el("tr", {}, r.map((cell, i) =>
      el("td", { class: text.includes(i) ? "text" : "", title: i === 0 && typeof cell === "string" ? cell : "" },
        cell instanceof Node ? cell.cloneNode(true) : cell)))));
  };
  const sortable = (v) => { const n = parseFloat(String(v instanceof Node ? v.textContent : v).replace(/[, ]/g, "")); return isNaN(n) ? String(v) : n; };
  const node = el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, head.map((h, i) =>
    el("th", { class: text.includes(i) ? "text" : "", onclick: () => { down = order === i ? !down : true; order = i; fill(); } }, h)))), body));
  fill();
  node.filter = (f) => fill(f.toLowerCase());
  return node;
}
function pill(kind) { return el("span", { class: "pill", style: `border-color:var(${KIND[kind] ?? "--idle"})` }, el("span", {}, kind.replace("_", " "))); }
const words = (name) => name.replaceAll("_", " ");

/* head */
const timed = R.ranks.filter((r) => r.breakdown);
const mean = (f) => timed.reduce((s, r) => s + f(r.breakdown.whole), 0) / timed.length;
const devices = [...new Set(R.ranks.map((r) => r.device).filter(Boolean))].join(", ");
const bits = [];
if (R.ranks.length) bits.push(`${R.ranks.length} rank${R.ranks.length > 1 ? "s" : ""}${devices ? " on " + devices : ""}`);
if (R.hang) bits.push(`flight recorder of ${R.hang.ranks.length} ranks`);
if (R.memory.length) bits.push(`memory of ${R.memory.length} device${R.memory.length > 1 ? "s" : ""}`);
main.append(el("header", {}, el("div", {}, el("h1", {}, R.verdicts[0]?.title ?? R.hang?.verdict ?? "Nothing stands out"),
  el("p", { class: "sub" }, "trainsys trace · " + bits.join(" · "))),
  el("button", { onclick: () => theme(document.documentElement.dataset.theme !== "dark") }, "light / dark")));
if (timed.length) {
  const span = mean((t) => t.end - t.start);
  const tiles = [[ms(span), "ms traced, mean of ranks"]];
  for (const [key, name] of TERMS) tiles.push([pct(mean((t) => t[key] / (t.end - t.start))), name.toLowerCase()]);
  const mfu = timed.find((r) => r.mfu)?.mfu;
  if (mfu) tiles.push([pct(mfu.value, 2), "MFU, see below"]);
  main.append(el("div", { class: "tiles" }, tiles.map(([v, k]) => el("div", { class: "tile" }, el("b", {}, v), el("span", {}, k)))));
  if (mfu) main.append(el("p", { class: "note", style: "margin:-6px 4px 16px" }, `MFU counts ${mfu.flops}; its peak is ${mfu.peak}.`));
}
if (R.health.length) section("Trace health", "What is missing from the recording or contradicts itself, before anything is said", R.health.map((line) => el("p", { class: "root health" }, line)));
if (R.verdicts.length) section("What is wrong, and what to do", "Costliest first; the share is of the traced time", R.verdicts.map((v) =>
  el("div", { class: "verdict" }, el("div", { class: "share" }, pct(v.share, v.share < 0.0995 ? 1 : 0)), el("div", { class: "title" }, v.title),
    el("div", { class: "why" }, v.evidence), el("div", { class: "try" }, v.advice))));

/* timeline: the slowest rank, a typical one, then all, on one axis */
if (R.timeline) {
  const holder = el("div", {}), T = R.timeline, hue = { matmul: "--matmul", "other compute": "--other", communication: "--comm", copies: "--copy" };
  section("Timeline", "All ranks on one axis" + (T.lanes.length > 2 ? "; the slowest first, then a typical one" : "") + ". In each row compute is above, communication and copies below: where only the lower half is filled, communication is exposed", holder);
  redraws.push(drawTimeline(holder, T, (k) => hue[k] ?? "--idle", (k) => k, showTip, () => { tip.style.display = "none"; }));
}

/* hang */
if (R.hang) {
  const h = R.hang;
  section("Hang", h.verdict,
    h.roots.map((r) => el("div", { class: "root" }, el("b", {}, `rank ${r.rank} · ${r.kind.replace("_", " ")}`), el("div", {}, r.evidence),
      r.where ? el("div", { class: "mono" }, r.where) : null)),
    h.mismatches.map((m) => el("div", { class: "root" }, el("b", {}, `group ${m.group}, collective #${m.sequence}: ${m.what} mismatch`),
      Object.entries(m.variants).map(([v, ranks]) => el("div", { class: "mono" }, `${v}: ranks ${ranks.join(", ")}`, m.where[v] ? ` at ${m.where[v]}` : "")))),
    h.waiting.length ? table(["merely waiting", "in", "for"], h.waiting.map((w) => [`rank ${w.rank}`, w.operation, w.on.join(", ") || "—"]), { text: [0, 1, 2] }) : null,
    h.missing.length ? el("p", { class: "note" }, `No dump from ranks ${h.missing.join(", ")}.`) : null);
}

/* time */
if (timed.length) {
  const longest = Math.max(...timed.map((r) => r.breakdown.whole.end - r.breakdown.whole.start));
  const thin = timed.length > 24;
  section("Where the time went, by rank", "Each instant counts once: compute before communication before copies; what is left is idle",
    legend(TERMS.map(([, n, c]) => [n, c])),
    el("div", { class: "bars" + (thin ? " thin" : "") }, timed.map((r) => el("div", { class: "row" }, el("span", { class: "label" }, `rank ${r.rank}`),
      stack(r.breakdown.whole, longest), el("span", { class: "value" }, ms(r.breakdown.whole.end - r.breakdown.whole.start) + " ms")))));
  const pick = el("select", {}, timed.map((r, i) => el("option", { value: i }, `rank ${r.rank}`)));
  const host = el("div", {});
  const show = () => {
    const r = timed[pick.value], whole = r.breakdown.whole, span = whole.end - whole.start;
    const top = (o) => Object.entries(o).filter(([, ns]) => ns >= 0.0005 * span).sort((a, b) => b[1] - a[1]).slice(0, 12);
    const steps = r.breakdown.steps.slice(0, 60), most = Math.max(...steps.map((t) => t.end - t.start), 1);
    host.replaceChildren(
      el("div", { class: "two" },
        el("div", {}, el("h2", {}, "Idle, by cause"), barList(top(whole.idle_by_cause), span, "--idle")),
        el("div", {}, el("h2", {}, "Exposed communication, by group"), Object.keys(whole.by_group).length
          ? barList(top(whole.by_group), span, "--comm") : el("p", { class: "note" }, "none"))),
      ...(steps.length ? [el("h2", { style: "margin-top:18px" }, "By step"), el("div", { class: "bars" + (steps.length > 24 ? " thin" : "") },
        steps.map((t) => el("div", { class: "row" }, el("span", { class: "label" }, `step ${t.step}`), stack(t, most),
          el("span", { class: "value" }, ms(t.end - t.start) + " ms"))))] : []),
      el("p", { class: "note", style: "margin-top:14px" }, `${r.launch.short_count.toLocaleString()} kernels under 10 µs took ${ms(r.launch.short_ns)} ms, with ${ms(r.launch.short_idle_ns)} ms idle before them; ` +
        `launch to start: median ${(r.launch.delay_p50_ns / 1e3).toFixed(1)} µs, 95th percentile ${(r.launch.delay_p95_ns / 1e3).toFixed(1)} µs; ` +
        `${pct(r.launch.empty_share)} of launches found an empty queue; ${r.launch.graph_count.toLocaleString()} kernels came from CUDA graphs.` +
        (whole.recompute ? ` Recomputation: ${ms(whole.recompute)} ms.` : "")));
  };
  pick.addEventListener("change", show);
  section("One rank", "Why it was idle, which groups it waited on, and its steps", el("div", { class: "tools" }, pick), host);
  show();
}

/* across ranks */
if (R.across?.ranks.length) {
  const a = R.across, ranks = Object.keys(a.wait_map);
  const part = [];
  if (ranks.length) {
    const cv = el("canvas", { height: Math.max(60, Math.min(420, ranks.length * 14)) });
    const n = a.wait_map[ranks[0]].length, peak = Math.max(1, ...ranks.flatMap((r) => a.wait_map[r]));
    const paint = () => {
      const w = (cv.width = cv.clientWidth * devicePixelRatio || 1100), hgt = (cv.height = Math.max(60, Math.min(420, ranks.length * 14)) * devicePixelRatio);
      cv.style.height = hgt / devicePixelRatio + "px";
      const g = cv.getContext("2d"), c0 = rgb(color("--heat0")), c1 = rgb(color("--heat1"));
      ranks.forEach((r, y) => a.wait_map[r].forEach((v, x) => {
        const t = Math.sqrt(v / peak);
        g.fillStyle = `rgb(${c0.map((k, i) => Math.round(k + t * (c1[i] - k))).join(",")})`;
        g.fillRect(Math.floor((x * w) / n), Math.floor((y * hgt) / ranks.length), Math.ceil(w / n), Math.ceil(hgt / ranks.length) - (ranks.length < 40 ? 1 : 0));
      }));
    };
    cv.addEventListener("mousemove", (e) => {
      const b = cv.getBoundingClientRect(), x = Math.floor(((e.clientX - b.left) / b.width) * n), y = Math.floor(((e.clientY - b.top) / b.height) * ranks.length);
      if (ranks[y] !== undefined && a.wait_map[ranks[y]][x] !== undefined) showTip(`rank ${ranks[y]}, collective ${x + 1} of ${n}: waited ${ms(a.wait_map[ranks[y]][x], 3)} ms`, e);
    });
    part.push(el("h2", {}, "Waiting, rank by collective"), el("p", { class: "sub" }, `Rows are ranks ${ranks[0]} to ${ranks[ranks.length - 1]}. A pale row is a rank the others wait for; the deepest colour is ${ms(peak)} ms.`), cv);
    section("Across ranks", `${a.matched.toLocaleString()} collectives matched; aligned ends agree within ${(a.end_spread_ns / 1e3).toFixed(1)} µs`, part);
    drawn(paint);
  }
  section("Who arrives last", "Waiting is own duration minus the shortest one of the same collective",
    table(["rank", "comm ms", "waiting ms", "arrived last", "of", "made others wait ms", "clock offset µs"], a.ranks.map((r) =>
      [`rank ${r.rank}`, ms(r.comm_ns, 3), ms(r.wait_ns, 3), r.last, r.collectives, ms(r.caused_ns, 3), (r.clock_offset_ns / 1e3).toFixed(1)])));
  section("Collectives", "Bus bandwidth over the shortest member's time, so waiting is not in it",
    table(["collective", "group", "axis", "members", "MiB", "calls", "shortest ms", "bus GB/s", "link GB/s", "waiting ms"], a.bandwidth.slice(0, 200).map((b) =>
      [b.op, b.group, b.axis, b.members, b.size < 0 ? "?" : (b.size / 2 ** 20).toFixed(2), b.calls, ms(b.shortest_ns, 3), b.bus_gb_s === null ? "?" : b.bus_gb_s.toFixed(2),
        b.link_gb_s === null ? "?" : b.link_gb_s.toFixed(0), ms(b.wait_ns)]), { text: [0, 1, 2] }));
}
function rgb(c) { const d = el("i", { style: `color:${c}` }); document.body.append(d); const v = getComputedStyle(d).color.match(/\d+/g).slice(0, 3).map(Number); d.remove(); return v; }

/* critical path and what-if */
if (R.critical) {
  const c = R.critical;
  section("Critical path and what-if", `Rank ${R.critical_rank}, ${ms(c.span_ns)} ms; replayed with one thing ideal at a time`, el("div", { class: "two" },
    el("div", {}, el("h2", {}, "What the end waited for"), barList(Object.entries(c.by_kind).filter(([, ns]) => ns >= 0.0005 * c.span_ns).sort((x, y) => y[1] - x[1]).map(([k, ns]) => [words(k), ns]), c.span_ns, "--mark")),
    el("div", {}, el("h2", {}, "Shorter by, if …"), c.what_if.some((w) => w.saved_share >= 0.001) ? barList(c.what_if.filter((w) => w.saved_share >= 0.001).map((w) => [w.what, w.saved_ns]), c.span_ns, "--good") : el("p", { class: "note" }, c.faithful ? "nothing would save 0.1%" : "the replay was not faithful"),
      ...Object.entries(c.withheld).map(([what, why]) => el("p", { class: "note" }, `${what}: withheld, ${why}`)))));
}
if (R.diff) {
  const d = R.diff, rows = [d.span, ...d.terms, ...d.kernels.slice(0, 30)];
  section("Against the other run", d.verdict, table([`mean per ${d.per}`, "calls before", "after", "before ms", "after ms", "change ms"], rows.map((c) =>
    [c.shown ? el("span", { title: c.name }, c.shown) : words(c.name), c.calls_before ? c.calls_before.toFixed(1) : "", c.calls_after ? c.calls_after.toFixed(1) : "", ms(c.before_ns, 3), ms(c.after_ns, 3), ((c.after_ns - c.before_ns) / 1e6).toFixed(3)])));
}

/* kernels and products */
const full = R.ranks.find((r) => r.kernels.length);
if (full) {
  const busy = full.kernels.reduce((s, k) => s + k.total_ns, 0);
  const t = table(["kernel", "class", "calls", "total ms", "share", "mean µs", "longest µs"], full.kernels.map((k) =>
    [el("span", { title: k.name }, k.shown), pill(k.kind), k.count.toLocaleString(), ms(k.total_ns, 3), pct(k.total_ns / busy), (k.total_ns / k.count / 1e3).toFixed(1), (k.max_ns / 1e3).toFixed(1)]), { text: [0, 1] });
  section(`Kernels of rank ${full.rank}`, "By total time", el("div", { class: "tools" }, el("input", { placeholder: "filter by name", oninput: (e) => t.filter(e.target.value) })), t);
}
const shaped = R.ranks.find((r) => r.products.length);
if (shaped) {
  const P = shaped.products.map((p) => ({ ...p, rate: (p.flops / p.time_ns) * 1e9 }));
  const dots = P.filter((p) => p.intensity > 0 && p.rate > 0), box = el("div", {});
  section(`Matmuls of rank ${shaped.rank}`, "FLOP/s reached against the roofline: what bandwidth and the dense peak allow at each shape's intensity", box,
    table(["operator", "shapes", "type", "calls", "ms", "TFLOP/s", "of reachable", "bound by"], P.map((p) =>
      [p.op, p.dims, p.dtype, p.calls, ms(p.time_ns, 3), (p.rate / 1e12).toFixed(1), p.reachable ? pct(p.rate / p.reachable) : "?", p.bound ?? "?"]), { text: [0, 1, 2, 7] }));
  if (dots.length > 1) {
    const W = 1100, H = 260, L = 56, B = 30, xs = dots.map((p) => Math.log10(p.intensity)), tops = dots.map((p) => p.reachable ?? p.rate);
    const x0 = Math.floor(Math.min(...xs)), x1 = Math.ceil(Math.max(...xs) + 0.01), y1 = Math.ceil(Math.log10(Math.max(...tops)) * 2) / 2 + 0.1, y0 = Math.floor(Math.log10(Math.min(...dots.map((p) => p.rate))));
    const X = (v) => L + ((v - x0) / (x1 - x0)) * (W - L - 14), Y = (v) => 8 + ((y1 - v) / (y1 - y0)) * (H - B - 8);
    const s = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
    for (let k = Math.ceil(y0); k <= y1; k++) { s.append(svg("line", { x1: L, x2: W - 14, y1: Y(k), y2: Y(k), stroke: "var(--line)" }), svg("text", { x: L - 8, y: Y(k) + 4, "text-anchor": "end" }, `${10 ** (k - 12) >= 1 ? 10 ** (k - 12) : (10 ** (k - 12)).toPrecision(1)} T`)); }
    for (let k = x0; k <= x1; k++) s.append(svg("text", { x: X(k), y: H - 10, "text-anchor": "middle" }, `${10 ** k}`));
    s.append(svg("text", { x: W - 14, y: H - 10, "text-anchor": "end" }, "FLOPs per byte"));
    const roof = dots.filter((p) => p.reachable).sort((a, b) => a.intensity - b.intensity);
    if (roof.length > 1) s.append(svg("polyline", { fill: "none", stroke: "var(--soft)", "stroke-width": 1.5, "stroke-dasharray": "5 4", points: roof.map((p) => `${X(Math.log10(p.intensity))},${Y(Math.log10(p.reachable))}`).join(" ") }));
    const most = Math.max(...dots.map((p) => p.time_ns));
    for (const p of dots) s.append(svg("circle", { cx: X(Math.log10(p.intensity)), cy: Y(Math.log10(p.rate)), r: 4 + 12 * Math.sqrt(p.time_ns / most), fill: "var(--matmul)", "fill-opacity": 0.55, stroke: "var(--matmul)",
      tip: `${p.op} ${p.dims}\n${(p.rate / 1e12).toFixed(1)} TFLOP/s${p.reachable ? ", " + pct(p.rate / p.reachable) + " of reachable" : ""}\n${ms(p.time_ns, 3)} ms in ${p.calls} calls` }));
    box.append(s);
  }
}

/* op timelines */
for (const t of R.timelines) section("Op timeline", `${t.workers} workers, ${t.steps} steps of ${(1e3 * t.step_time_s).toLocaleString("en", { maximumFractionDigits: 1 })} ms; ${t.slowdown.toFixed(2)} times what it would be with every operation ideal`,
  table(["kind of operation", "slowdown by it alone"], Object.entries(t.by_kind).sort((a, b) => b[1] - a[1]).map(([kind, s]) => [kind, s.toFixed(3)])),
  t.worst.length ? el("p", { class: "note" }, `Slowest workers (data rank, stage): ${t.worst.slice(0, 8).map((w) => `(${w.join(", ")})`).join(" ")}; without their slowness ${pct(Math.min(1, t.worst_gives_back))} of the lost time is gone.`) : null);

/* memory */
for (const m of R.memory) {
  const W = 1100, H = 240, L = 56, B = 26, T = m.timeline, s = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  if (T.length > 1) {
    const x1 = Math.max(T[T.length - 1][0], 1), top = Math.max(...T.map((p) => p[2]), m.peak, 1) * 1.06, X = (v) => L + (v / x1) * (W - L - 14), Y = (v) => 8 + (1 - v / top) * (H - B - 8);
    for (let k = 0; k <= 4; k++) s.append(svg("line", { x1: L, x2: W - 14, y1: Y((top * k) / 4), y2: Y((top * k) / 4), stroke: "var(--line)" }), svg("text", { x: L - 8, y: Y((top * k) / 4) + 4, "text-anchor": "end" }, gib((top * k) / 4)));
    for (let k = 0; k <= 4; k++) s.append(svg("text", { x: X((x1 * k) / 4), y: H - 8, "text-anchor": k === 4 ? "end" : k ? "middle" : "start" }, ((x1 * k) / 4e3).toFixed(0) + " ms"));
    s.append(svg("polygon", { fill: "var(--matmul)", "fill-opacity": 0.28, stroke: "var(--matmul)", "stroke-width": 1.2, points: `${L},${Y(0)} ` + T.map((p) => `${X(p[0])},${Y(p[1])}`).join(" ") + ` ${X(x1)},${Y(0)}` }));
    s.append(svg("polyline", { fill: "none", stroke: "var(--soft)", "stroke-dasharray": "5 4", points: T.map((p) => `${X(p[0])},${Y(p[2])}`).join(" ") }));
    s.append(svg("circle", { cx: X(m.peak_time_us), cy: Y(m.peak), r: 5, fill: "var(--bad)", tip: `peak ${gib(m.peak)} GiB` }));
  }
  section(`Memory of device ${m.device}`, `${gib(m.reserved)} GiB reserved, ${gib(m.active)} GiB in use, peak ${gib(m.peak)} GiB; largest free block ${(m.largest_free_block / 2 ** 20).toFixed(0)} MiB against a largest request of ${(m.largest_request / 2 ** 20).toFixed(0)} MiB`,
    T.length > 1 ? [legend([["in use, GiB", "--matmul"], ["reserved", "--soft"], ["peak", "--bad"]]), s] : null,
    m.out_of_memory.map((o) => el("div", { class: "root" }, `${(o.request / 2 ** 20).toFixed(0)} MiB refused at ${o.where}; ${o.would_fit ? "would have fitted in free memory" : "did not fit"}`)),
    el("h2", { style: "margin-top:14px" }, "Held at the peak, by part"), barList(Object.entries(m.by_part), m.peak, "--other", (v) => gib(v) + " GiB"),
    el("h2", { style: "margin-top:14px" }, "By line"), table(["line", "part", "modules", "blocks", "GiB"], m.holders.map((h) => [h.where, h.part, h.module, h.blocks, gib(h.bytes)]), { text: [0, 1, 2] }));
}

/* notes */
const notes = {};
for (const said of [...R.ranks.map((r) => r.said), R.across?.said, R.hang?.said, ...R.memory.map((m) => m.said)]) for (const [k, v] of Object.entries(said ?? {})) notes[k] = (notes[k] ?? 0) + v;
if (Object.keys(notes).length || R.unread.length) section("Read with care", "What was repaired, dropped, assumed or not found in the files",
  Object.entries(notes).map(([k, v]) => el("p", { class: "note" }, `${k}: ${v.toLocaleString()}`)), R.unread.slice(0, 40).map((u) => el("p", { class: "note" }, `not read: ${u.why}`)));
