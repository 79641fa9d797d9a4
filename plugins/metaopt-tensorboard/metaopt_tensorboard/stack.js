// The page of the tab "Stack". TensorBoard loads it into a frame of its own and calls render().
// Whatever comes from a log is put on the page as text: nothing here takes markup.

const MOST_RUNS = 6; // beside one another
const SVG = "http://www.w3.org/2000/svg";

const state = { runs: [], chosen: new Set(), filter: "", onlyDifferences: false, all: new Map(), big: new Set(), open: new Set(), answer: 0 };
let list, main, count;

export async function render() {
  document.head.append(element("style", {}, STYLE));
  followTheme();
  const filter = element("input", { type: "search", placeholder: "Filter runs", "aria-label": "Filter runs" });
  filter.addEventListener("input", () => {
    state.filter = filter.value.toLowerCase();
    showRuns();
  });
  list = element("ul", { class: "runs" });
  count = element("p", { class: "quiet" });
  main = element("main", {});
  document.body.append(element("nav", {}, filter, count, list), main);
  followReloads();
  await reload();
}

// ---- what TensorBoard tells a frame

function followTheme() {
  const apply = () => {
    let dark = matchMedia("(prefers-color-scheme: dark)").matches;
    try {
      dark = parent === window ? dark : parent.document.body.classList.contains("dark-mode");
    } catch {
      // a page of another origin: the system's choice counts
    }
    document.documentElement.classList.toggle("dark", dark);
  };
  apply();
  try {
    new MutationObserver(apply).observe(parent.document.body, { attributes: true, attributeFilter: ["class"] });
  } catch {
    // as above
  }
}

function followReloads() {
  const channel = new MessageChannel();
  channel.port1.onmessage = ({ data }) => {
    const { type, id, isReply } = JSON.parse(data);
    if (isReply) return;
    channel.port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
    if (type === "experimental.DataReloaded") reload();
  };
  parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}

async function ask(path, query = {}) {
  const url = new URL(path, import.meta.url);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`TensorBoard answers ${answer.status}: ${await answer.text()}`);
  return answer.json();
}

async function reload() {
  try {
    state.runs = (await ask("runs")).runs;
  } catch (error) {
    main.replaceChildren(message(error.message));
    return;
  }
  state.runs.sort((a, b) => a.run.localeCompare(b.run, undefined, { numeric: true }));
  const names = new Set(state.runs.map(({ run }) => run));
  state.chosen = new Set([...state.chosen].filter((run) => names.has(run)));
  if (!state.chosen.size && state.runs.length) {
    state.chosen.add((state.runs.find(({ kinds }) => kinds.includes("comparison")) ?? state.runs[0]).run);
  }
  showRuns();
  await showChosen();
}

// ---- the list of runs

function showRuns() {
  const shown = state.runs.filter(({ run, spec }) => `${run} ${spec}`.toLowerCase().includes(state.filter));
  count.textContent = shown.length === state.runs.length ? `${shown.length} runs` : `${shown.length} of ${state.runs.length} runs`;
  list.replaceChildren(...shown.map(runEntry));
}

function runEntry({ run, spec, kinds }) {
  const box = element("input", { type: "checkbox", "aria-label": `Show ${run}` });
  box.checked = state.chosen.has(run);
  box.addEventListener("change", () => {
    state.chosen[box.checked ? "add" : "delete"](run);
    showRuns();
    showChosen();
  });
  const name = element("button", { class: "run", title: "Show only this run" }, run);
  name.addEventListener("click", () => {
    state.chosen = new Set([run]);
    showRuns();
    showChosen();
  });
  const what = kinds.includes("comparison") ? "comparison" : spec;
  return element("li", { class: box.checked ? "chosen" : "" }, box, element("div", {}, name, element("code", { title: spec }, what)));
}

// ---- the chosen runs

