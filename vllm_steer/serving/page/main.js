// The page: what was set, who is asked, and what is shown.

import { ApiError, ROOT, get, hasKey, setKey } from "./api.js";
import { Pane } from "./answers.js";
import { Row, byName, measured, showFound } from "./directions.js";
import { byId, make, mark, named, say, short } from "./dom.js";
import { Legend, ReadRow } from "./reads.js";
import { asCurl, asJson, asOpenAI, bodyOf, parseFactors, steeringOf } from "./request.js";
import { sweep } from "./sweep.js";

const DEFAULT_QUESTION = "How was your day?";
// Of an alias, the fields that are no row.
const ROWS = ["directions", "read", "layers", "positions", "schedule"];
// Every request begins without a default that the server may have.
const NONE = "none";

const state = { known: new Map(), aliases: new Map(), limits: null, rows: [], reads: [], running: null, sweeping: null };
const legend = new Legend(byId("legend"), (but) => Object.values(panes).forEach((pane) => pane !== but && pane.colour()));
const panes = { plain: new Pane("Plain", legend), steered: new Pane("Steered", legend) };

/** Shows what went wrong, until something else is done. */
function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

async function load() {
  notice("");
  setReady(false);
  try {
    const [packs, aliases, limits, models] = await Promise.all(["v1/steering/packs", "v1/steering/aliases", "v1/steering/limits", "v1/models"].map(get));
    state.known = byName(packs.packs);
    state.aliases = new Map(aliases.aliases.map((each) => [each.name, each.steering]));
    state.limits = limits;
    showModels(models.data);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    state.known = new Map();
    state.aliases = new Map();
    showModels([]);
    notice(error.message);
    if (error.status === 401) byId("key").focus();
  }
  dropUnknown();
  byId("names").replaceChildren();
  byId("reads-part").hidden = !state.limits?.reads;
  find();
  changed();
  setReady(Boolean(state.limits) && byId("model").options.length > 0);
  if (!byId("notice").textContent) say(`${state.known.size} directions`);
}

function setReady(ready) {
  state.ready = ready;
  setBusy();
}

function setBusy() {
  byId("ask").disabled = !state.ready || Boolean(state.running);
  byId("stop").disabled = !state.running;
  byId("sweep").disabled = !state.ready || Boolean(state.sweeping);
  byId("sweep-stop").disabled = !state.sweeping;
}

function showModels(cards) {
  const before = byId("model").value;
  byId("model").replaceChildren(...cards.map((card) => {
    const alias = card.owned_by === "vllm-steer" ? card.id.slice(card.id.lastIndexOf(":") + 1) : "";
    const option = make("option", { value: card.id }, alias ? `${card.id} (alias)` : card.id);
    if (alias) Object.assign(option.dataset, { alias, parent: card.parent });
    return option;
  }));
  if (cards.some((card) => card.id === before)) byId("model").value = before;
}

const chosenModel = () => byId("model").selectedOptions[0];

/** Rows of directions that the key does not show (any more) go. */
function dropUnknown() {
  const gone = [...state.rows, ...state.reads].filter((row) => !state.known.has(row.name)).map((row) => row.name);
  state.rows = state.rows.filter((row) => state.known.has(row.name));
  state.reads = state.reads.filter((row) => state.known.has(row.name));
  showRows();
  if (gone.length && !byId("notice").textContent) notice(`Not shown to this key, and so removed: ${gone.join(", ")}`);
}

function showRows() {
  byId("chosen").replaceChildren(...state.rows.map((row) => row.element));
  byId("marks-note").hidden = !state.rows.length;
  byId("reads").replaceChildren(...state.reads.map((row) => row.element));
  const { reads = 0 } = state.limits ?? {};
  byId("reads-note").textContent = state.reads.length ? `This server reads up to ${reads} directions per request.` : `Tokens are coloured by the scores of a direction that is read: up to ${reads} per request.`;
}

function find() {
  const actions = [["Steer", "Steer with", (name) => addRow({ name }, true)]];
  if (state.limits?.reads) actions.push(["Read", "Read", (name) => addRead({ name })]);
  showFound(state.known, byId("find").value, actions);
}

/** Adds a direction that steers. */
function addRow(given, focus = false) {
  const row = new Row(given.name, state.known, state.limits, given, changed, () => {
    state.rows = state.rows.filter((each) => each !== row);
    showRows();
    changed();
    byId("find").focus();
  });
  row.element.addEventListener("toggle", fillNames, { capture: true });
  state.rows.push(row);
  showRows();
  changed();
  if (focus) {
    row.slider.focus();
    say(`${given.name} steers`);
  }
}

