"use strict";
// Samples are numbered by their place in the order of suspicion, from 0. Everything that comes from the data is set as
// textContent, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const given = new Int32Array(bytes(data.given).buffer);
const suggested = new Int32Array(bytes(data.suggested).buffer);
const suspicion = new Float32Array(bytes(data.suspicion).buffer);
const values = new Float32Array(bytes(data.values).buffer);
const count = data.ids.length;
const number = new Intl.NumberFormat("en");
const SYMBOLS = { keep: "✓", relabel: "→", drop: "✕" };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- decisions ------------------------------------------------------------------------------------------------------

// A decision is { kind, label }: the label is that of the sample afterwards. `label` counts for "relabel" alone.
const STORE = `suspects:${data.key}`;
const decisions = new Map();
const placeOf = new Map(data.ids.map((id, place) => [id, place]));
// Under one key the ids are the same, but not their order of suspicion: the browser keeps places in the order of ids.
const byId = [...data.ids.keys()].sort((a, b) => (data.ids[a] < data.ids[b] ? -1 : 1));
const inOrder = new Int32Array(count);
byId.forEach((place, at) => (inOrder[place] = at));
const past = [];
let stored = true;
let unsaved = false;

function keepInBrowser() {
  const entries = [...decisions].map(([place, one]) => [inOrder[place], one.kind, one.label]);
  try {
    if (entries.length) localStorage.setItem(STORE, JSON.stringify(entries));
    else localStorage.removeItem(STORE);
    stored = true;
  } catch {
    if (stored) say("This browser keeps nothing for this page: save decisions.csv before you close it.");
    stored = false;
  }
}

function readFromBrowser() {
  decisions.clear();
  try {
    for (const [at, kind, label] of JSON.parse(localStorage.getItem(STORE) || "[]")) {
      const place = byId[at];
      if (place !== undefined && kind in SYMBOLS && label >= 0 && label < data.classes.length) {
        decisions.set(place, { kind, label });
      }
    }
  } catch {
    // What cannot be read is as good as nothing.
  }
}

// One step that can be undone: pairs of a place and its new decision, or null for none.
function decide(changes, announce) {
  past.push({ at: selected, before: changes.map(([place]) => [place, decisions.get(place) || null]) });
  put(changes);
  status(announce);
}

function put(changes) {
  for (const [place, one] of changes) {
    if (one) decisions.set(place, one);
    else decisions.delete(place);
  }
  unsaved = true;
  keepInBrowser();
  showAll();
}

function undo() {
  const step = past.pop();
  if (!step) return status("nothing to undo");
  put(step.before);
  select(step.before.length === 1 ? step.before[0][0] : step.at);
  status("undone");
}

function choose(kind, label) {
  if (selected < 0) return;
  const place = selected;
  if (kind === "relabel" && label === given[place]) kind = "keep";
  const one = { kind, label: kind === "relabel" ? label : given[place] };
  decide([[place, one]], `${place + 1}: ${words(one)}`);
  step(1);
}

function words(one) {
  return one.kind === "relabel" ? `relabel as ${data.classes[one.label]}` : one.kind;
}

// --- decisions.csv --------------------------------------------------------------------------------------------------

const COLUMNS = ["id", "fingerprint", "given_label", "decision", "new_label"];

function toCsv() {
  const quote = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [...decisions.keys()].sort((a, b) => a - b).map((place) => {
    const { kind, label } = decisions.get(place);
    const name = kind === "relabel" ? data.classes[label] : "";
    return [data.ids[place], data.fingerprints[place], data.classes[given[place]], kind, name].map(quote).join(",");
  });
  return [COLUMNS.join(","), ...lines].join("\n") + "\n";
}

function save() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" }));
  link.download = "decisions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  unsaved = false;
  status(`saved ${decisions.size} decisions`);
}

function parseCsv(text) {
  const rows = [];
  let row = [], field = "", quoted = false;
  for (let i = 0; i < text.length; i++) {
    const letter = text[i];
    if (quoted) {
      if (letter !== '"') field += letter;
      else if (text[i + 1] === '"') field += text[i++];
      else quoted = false;
    } else if (letter === '"' && field === "") quoted = true;
    else if (letter === ",") row.push(field), (field = "");
    else if (letter === "\n" || letter === "\r") {
      if (letter === "\r" && text[i + 1] === "\n") i++;
      row.push(field), rows.push(row), (row = []), (field = "");
    } else field += letter;
  }
  if (quoted || field !== "" || row.length) throw new Error("it ends in the middle of a line");
  return rows.filter((one) => one.length > 1 || one[0] !== "");
}