async function showChosen() {
  const answer = ++state.answer;
  main.setAttribute("aria-busy", "true");
  const chosen = state.runs.filter(({ run }) => state.chosen.has(run));
  const few = chosen.slice(0, MOST_RUNS);
  const stacks = few.filter(({ kinds }) => kinds.includes("stack"));
  const comparisons = few.filter(({ kinds }) => kinds.includes("comparison"));
  let shown;
  try {
    const tables = await Promise.all(comparisons.map(({ run }) => ask("verdicts", { run })));
    const found = await Promise.all(stacks.map(({ run }) => ask("stack", { run, ...all(run) })));
    shown = tables.map(verdictTable);
    if (found.length === 1) shown.push(oneStack(found[0]));
    if (found.length > 1) shown.push(severalStacks(found));
  } catch (error) {
    shown = [message(error.message)];
  }
  if (answer !== state.answer) return; // another choice was made meanwhile
  if (chosen.length > few.length) shown.unshift(message(`${few.length} of ${chosen.length} chosen runs are shown.`));
  if (!state.runs.length) shown = [message("No run here has a stack of metaopt in its log.")];
  else if (!chosen.length) shown = [message("Choose a run on the left, or several to compare their stacks.")];
  main.replaceChildren(...shown);
  main.setAttribute("aria-busy", "false");
}

function all(run) {
  return state.all.has(run) ? { all: state.all.get(run) } : {};
}

function oneStack(stack) {
  return element(
    "section",
    {},
    heading(stack),
    curves(stack, stack, "", ranges([stack])),
    stack.parts.length === 0 ? "" : element("div", { class: "flow" }, end("gradients"), ...pipeline(stack, stack.parts, ranges([stack])), end("parameters")),
  );
}

function heading({ run, spec, updates, error }) {
  const reached = updates === null ? "no point yet" : `last point at update ${updates}`;
  return element(
    "header",
    {},
    element("h2", {}, run),
    element("span", { class: "quiet" }, reached),
    element("code", { class: "spec" }, spec),
    error ? message(error) : "",
  );
}

function end(word) {
  return element("div", { class: "end" }, word);
}

function pipeline(stack, parts, scale) {
  return parts.map((part) => element("div", { class: "step" }, card(stack, part, scale)));
}

function card(stack, part, scale, differing = new Set(), inner = true) {
  const branches = inner && part.branches.length
    ? element("div", { class: "branches" }, ...part.branches.map((branch) =>
        element("div", { class: "branch" }, element("h4", {}, branch.pattern), ...pipeline(stack, branch.parts, scale))))
    : "";
  return element(
    "article",
    { class: `part ${part.kind}`, "data-part": part.label },
    element("h3", {}, part.name, part.label === part.name.split(".").pop() ? "" : element("em", {}, ` ${part.label}`), element("small", {}, part.acts_on ? `${part.kind}, acts on ${part.acts_on}` : part.kind)),
    hyperparameters(stack, part, scale, differing),
    curves(stack, part, part.label, scale),
    branches,
  );
}

// what was written, differs or has another value now; the rest, which has its defaults, behind a click
function hyperparameters(stack, part, scale, differing) {
  const rows = part.hyperparameters.map((row) => {
    const now = row.points.length ? row.points.at(-1)[1] : null;
    const value = element("td", {}, element("span", {}, said(row)));
    const moves = now !== null && (row.schedule || String(now) !== row.value);
    if (moves) {
      value.append(element("div", { class: "now" }, `now ${short(now)} `, chart(row.tag, row.points, scale, false, true)));
    }
    const kind = differing.has(row.name) ? "differs" : row.default && !moves ? "default" : "";
    return element("tr", { class: kind, "data-name": row.name }, element("th", {}, row.name), value);
  });
  const [folded, shown] = [true, false].map((is) => rows.filter((row) => (row.className === "default") === is));
  if (!rows.length) return "";
  return element("div", {}, table(shown), folded.length ? settings(stack, part, folded) : "");
}

function table(rows) {
  return rows.length ? element("table", { class: "hyper" }, ...rows) : "";
}

function settings(stack, part, rows) {
  const key = `${stack.run}\n${part.label}`;
  const box = element("details", { class: "settings" }, element("summary", {}, "all settings"), table(rows));
  box.open = state.open.has(key);
  box.addEventListener("toggle", () => state.open[box.open ? "add" : "delete"](key));
  return box;
}

function said(row) {
  return row.schedule || row.value;
}