/** The names for the fields of forms, once they are needed. */
function fillNames() {
  if (!byId("names").childElementCount) byId("names").append(...[...state.known.keys()].map((name) => make("option", { value: name })));
}

function addRead(given) {
  const row = new ReadRow(given.name, state.known, given, changed, () => {
    state.reads = state.reads.filter((each) => each !== row);
    showRows();
    changed();
    byId("find").focus();
  });
  state.reads.push(row);
  showRows();
  changed();
  say(`${given.name} is read`);
}

/** The steering of an alias, and the way to change a copy of it. */
function showAlias() {
  const { alias, parent } = chosenModel()?.dataset ?? {};
  byId("alias").hidden = !alias;
  byId("steering").hidden = Boolean(alias);
  if (!alias) return;
  const steering = state.aliases.get(alias) ?? {};
  const lines = (steering.directions ?? []).map((each) => {
    const direction = state.known.get(fullName(each.name));
    const given = each.strength === undefined ? `ε ${short(each.scale ?? direction?.default_scale ?? NaN)}` : `strength ${short(each.strength)}`;
    return make("li", {}, named(each.name), ` ${given}`, direction ? make("div", { class: "note" }, measured(direction)) : null);
  });
  const copy = make("button", { type: "button", on: { click: () => copyAlias(steering, parent) } }, "Change a copy");
  const json = make("pre", { tabindex: "0", "aria-label": "Steering of the alias" }, JSON.stringify(steering, null, 1));
  byId("alias").replaceChildren(
    make("p", {}, "This model is an alias, which steers by itself:"),
    make("ul", { class: "terms" }, ...lines),
    make("details", {}, make("summary", {}, "Its steering as JSON"), json),
    copy,
  );
}

/** `pack/direction` for a direction that an alias names alone; as it is where that is none, or several. */
function fullName(name) {
  const found = name.includes("/") ? [name] : [...state.known.keys()].filter((each) => each.endsWith(`/${name}`));
  return found.length === 1 ? found[0] : name;
}

function copyAlias(steering, parent) {
  const names = [...(steering.directions ?? []), ...(steering.read ?? [])].map((each) => fullName(each.name));
  const unknown = names.filter((name) => !state.known.has(name));
  if (unknown.length) {
    notice(`The alias names directions that are none or several here: ${unknown.join(", ")}`);
    return;
  }
  const shared = Object.fromEntries(["layers", "positions", "schedule"].filter((each) => each in steering).map((each) => [each, steering[each]]));
  state.rows = [];
  state.reads = [];
  for (const each of steering.directions ?? []) addRow({ ...shared, ...each, name: fullName(each.name) });
  for (const each of steering.read ?? []) addRead({ ...each, name: fullName(each.name) });
  const others = Object.fromEntries(Object.entries(steering).filter(([name]) => !ROWS.includes(name)));
  byId("extra").value = Object.keys(others).length ? JSON.stringify(others) : "";
  byId("model").value = parent;
  changed();
  byId("ask").focus();
}

function numberOf(id, whole = false) {
  const control = byId(id);
  const value = Number(control.value);
  const fault = control.value.trim() === "" || !Number.isFinite(value) ? "This is no number" : whole && !Number.isSafeInteger(value) ? "This is no whole number" : "";
  mark(control, fault);
  if (fault) throw new Error(`${control.labels[0].textContent}: ${fault}`);
  return value;
}

function settings() {
  return {
    route: byId("route").value,
    model: byId("model").value,
    system: byId("route").value === "chat" ? byId("system").value : "",
    question: byId("question").value,
    maxTokens: numberOf("max-tokens", true),
    temperature: numberOf("temperature"),
    seed: numberOf("seed", true),
  };
}

function extraFields() {
  const text = byId("extra").value.trim();
  let found = {};
  let fault = "";
  try {
    found = text ? JSON.parse(text) : {};
    if (found === null || typeof found !== "object" || Array.isArray(found)) fault = "This is no JSON object";
  } catch {
    fault = "This is no JSON object";
  }
  mark(byId("extra"), fault);
  if (fault) throw new Error(`Other fields of the steering: ${fault}`);
  return found;
}