// All decisions of a file as changes; an error that names what is wrong unless every one of them fits.
function fromCsv(text) {
  const [header, ...rows] = parseCsv(text.replace(/^\ufeff/, ""));
  const at = COLUMNS.map((column) => (header || []).indexOf(column));
  if (at.includes(-1)) throw new Error(`it has no column ${COLUMNS[at.indexOf(-1)]}`);
  const labelOf = new Map(data.classes.map((name, label) => [name, label]));
  const changes = new Map();
  for (const row of rows) {
    if (row.length !== header.length) throw new Error(`a line has ${row.length} fields: ${row.join(",")}`);
    const [id, fingerprint, old, kind, name] = at.map((place) => row[place]);
    const place = placeOf.get(id);
    if (place === undefined) throw new Error(`it decides about ${id}, which is not in this data`);
    if (fingerprint !== data.fingerprints[place]) throw new Error(`the content of ${id} is another`);
    if (old !== data.classes[given[place]]) throw new Error(`the given label of ${id} is another than ${old}`);
    if (!(kind in SYMBOLS)) throw new Error(`unknown decision ${kind} about ${id}`);
    if ((kind === "relabel") !== (name !== "")) throw new Error(`the decision ${kind} about ${id} has the new label "${name}"`);
    const label = kind === "relabel" ? labelOf.get(name) : given[place];
    if (label === undefined) throw new Error(`unknown class ${name} for ${id}`);
    const before = changes.get(place);
    if (before && (before.kind !== kind || before.label !== label)) throw new Error(`it decides twice about ${id}`);
    changes.set(place, { kind, label });
  }
  return [...changes];
}

async function load(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    const changes = fromCsv(text);
    decide(changes, `loaded ${changes.length} decisions`);
    say(`Loaded ${number.format(changes.length)} decisions from ${file.name}.`);
  } catch (error) {
    say(`${file.name} was not loaded: ${error.message}. Nothing has changed.`);
  }
}

// --- what stands in the pages ---------------------------------------------------------------------------------------

const pages = new Map();
const KEPT_PAGES = 10;

// The page of a sample, or null until it has come; the least recently used is let go.
function pageOf(place) {
  const index = Math.floor(place / data.page);
  const page = pages.get(index);
  if (page) {
    pages.delete(index);
    pages.set(index, page);
    return page.ready ? page : null;
  }
  if (data.kind === "none" && !data.curves) return null;
  pages.set(index, { ready: false });
  for (const old of [...pages.keys()].slice(0, -KEPT_PAGES)) if (pages.get(old).ready) pages.delete(old);
  const script = element("script");
  script.src = `${data.pages}${String(index).padStart(4, "0")}.js`;
  script.onload = () => script.remove();
  script.onerror = () => {
    script.remove();
    say("The folder “pages” is not beside this page, so pictures and curves are missing: keep the two together.");
  };
  document.head.append(script);
  return null;
}

globalThis.suspectsPage = (index, content) => {
  const page = {
    ready: true,
    texts: content.texts,
    curves: content.curves && bytes(content.curves),
    sizes: content.sizes && bytes(content.sizes),
    tile: content.tile,
  };
  const done = () => {
    pages.set(index, page);
    draw();
    showDetail();
  };
  if (!content.sheet) return done();
  page.sheet = new Image();
  page.sheet.onload = done;
  page.sheet.src = content.sheet;
};

function drawPicture(canvas, place, side) {
  const page = pageOf(place);
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(side * scale);
  if (!page || !page.sheet) return;
  const index = place % data.page;
  const columns = Math.min(data.columns, Math.floor(page.sheet.width / page.tile));
  const [width, height] = [page.sizes[2 * index], page.sizes[2 * index + 1]];
  const factor = canvas.width / Math.max(width, height);
  const context = canvas.getContext("2d");
  // A few pixels are looked at one by one.
  context.imageSmoothingEnabled = Math.max(width, height) > 48;
  context.imageSmoothingQuality = "high";
  context.drawImage(
    page.sheet, (index % columns) * page.tile, Math.floor(index / columns) * page.tile, width, height,
    (canvas.width - width * factor) / 2, (canvas.height - height * factor) / 2, width * factor, height * factor,
  );
}