function curves(stack, { curves: found, more }, label, scale) {
  if (!found.length && !more) return "";
  const box = element("div", { class: "curves" }, ...found.map(({ tag, name, points }) => {
    const key = `${stack.run}\n${tag}`;
    const button = element("button", { class: "curve", title: tag, "data-tag": tag });
    const draw = () => {
      const big = state.big.has(key);
      button.classList.toggle("big", big);
      button.replaceChildren(
        element("span", { class: "tag" }, name),
        element("b", {}, points.length ? short(points.at(-1)[1]) : "no point"),
        chart(tag, points, scale, big),
      );
    };
    button.addEventListener("click", () => {
      state.big[state.big.has(key) ? "delete" : "add"](key);
      draw();
    });
    draw();
    return button;
  }));
  if (more) {
    const button = element("button", { class: "more" }, `${more} more`);
    button.addEventListener("click", () => {
      state.all.set(stack.run, label);
      showChosen();
    });
    box.append(button);
  }
  return box;
}

// ---- several stacks: a column for each run, a row for each part

function severalStacks(stacks) {
  const scale = ranges(stacks);
  const rows = aligned(stacks.map((stack) => flat(stack.parts, stack.from === "metaopt/spec")));
  const toggle = element("input", { type: "checkbox" });
  toggle.checked = state.onlyDifferences;
  const grid = element("div", { class: "grid" });
  grid.style.gridTemplateColumns = `repeat(${stacks.length}, minmax(240px, 1fr))`;
  const fill = () => {
    const kept = rows.filter((row) => !state.onlyDifferences || differs(row));
    grid.replaceChildren(
      ...stacks.map(heading),
      ...stacks.map((stack) => curves(stack, stack, "", scale) || element("div", {})),
      ...kept.flatMap((row) => row.map((entry, column) => cell(stacks[column], row, entry, scale))),
    );
    if (!kept.length) grid.append(message("The stacks are the same, part by part."));
  };
  toggle.addEventListener("change", () => {
    state.onlyDifferences = toggle.checked;
    fill();
  });
  fill();
  return element("section", {}, element("label", { class: "toggle" }, toggle, " only parts that differ"), grid);
}

function cell(stack, row, entry, scale) {
  const first = row.find((other) => other);
  if (!entry) return element("div", { class: "absent" }, `no ${first.part.label}`);
  const box = element("div", { class: differs(row) ? "cell differs" : "cell" });
  if (entry.path) box.append(element("h4", {}, entry.path));
  box.append(card(stack, entry.part, scale, differing(row), false));
  return box;
}

// `partial`: of a spec, which leaves out what has its default
function flat(parts, partial, path = "") {
  return parts.flatMap((part) => [
    { part, partial, path },
    ...part.branches.flatMap(({ pattern, parts: own }) => flat(own, partial, path ? `${path} > ${pattern}` : pattern)),
  ]);
}

function differs(row) {
  const names = new Set(row.map((entry) => entry && JSON.stringify([entry.path, entry.part.name, entry.part.label])));
  return names.size > 1 || differing(row).size > 0;
}

// the hyperparameters of a row that are not the same in every stack that has the part
function differing(row) {
  const entries = row.filter((entry) => entry);
  const texts = new Map();
  for (const { part } of entries) {
    for (const hyper of part.hyperparameters) texts.set(hyper.name, [...(texts.get(hyper.name) ?? []), said(hyper)]);
  }
  // what another optimizer does not take, or a spec leaves out, is no difference of its own
  const partial = entries.some((entry) => entry.partial || entry.part.name !== entries[0].part.name);
  const same = ([, its]) => its.every((text) => text === its[0]) && (partial || its.length === entries.length);
  return new Set([...texts].filter((entry) => !same(entry)).map(([name]) => name));
}

// what two parts have in common: the same part, or at least two bases
function likeness(a, b) {
  if (a.path !== b.path) return 0;
  if (a.part.label === b.part.label && a.part.name === b.part.name) return 4;
  if (a.part.name === b.part.name) return 3;
  return a.part.kind === "optimizer" && b.part.kind === "optimizer" ? 2 : 0;
}

// rows of parts, in the order of every stack: the longest common sequence, stack after stack
function aligned(stacks) {
  let rows = stacks[0].map((entry) => [entry]);
  for (const [column, parts] of stacks.entries()) {
    if (column) rows = joined(rows, parts, column);
  }
  return rows;
}