/** The two requests: plain, and steered or null. Raises an Error where something cannot be used. */
function bodies() {
  const set = settings();
  const { alias, parent } = chosenModel()?.dataset ?? {};
  if (alias) return { plain: bodyOf({ ...set, model: parent }, NONE), steered: bodyOf(set, null), reads: [] };
  const directions = state.rows.map((row) => row.choice);
  const reads = state.reads.map((row) => row.choice);
  const steering = steeringOf(directions, reads, extraFields());
  return {
    plain: bodyOf(set, steeringOf([], reads) ?? NONE),
    steered: directions.length && steering ? bodyOf(set, steering) : null,
    reads,
  };
}

/** After any change: what is shown of the request follows. */
function changed() {
  showAlias();
  byId("steering").hidden = Boolean(chosenModel()?.dataset.alias);
  try {
    const made = bodies();
    const body = made[document.querySelector("[name=which]:checked").value];
    const format = { curl: asCurl, python: asOpenAI, json: asJson }[document.querySelector("[name=format]:checked").value];
    byId("snippet").textContent = body ? format(body, ROOT, hasKey()) : "No direction steers yet.";
    byId("copy").disabled = !body;
  } catch (error) {
    byId("snippet").textContent = error.message;
    byId("copy").disabled = true;
  }
}

async function ask() {
  if (byId("ask").disabled) return;
  notice("");
  let made;
  try {
    made = bodies();
  } catch (error) {
    notice(error.message);
    return;
  }
  state.running = new AbortController();
  setBusy();
  legend.show(made.reads);
  say("Asked");
  const asked = [panes.plain.ask(made.plain, state.running.signal)];
  if (made.steered) asked.push(panes.steered.ask(made.steered, state.running.signal));
  else panes.steered.clear("No direction steers yet: choose one under Directions.");
  const whole = await Promise.all(asked);
  state.running = null;
  setBusy();
  say(whole.every(Boolean) ? "The answers are complete" : "Not all answers are complete");
}

async function runSweep() {
  notice("");
  let factors;
  let made;
  try {
    factors = parseFactors(byId("factors").value);
    made = bodies();
    mark(byId("factors"), "");
  } catch (error) {
    if (!factors) mark(byId("factors"), error.message);
    notice(error.message);
    return;
  }
  if (!made.steered?.steering) {
    notice("A sweep needs a direction that steers; of an alias, change a copy");
    return;
  }
  const { directions, read = [], ...extra } = made.steered.steering;
  state.sweeping = new AbortController();
  setBusy();
  const use = (chosen) => {
    for (const each of chosen) {
      const row = state.rows.find((one) => one.name === each.name);
      if (!row) continue;
      row.value.value = short(each[row.unit] ?? row.value.value);
      row.draw(true);
    }
    byId("ask").focus();
    say("The scales are those of this answer");
  };
  try {
    const bodyFor = (steering) => ({ ...made.steered, steering });
    await sweep(directions, read, extra, factors, byId("vary").value, bodyFor, use, state.sweeping.signal);
  } catch (error) {
    notice(error.message);
  }
  state.sweeping = null;
  setBusy();
}

async function copy() {
  const text = byId("snippet").textContent;
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
    byId("copy").textContent = "Copied";
    setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
  } catch {
    // Browsers let no page without TLS write there.
    getSelection().selectAllChildren(byId("snippet"));
    byId("snippet").focus();
    say("The request is selected: Ctrl+C copies it");
  }
}

function useKey() {
  try {
    setKey(byId("key").value.trim());
  } catch (error) {
    notice(error.message);
    return;
  }
  load();
}

byId("panes").append(panes.plain.element, panes.steered.element);
byId("question").value = DEFAULT_QUESTION;
for (const id of ["question", "system", "max-tokens", "temperature", "seed", "extra"]) byId(id).addEventListener("input", changed);
for (const id of ["model", "route", "which", "format"]) byId(id).addEventListener("change", changed);
byId("find").addEventListener("input", find);
byId("ask").addEventListener("click", ask);
byId("stop").addEventListener("click", () => state.running?.abort());
byId("sweep").addEventListener("click", runSweep);
byId("sweep-stop").addEventListener("click", () => state.sweeping?.abort());
byId("copy").addEventListener("click", copy);
byId("use-key").addEventListener("click", useKey);
byId("key").addEventListener("keydown", (event) => event.key === "Enter" && useKey());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
await load();
performance.mark("interactive");