const SVG = "http://www.w3.org/2000/svg";

function curve(place, width, height) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const page = data.curves && pageOf(place);
  if (!page || !page.curves) return svg;
  const length = data.curves.epochs.length;
  const start = (place % data.page) * length;
  const x = (i) => (length > 1 ? 1 + (i / (length - 1)) * (width - 2) : width / 2);
  const y = (level) => height - 2 - (level / 255) * (height - 4);
  const shape = (tag, attributes) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.setAttribute("vector-effect", "non-scaling-stroke");
    svg.append(made);
  };
  shape("line", { class: "axis", x1: 0, x2: width, y1: height - 1, y2: height - 1 });
  const points = [...page.curves.subarray(start, start + length)].map((level, i) => `${x(i)},${y(level)}`);
  if (length === 1) points.push(`${x(0) + 1},${points[0].split(",")[1]}`);
  const line = { points: points.join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.75 };
  shape("polyline", { ...line, "stroke-linejoin": "round" });
  return svg;
}

// --- the list -------------------------------------------------------------------------------------------------------

const ROW = 72;
const list = $("list");
let visible = [];
let rowOf = new Map();
let selected = -1;

function label(text) {
  const made = element("span", "label", text);
  made.dir = "auto";
  return made;
}

function change(from, to) {
  const made = element("span");
  made.append(label(data.classes[from]));
  if (from !== to) {
    const arrow = element("span", "arrow", "→");
    arrow.setAttribute("aria-label", "suggested");
    made.append(" ", arrow, " ", label(data.classes[to]));
  } else made.append(element("span", "arrow", " as given"));
  return made;
}

function fillRow(row, place) {
  const what = element("div", "what");
  what.append(change(given[place], suggested[place]));
  const id = element("div", "id", shortText(place) || data.ids[place]);
  id.dir = "auto";
  what.append(id);
  const parts = [element("span", "place", `#${number.format(place + 1)}`)];
  if (data.kind === "images") {
    const canvas = element("canvas");
    drawPicture(canvas, place, 56);
    parts.push(canvas);
  }
  parts.push(what);
  if (data.curves) parts.push(curve(place, 92, 40));
  const score = element("span", "number", suspicion[place].toFixed(3));
  if (place < data.suspects) score.append(element("small", "", "suspect"));
  parts.push(score);
  const one = decisions.get(place);
  const badge = element("span", "badge", one ? `${SYMBOLS[one.kind]} ${one.kind === "relabel" ? data.classes[one.label] : one.kind}` : "");
  if (one) badge.title = words(one);
  parts.push(badge);
  row.replaceChildren(...parts);
  row.setAttribute("aria-selected", String(place === selected));
}

function shortText(place) {
  const page = data.kind === "texts" && pageOf(place);
  return page && page.texts ? page.texts[place % data.page].slice(0, 160) : "";
}