function joined(rows, parts, column) {
  const like = (row, part) => Math.max(...row.map((entry) => (entry ? likeness(entry, part) : 0)));
  const best = Array.from({ length: rows.length + 1 }, () => new Array(parts.length + 1).fill(0));
  for (let i = rows.length - 1; i >= 0; i--) {
    for (let j = parts.length - 1; j >= 0; j--) {
      const both = like(rows[i], parts[j]);
      best[i][j] = Math.max(best[i + 1][j], best[i][j + 1], both ? both + best[i + 1][j + 1] : 0);
    }
  }
  const found = [];
  const nothing = () => new Array(column).fill(null);
  let [i, j] = [0, 0];
  while (i < rows.length || j < parts.length) {
    const both = i < rows.length && j < parts.length ? like(rows[i], parts[j]) : 0;
    if (both && best[i][j] === both + best[i + 1][j + 1]) found.push([...rows[i++], parts[j++]]);
    else if (i < rows.length && (j === parts.length || best[i][j] === best[i + 1][j])) found.push([...rows[i++], null]);
    else found.push([...nothing(), parts[j++]]);
  }
  return found;
}

// ---- curves

// one range of steps, and one of values for each tag, so that runs beside one another can be compared
function ranges(stacks) {
  const scale = { last: 1, values: new Map() };
  const add = (tag, points) => {
    for (const [step, value] of points) {
      scale.last = Math.max(scale.last, step);
      if (!Number.isFinite(value)) continue;
      const [low, high] = scale.values.get(tag) ?? [Infinity, -Infinity];
      scale.values.set(tag, [Math.min(low, value), Math.max(high, value)]);
    }
  };
  for (const stack of stacks) {
    for (const { curves: found, hyperparameters: rows } of [stack, ...flat(stack.parts, false).map(({ part }) => part)]) {
      for (const { tag, points } of found) add(tag, points);
      for (const { tag, points } of rows ?? []) add(tag, points);
    }
  }
  return scale;
}

function chart(tag, points, scale, big = false, linear = false) {
  const [width, height, margin] = big ? [420, 170, 20] : [160, 28, 3];
  const [low, high] = scale.values.get(tag) ?? [0, 1];
  const log = !linear && low > 0 && high / low > 100; // a schedule is known by its shape
  const at = (value) => (log ? Math.log(value) : value);
  const x = (step) => margin + ((width - 2 * margin) * step) / scale.last;
  const y = (value) => (high > low ? height - margin - ((height - 2 * margin) * (at(value) - at(low))) / (at(high) - at(low)) : height / 2);
  let path = "";
  let pen = "M";
  const marks = [];
  for (const [step, value] of points) {
    if (Number.isFinite(value)) {
      path += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    } else {
      pen = "M"; // the line breaks where the value is no number
      marks.push(shape("circle", { class: "broken", cx: x(step), cy: margin, r: 2 }));
    }
  }
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  picture.append(shape("title", {}, `${tag}: ${short(low)} to ${short(high)}${log ? ", logarithmic" : ""}`));
  picture.append(shape("path", { d: path }), ...marks);
  const last = points.at(-1);
  if (last && Number.isFinite(last[1])) picture.append(shape("circle", { cx: x(last[0]), cy: y(last[1]), r: big ? 3 : 2 }));
  if (big) {
    const words = [[margin, 13, `${short(high)}${log ? " (logarithmic)" : ""}`], [margin, height - 5, short(low)], [width - margin, height - 5, `update ${scale.last}`, "end"]];
    picture.append(...words.map(([left, top, word, anchor]) => shape("text", { x: left, y: top, "text-anchor": anchor ?? "start" }, word)));
  }
  return picture;
}

// ---- the verdicts of a comparison

