// The state of the page is its address: every view and every image has a link.

import { Grid, drawBoxes, element } from "./grid.js";

const $ = id => document.getElementById(id);
const FIELDS = ["view", "layer", "class", "low", "high", "decision", "status", "who", "order",
  "text", "sql"];
const LAYERS = ["model", "label", "person", "other"];
const LAYER_NAMES = { model: "the model", label: "the label version", person: "people",
  other: "the other run" };
const VIEW_NAMES = { twins: "near duplicates", disagreement: "worst disagreements",
  agreement: "low agreement", people: "answered by people", changed: "changed by people",
  warnings: "warnings", failed: "not labelled", empty: "without boxes" };
const ORDERS = { "": "as listed", best: "highest score", worst: "lowest score",
  boxes: "most boxes" };
const state = { about: null, total: 0, chosen: new Set(), at: null, image: null,
  shown: new Set(["model"]), asked: 0 };

async function ask(path, options = {}) {
  const reply = await fetch(path, { credentials: "same-origin", ...options });
  const told = await reply.json();
  if (!reply.ok) throw new Error(told.error ?? reply.statusText);
  return told;
}

function say(text, good = false) {
  $("said").textContent = text;
  $("said").classList.toggle("good", good);
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => {
    const one = element("option", "", text);
    one.value = value;
    return one;
  }));
}

function query() {
  const told = new URLSearchParams();
  for (const name of FIELDS) if ($(name).value !== "") told.set(name, $(name).value);
  told.set("shown", $("layer").value || (state.about.layers.label ? "label" : "model"));
  return told;
}

function address(number = null) {
  const told = query();
  told.delete("shown");
  if (number !== null) told.set("image", number);
  return `#${told}`;
}

function restore() {
  const told = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) $(name).value = told.get(name) ?? "";
  for (const name of FIELDS)  // a value that this run has not: not a filter nobody sees
    if ($(name).tagName === "SELECT" && $(name).selectedIndex < 0) $(name).value = "";
  $("sqlbox").open = $("sql").value !== "";
  return told.has("image") ? Number(told.get("image")) : null;
}

async function load(open = null) {
  const asked = ++state.asked;
  say("");
  try {
    const told = query();
    told.set("limit", 120);
    const began = performance.now();
    const found = await ask(`/api/images?${told}`);
    if (asked !== state.asked) return;
    $("table").hidden = !found.columns;
    $("scroll").hidden = Boolean(found.columns);
    if (found.columns) return showTable(found);
    state.total = found.total;
    $("legend").textContent = `drawn and counted: all boxes of ${LAYER_NAMES[told.get("shown")]}`
      + "; thin: score below 0.5; dashed: ignored; best: the model's highest score";
    const took = performance.now() - began;
    $("count").textContent = `${found.total.toLocaleString("en")} images (${took.toFixed(0)} ms)`;
    grid.reset(found.total, found.images);
    if (open !== null) await show(open);
  } catch (error) {
    if (asked === state.asked) say(error.message);
  }
}

function showTable(found) {
  const head = element("tr");
  found.columns.forEach(name => head.append(element("th", "", name)));
  const lines = found.rows.map(row => {
    const line = element("tr");
    row.forEach(value => line.append(element("td", "", value === null ? "" : String(value))));
    return line;
  });
  $("table").replaceChildren(head, ...lines);
  $("count").textContent = `${found.rows.length} rows`;
  $("legend").textContent = "";
}

function changed() {
  history.replaceState(null, "", address());
  load();
}

const colour = name => state.about.colours.get(name) ?? "#888";

const grid = new Grid($("scroll"), $("sheet"), {
  fetchRows: async (first, count) => {
    const told = query();
    told.set("offset", first);
    told.set("limit", count);
    try { return (await ask(`/api/images?${told}`)).images; } catch (error) { say(error.message); }
    return null;
  },
  open: number => show(number),
  choose: (n, on) => { on ? state.chosen.add(n) : state.chosen.delete(n); counted(); },
  isChosen: n => state.chosen.has(n),
  colour: name => colour(name),
});

function counted() {
  const many = state.chosen.size;
  $("chosen").textContent = many ? `${many.toLocaleString("en")} selected` : "";
  $("send").disabled = $("none").disabled = !many;
}

async function show(number) {
  if (number < 0 || number >= state.total) return;
  const told = query();
  told.set("offset", number);
  told.set("limit", 1);
  try {
    const [row] = (await ask(`/api/images?${told}`)).images;
    if (!row) return;
    state.image = await ask(`/api/image/${row.n}`);
    state.at = number;
  } catch (error) { return say(error.message); }
  history.replaceState(null, "", address(number));
  $("link").href = address(number);
  $("viewer").hidden = false;
  $("title").textContent = state.image.image_id;
  facts();
  layers();
  const large = $("large");
  large.onload = large.onerror = draw;
  large.src = `/image/${state.image.n}.jpg`;
  draw();
}