function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(visible.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const rows = [];
  for (let at = first; at < last; at++) {
    const place = visible[at];
    const row = element("div", "row");
    row.id = `row-${place}`;
    row.style.top = `${at * ROW}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-posinset", at + 1);
    row.setAttribute("aria-setsize", visible.length);
    row.addEventListener("click", () => select(place));
    fillRow(row, place);
    rows.push(row);
  }
  if (!visible.length) rows.push(element("p", "empty", "No sample passes the filters."));
  $("space").style.height = `${visible.length * ROW}px`;
  $("space").replaceChildren(...rows);
  if (selected >= 0) list.setAttribute("aria-activedescendant", `row-${selected}`);
}

function select(place) {
  selected = place;
  const at = rowOf.get(place);
  if (at !== undefined) {
    const top = at * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  }
  draw();
  showDetail();
}

function step(by) {
  if (!visible.length) return;
  const at = rowOf.get(selected);
  const next = at === undefined ? 0 : Math.min(visible.length - 1, Math.max(0, at + by));
  select(visible[next]);
}

function nextUndecided() {
  const at = rowOf.has(selected) ? rowOf.get(selected) : -1;
  for (let i = 1; i <= visible.length; i++) {
    const place = visible[(at + i) % visible.length];
    if (!decisions.has(place)) return select(place);
  }
  status("every sample here has a decision");
}

// --- the selected sample --------------------------------------------------------------------------------------------

function showDetail() {
  const nothing = selected < 0;
  for (const id of ["keep", "relabel", "drop", "choice"]) $(id).disabled = nothing;
  $("undo").disabled = !past.length;
  if (nothing) return;
  const place = selected;
  const picture = $("picture");
  picture.hidden = data.kind !== "images";
  if (!picture.hidden) {
    const canvas = element("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `picture of ${data.ids[place]}`);
    picture.replaceChildren(canvas);
    drawPicture(canvas, place, 320);
  }
  const same = suggested[place] === given[place];
  $("labels").replaceChildren(
    element("small", "", "given "), label(data.classes[given[place]]),
    element("small", "", same ? " and suggested" : " → suggested "), same ? "" : label(data.classes[suggested[place]]),
  );
  $("name").textContent = data.ids[place];
  $("name").dir = "auto";
  const rest = place < data.suspects ? ", suspect" : "";
  $("numbers").textContent = `#${number.format(place + 1)}${rest} · suspicion ${suspicion[place].toFixed(3)} · ${data.score} ${values[place].toPrecision(3)}`;
  const graph = $("curve");
  graph.hidden = !data.curves;
  if (data.curves) {
    const epochs = data.curves.epochs;
    const ends = element("div", "ends");
    ends.append(element("span", "", `loss over epochs 1 to ${epochs[epochs.length - 1]}`), element("span", "", `top: ${data.curves.top.toPrecision(3)}`));
    graph.replaceChildren(curve(place, 300, 84), ends);
  }
  const page = data.kind !== "none" || data.curves ? pageOf(place) : null;
  $("text").hidden = !(page && page.texts);
  if (page && page.texts) $("text").textContent = page.texts[place % data.page];
  const one = decisions.get(place);
  $("target").textContent = data.classes[suggested[place]];
  $("target").dir = "auto";
  $("relabel").disabled = same;
  const pressed = { keep: "keep", drop: "drop", relabel: one && one.label === suggested[place] ? "relabel" : "" };
  for (const id of ["keep", "drop", "relabel"]) $(id).setAttribute("aria-pressed", String(!!one && one.kind === pressed[id]));
  $("choice").value = String(one && one.kind === "relabel" ? one.label : suggested[place]);
}

// --- filters --------------------------------------------------------------------------------------------------------

function options(select, first, labels) {
  const made = labels.map(([label, many]) => {
    const option = element("option", "", many === null ? data.classes[label] : `${data.classes[label]} (${number.format(many)})`);
    option.value = label;
    return option;
  });
  if (first) {
    const all = element("option", "", first);
    all.value = "";
    made.unshift(all);
  }
  select.replaceChildren(...made);
}

function counted(labels) {
  const many = new Map();
  for (const one of labels) many.set(one, (many.get(one) || 0) + 1);
  return [...many].sort((a, b) => a[0] - b[0]);
}

function filter() {
  const from = $("given").value, to = $("suggested").value, state = $("state").value;
  const least = Number($("least").value), words = $("search").value.toLowerCase(), only = $("only").checked;
  $("leastvalue").textContent = least.toFixed(2);
  visible = [];
  for (let place = 0; place < count; place++) {
    if (from !== "" && given[place] !== Number(from)) continue;
    if (to !== "" && suggested[place] !== Number(to)) continue;
    if (only && place >= data.suspects) continue;
    if (suspicion[place] < least) continue;
    if (words && !data.ids[place].toLowerCase().includes(words)) continue;
    const one = decisions.get(place);
    if (state && (one ? one.kind : "none") !== state) continue;
    visible.push(place);
  }
  rowOf = new Map(visible.map((place, at) => [place, at]));
  $("shown").textContent = visible.length === count ? `· all ${number.format(count)}` : `· ${number.format(visible.length)} of ${number.format(count)}`;
  list.scrollTop = 0;
  select(rowOf.has(selected) ? selected : visible.length ? visible[0] : -1);
}

function showConfusions() {
  const { confused_classes: confused, duplicate_classes: duplicates } = data.estimate;
  const labelOf = new Map(data.classes.map((name, index) => [name, index]));
  const parts = [];
  if (confused.length) parts.push(element("p", "", "Classes mistaken for one another (given → looks like, estimated samples):"));
  for (const pair of confused) {
    const button = element("button");
    button.type = "button";
    button.append(label(pair.given), " → ", label(pair.true), ` ${number.format(pair.samples)}`);
    button.addEventListener("click", () => {
      $("given").value = String(labelOf.get(pair.given));
      $("suggested").value = String(labelOf.get(pair.true));
      // A class that is suggested for no sample is not among the choices.
      if ($("suggested").selectedIndex < 0) $("suggested").value = "";
      filter();
    });
    parts.push(button);
  }
  if (duplicates.length) parts.push(element("p", "", "These look like one class under two names; consider merging them:"));
  for (const pair of duplicates) {
    const made = element("span");
    made.append(label(pair.given), " and ", label(pair.true), ` (${Math.round(100 * pair.share)} % of both)`);
    parts.push(made);
  }
  $("confusions").replaceChildren(...parts);
}

// --- the page -------------------------------------------------------------------------------------------------------

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function status(text) {
  $("status").textContent = text;
}

function showAll() {
  $("progress").textContent = `${number.format(decisions.size)} decided`;
  $("save").disabled = !decisions.size;
  draw();
  showDetail();
}

function help() {
  $("keys").hidden = !$("keys").hidden;
  $("help").setAttribute("aria-expanded", String(!$("keys").hidden));
  draw();
}

const KEYS = {
  ArrowDown: () => step(1),
  ArrowUp: () => step(-1),
  PageDown: () => step(Math.max(1, Math.floor(list.clientHeight / ROW) - 1)),
  PageUp: () => step(-Math.max(1, Math.floor(list.clientHeight / ROW) - 1)),
  Home: () => step(-count),
  End: () => step(count),
  k: () => choose("keep"),
  r: () => !$("relabel").disabled && choose("relabel", suggested[selected]),
  d: () => choose("drop"),
  l: () => $("choice").focus(),
  u: undo,
  n: nextUndecided,
  s: () => decisions.size && save(),
  "?": help,
};

document.addEventListener("keydown", (event) => {
  const inField = event.target.matches("input, select, textarea");
  if (event.key === "Escape" && inField) return list.focus();
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !inField) {
    event.preventDefault();
    return undo();
  }
  if (inField || event.ctrlKey || event.metaKey || event.altKey) return;
  // The text of a sample and the filters scroll by themselves.
  if (event.target.closest("#text, #filters summary") && event.key.length > 1) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

$("choice").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("other").requestSubmit();
});
$("other").addEventListener("submit", (event) => {
  event.preventDefault();
  choose("relabel", Number($("choice").value));
  list.focus();
});
$("form").addEventListener("submit", (event) => event.preventDefault());
// Not every browser sends both of a list of choices.
for (const type of ["input", "change"]) $("form").addEventListener(type, filter);
$("clear").addEventListener("click", () => ($("form").reset(), filter()));
$("keep").addEventListener("click", () => choose("keep"));
$("relabel").addEventListener("click", () => choose("relabel", suggested[selected]));
$("drop").addEventListener("click", () => choose("drop"));
$("undo").addEventListener("click", undo);
$("save").addEventListener("click", save);
$("help").addEventListener("click", help);
$("load").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) load($("file").files[0]);
  $("file").value = "";
});
list.addEventListener("scroll", () => requestAnimationFrame(draw));
new ResizeObserver(() => draw()).observe(list);
// Another tab with the same page.
window.addEventListener("storage", (event) => {
  if (event.key !== STORE) return;
  readFromBrowser();
  past.length = 0;
  showAll();
});
window.addEventListener("beforeunload", (event) => {
  if (unsaved && !stored) event.preventDefault();
});

const { wrong, low, high } = data.estimate;
$("summary").textContent = `${number.format(count)} samples, about ${number.format(wrong)} wrong labels (${number.format(low)} to ${number.format(high)}), by ${data.score}`;
options($("given"), "any", counted(given));
options($("suggested"), "any", counted(suggested));
options($("choice"), "", data.classes.map((_, index) => [index, null]));
showConfusions();
readFromBrowser();
filter();
showAll();
list.focus();