function verdictTable({ run, rows, baseline, metric, level, error }) {
  if (error) return element("section", {}, element("h2", {}, run), message(error));
  const ends = rows.flatMap((row) => [row.low, row.high, row.difference].map(Number)).filter(Number.isFinite);
  const reach = Math.max(...ends.map(Math.abs), 1e-12) * 1.08;
  const header = ["contender", "verdict", `difference [${Number((100 * (1 - (level ?? 0.05))).toPrecision(3))}%]`, "", "p"].map((word) => element("th", {}, word));
  return element(
    "section",
    {},
    element("header", {}, element("h2", {}, run), element("span", { class: "quiet" }, `difference in ${metric} from the baseline; less than zero is better`), element("code", { class: "spec" }, `baseline: ${baseline}`)),
    element("table", { class: "verdicts" }, element("tr", {}, ...header), ...rows.map((row) =>
      element(
        "tr",
        { class: `verdict ${row.verdict.split(" ")[0]}` },
        element("td", {}, element("code", {}, row.contender)),
        element("td", { class: "word" }, row.verdict),
        element("td", { class: "number" }, row.difference === null ? "" : `${signed(row.difference)} [${signed(row.low)}, ${signed(row.high)}]`),
        element("td", {}, interval(row, reach)),
        element("td", { class: "number" }, row.p === null ? "" : short(row.p)),
      ))),
  );
}

function interval({ difference, low, high }, reach) {
  const [width, height] = [260, 26];
  const clip = (value) => Math.max(-reach, Math.min(reach, Number(value)));
  const x = (value) => width / 2 + (clip(value) / reach) * (width / 2 - 4);
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  picture.append(shape("line", { class: "zero", x1: width / 2, x2: width / 2, y1: 0, y2: height }));
  if (difference === null) return picture;
  picture.append(shape("title", {}, `${signed(difference)}, ${signed(low)} to ${signed(high)}`));
  if (low !== null && high !== null) {
    picture.append(shape("line", { class: "bar", x1: x(low), x2: x(high), y1: height / 2, y2: height / 2 }));
    for (const value of [low, high]) {
      // an open end has no stroke across: the interval goes on
      if (Number.isFinite(Number(value))) picture.append(shape("line", { class: "bar", x1: x(value), x2: x(value), y1: height / 2 - 5, y2: height / 2 + 5 }));
    }
  }
  picture.append(shape("circle", { cx: x(difference), cy: height / 2, r: 4 }));
  return picture;
}

// ---- pieces of the page: everything that a log says is text here

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== ""));
  return made;
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function message(text) {
  return element("p", { class: "message" }, text);
}

function short(value) {
  const number = Number(value); // "Infinity" and "NaN" come as text
  if (!Number.isFinite(number)) return String(value);
  const size = Math.abs(number);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? number.toExponential(2) : String(Number(number.toPrecision(4)));
}

function signed(value) {
  if (value === null) return "?";
  return Number(value) > 0 ? `+${short(value)}` : short(value);
}