function facts() {
  const image = state.image;
  const told = {
    size: `${image.width} × ${image.height}`, status: image.status, error: image.error,
    warning: image.warning, decision: image.source && `${image.source}: ${image.accepted} accepted, `
      + `${image.ignored} ignored, ${image.rejected} rejected`,
    annotator: image.annotator,
    answers: image.answers.map(a => a.skipped ? `${a.who} (skipped)` : a.who).join(", "),
    agreement: image.agreement?.toFixed(2), disagreement: image.disagreement?.toFixed(2),
    shard: image.shard_id, sha256: image.sha256,
  };
  $("facts").replaceChildren(...Object.entries(told).filter(([, value]) => value)
    .flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}

function layers() {
  const there = new Set(state.image.boxes.map(box => box.layer));
  const lines = LAYERS.map((layer, at) => {
    const line = element("label"), box = element("input");
    box.type = "checkbox";
    box.checked = state.shown.has(layer);
    box.disabled = !there.has(layer);
    box.addEventListener("change", () => toggle(layer, box.checked));
    line.append(box, ` ${at + 1} ${LAYER_NAMES[layer]} `, element("br"));
    return line;
  });
  $("layers").replaceChildren(element("legend", "", "Boxes (keys 1 to 4)"), ...lines);
  const shown = state.image.boxes.filter(box => state.shown.has(box.layer));
  const rows = shown.map(box => {
    const row = element("tr"), name = element("td");
    const swatch = element("span", "swatch");
    swatch.style.background = colour(box.class);
    name.append(swatch, box.class);
    const score = box.score === null ? "" : box.score.toFixed(2);
    row.append(name, element("td", "", score), element("td", "", box.decision ?? box.layer),
      element("td", "", box.who ?? ""));
    return row;
  });
  $("boxes").replaceChildren(...rows);
}

function toggle(layer, on) {
  on ? state.shown.add(layer) : state.shown.delete(layer);
  layers();
  draw();
}

function draw() {
  const image = state.image, stage = $("stage");
  if (!image || $("viewer").hidden || !image.width) return;
  const scale = Math.min(stage.clientWidth / image.width, stage.clientHeight / image.height);
  const width = image.width * scale, height = image.height * scale;
  for (const one of [$("large"), $("overlay")]) {
    one.style.left = `${(stage.clientWidth - width) / 2}px`;
    one.style.top = `${(stage.clientHeight - height) / 2}px`;
    one.style.width = `${width}px`;
    one.style.height = `${height}px`;
  }
  const shown = image.boxes.filter(box => state.shown.has(box.layer));
  drawBoxes($("overlay"), shown, width, height, scale, colour, true);
}

function close() {
  $("viewer").hidden = true;
  state.image = null;
  history.replaceState(null, "", address());
  $("scroll").focus();
}

async function send() {
  const images = [...state.chosen];
  if (!images.length) return;
  if (!confirm(`Put ${images.length} images into the review queue of this run?`)) return;
  try {
    const told = await ask("/api/review", { method: "POST",
      headers: { "content-type": "application/json", "x-labelfleet": "browse" },
      body: JSON.stringify({ images }) });
    const rest = told.known ? `, ${told.known} were queued or answered before` : "";
    const bad = told.unreadable ? `, ${told.unreadable} have no pixels` : "";
    say(`${told.queued} queued${rest}${bad}; next: labelfleet review push`, true);
    state.chosen.clear();
    counted();
    grid.refresh();
  } catch (error) { say(error.message); }
}

async function selectAll() {
  const most = state.about.most_sent;
  for (let first = 0; first < Math.min(state.total, most); first += 500) {
    const told = query();
    told.set("offset", first);
    told.set("limit", 500);
    for (const row of (await ask(`/api/images?${told}`)).images) state.chosen.add(row.n);
  }
  counted();
  grid.refresh();
}

function key(event) {
  if (event.target.matches("input, textarea, select") && event.key !== "Escape") return;
  if ($("viewer").hidden) return;
  const at = Number(event.key) - 1;
  if (event.key === "ArrowRight" || event.key === "j") show(state.at + 1);
  else if (event.key === "ArrowLeft" || event.key === "k") show(state.at - 1);
  else if (event.key === "Escape") close();
  else if (at >= 0 && at < LAYERS.length) toggle(LAYERS[at], !state.shown.has(LAYERS[at]));
  else return;
  event.preventDefault();
}

async function start() {
  const about = await ask("/api/about");
  about.colours = new Map(about.classes.map(one => [one.name, one.colour]));
  state.about = about;
  document.title = `${about.name} · labelfleet`;
  $("name").textContent = about.name;
  const beside = about.other ? `, beside ${about.other}` : "";
  $("version").textContent = (about.version ? `labels ${about.version}` : "no labels yet") + beside;
  options($("view"), [["", "all images"], ...about.views.map(v => [v, VIEW_NAMES[v] ?? v])]);
  options($("layer"), [["", "any"], ...LAYERS.filter(layer => about.layers[layer])
    .map(layer => [layer, LAYER_NAMES[layer]])]);
  options($("class"), [["", "any"], ...about.classes.map(one => [one.name, one.name])]);
  options($("decision"), [["", "any"], ...["accepted", "ignored", "human"].map(d => [d, d])]);
  options($("status"), [["", "any"],
    ...about.status.map(one => [one.status, `${one.status} (${one.images})`])]);
  options($("who"), [["", "any"], ...about.people.map(who => [who, who])]);
  options($("order"), Object.entries(ORDERS));
  for (const layer of LAYERS) if (about.layers[layer]) state.shown.add(layer);
  if (about.layers.label) state.shown.delete("model");
  for (const name of FIELDS) if (name !== "sql") $(name).addEventListener("change", changed);
  $("text").addEventListener("search", changed);
  $("sql").addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) changed();
  });
  $("clear").addEventListener("click", () => {
    for (const name of FIELDS) $(name).value = "";
    changed();
  });
  $("all").addEventListener("click", selectAll);
  $("none").addEventListener("click", () => { state.chosen.clear(); counted(); grid.refresh(); });
  $("send").addEventListener("click", send);
  $("previous").addEventListener("click", () => show(state.at - 1));
  $("next").addEventListener("click", () => show(state.at + 1));
  $("close").addEventListener("click", close);
  window.addEventListener("keydown", key);
  window.addEventListener("resize", draw);
  window.addEventListener("hashchange", () => load(restore()));
  counted();
  await load(restore());
}

start().catch(error => say(error.message));