const STYLE = `
:root { --text: #212121; --quiet: #616161; --page: #fff; --card: #fafafa; --line: #dadce0; --accent: #e8710a; --curve: #1967d2; --differs: #fff3d6; --bad: #c5221f; --good: #137333; color-scheme: light; }
:root.dark { --text: #e8eaed; --quiet: #a3a7ad; --page: #303030; --card: #3a3a3a; --line: #575757; --accent: #ffa94d; --curve: #8ab4f8; --differs: #544a2c; --bad: #f28b82; --good: #81c995; color-scheme: dark; }
* { box-sizing: border-box; }
body { margin: 0; display: flex; height: 100vh; font: 13px/1.45 Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--text); background: var(--page); }
nav { width: 280px; flex: none; padding: 12px; border-right: 1px solid var(--line); overflow-y: auto; }
nav input[type=search] { width: 100%; padding: 6px 8px; font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line); border-radius: 4px; }
main { flex: 1; min-width: 0; padding: 12px 20px 40px; overflow: auto; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: left; cursor: pointer; }
code { font: 12px/1.5 "Roboto Mono", "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.quiet, small { color: var(--quiet); }
.runs { list-style: none; margin: 0; padding: 0; }
.runs li { display: flex; gap: 6px; padding: 5px 4px; border-radius: 4px; }
.runs li.chosen { background: var(--card); }
.runs li div { min-width: 0; flex: 1; }
.runs code { display: block; color: var(--quiet); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; font-size: 11px; }
.run { font-weight: 500; overflow-wrap: anywhere; }
h2 { display: inline; margin: 0 10px 0 0; font-size: 17px; font-weight: 500; overflow-wrap: anywhere; }
h3 { margin: 0 0 6px; font-size: 14px; font-weight: 600; }
h3 small { float: right; font-weight: 400; font-size: 12px; }
h4 { margin: 0 0 6px; font: 12px "Roboto Mono", "DejaVu Sans Mono", monospace; color: var(--quiet); }
.spec { display: block; margin: 4px 0 10px; }
.message { padding: 8px 12px; border-left: 3px solid var(--accent); background: var(--card); }
.flow { max-width: 940px; margin-top: 14px; }
.end { width: max-content; padding: 3px 12px; border-radius: 12px; color: var(--page); background: var(--quiet); }
.step { margin-left: 22px; border-left: 2px solid var(--quiet); padding: 10px 0 10px 18px; position: relative; }
.step::after { content: ""; position: absolute; left: -6px; bottom: -1px; border: 5px solid transparent; border-top-color: var(--quiet); border-bottom: 0; }
.branch > .step:last-child::after { display: none; }
.part { padding: 10px 12px; border: 1px solid var(--line); border-radius: 6px; background: var(--card); }
.part.optimizer { border-left: 4px solid var(--accent); }
.flow > .step > .part { display: grid; grid-template-columns: auto 1fr; column-gap: 28px; align-items: start; }
.flow > .step > .part > h3, .branches { grid-column: 1 / 3; }
.flow > .step > .part > .curves { margin-top: 0; }
.branches { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 8px; }
.branch { flex: 1; min-width: 240px; }
.hyper { border-collapse: collapse; width: 100%; }
.hyper th { text-align: left; font-weight: 400; color: var(--quiet); padding: 1px 14px 1px 0; vertical-align: top; width: 1%; white-space: nowrap; }
.hyper td { padding: 1px 0; font-family: "Roboto Mono", "DejaVu Sans Mono", monospace; font-size: 12px; overflow-wrap: anywhere; }
tr.default { color: var(--quiet); }
.settings summary { color: var(--quiet); font-size: 12px; cursor: pointer; width: max-content; }
tr.differs { background: var(--differs); }
.now { display: flex; flex-wrap: wrap; align-items: center; gap: 0 8px; white-space: nowrap; }
.curves { display: flex; flex-wrap: wrap; gap: 6px 14px; margin-top: 8px; align-content: flex-start; }
.curve { display: grid; grid-template-columns: auto auto; gap: 0 8px; justify-content: space-between; width: 172px; padding: 3px 6px; align-self: flex-start; border-radius: 4px; }
.curve:hover { background: var(--page); }
.curve .tag { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--quiet); font-size: 12px; }
.curve svg { grid-column: 1 / 3; }
.curve.big { width: 432px; max-width: 100%; }
.more { align-self: center; padding: 4px 10px; border: 1px solid var(--line); border-radius: 12px; }
svg { max-width: 100%; }
svg path { fill: none; stroke: var(--curve); stroke-width: 1.5; }
svg circle { fill: var(--curve); }
svg circle.broken { fill: var(--bad); }
svg text { fill: var(--quiet); font-size: 11px; }
.toggle { display: block; margin-bottom: 10px; }
.grid { display: grid; gap: 10px 14px; align-items: stretch; }
.grid header { border-bottom: 1px solid var(--line); }
.cell > .part { height: 100%; }
.cell h4 + .part { height: calc(100% - 22px); }
.cell.differs > .part { border-color: var(--accent); }
.absent { display: grid; place-items: center; color: var(--quiet); border: 1px dashed var(--line); border-radius: 6px; min-height: 48px; }
.verdicts { border-collapse: collapse; }
.verdicts th { text-align: left; color: var(--quiet); font-weight: 400; }
.verdicts th, .verdicts td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); }
.verdicts .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdicts .zero { stroke: var(--quiet); stroke-dasharray: 2 2; }
.verdicts .bar { stroke: var(--curve); stroke-width: 2; }
.verdict.better .word { color: var(--good); font-weight: 600; }
.verdict.worse .word { color: var(--bad); font-weight: 600; }
.verdict.better .bar { stroke: var(--good); } .verdict.better circle { fill: var(--good); }
.verdict.worse .bar { stroke: var(--bad); } .verdict.worse circle { fill: var(--bad); }
`;
