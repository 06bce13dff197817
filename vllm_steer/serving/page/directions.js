// The directions: what the packs have, with what was measured of them, and the rows of those that steer.

import { byId, field, make, mark, named, select, short } from "./dom.js";
import { parseLayers, showLayers, showPositions } from "./request.js";

// Of a list that is searched.
const SHOWN = 60;
const OPS = {
  add: "add: h + ε·a",
  ablate: "ablate: removes the share ε of the component",
  clamp: "clamp: sets the component to ε",
  rotate: "rotate: by ε degrees in a plane",
  angle: "angle: to ε degrees in a plane",
  affine: "affine: ε·a times what another direction reads",
};
const PLANES = ["rotate", "angle"];
// How far a slider goes beyond what text is fluent at, or beyond the default where nothing was measured.
const BEYOND = 1.5;
const UNMEASURED = 2;

export const opOf = (direction) => direction.form?.op ?? "add";
export const steeredLayers = (direction) => direction.default_layers ?? direction.layers;

/** What was measured of a direction, in one line. */
export function measured(direction) {
  const { calibration, safe_scale: safe, probe } = direction;
  const parts = [`default ${short(direction.default_scale)}`];
  if (safe !== null) parts.push(`fluent to ${short(safe)}`);
  if (calibration) {
    parts.push(`measured ${calibration.scales.map(short).join(" to ")}`);
    if (!calibration.steers) parts.push("found not to steer");
  } else {
    parts.push("not calibrated");
  }
  if (opOf(direction) !== "add") parts.push(opOf(direction));
  if (probe) parts.push(`probe at layer ${probe.layer}`);
  return parts.join(" · ");
}

/** All directions of the packs, by full name. */
export function byName(packs) {
  const found = new Map();
  for (const pack of packs) {
    for (const direction of pack.directions) found.set(`${pack.name}/${direction.name}`, { ...direction, pack });
  }
  return found;
}

/** Lists the directions that match what is looked for, with buttons. */
export function showFound(known, text, actions) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const matching = [...known].filter(([name]) => words.every((word) => name.toLowerCase().includes(word)));
  const packs = Map.groupBy(matching.slice(0, SHOWN), ([, direction]) => direction.pack);
  const groups = [...packs].map(([pack, directions]) =>
    make(
      "section",
      { "aria-label": pack.name },
      make("h3", {}, named(pack.name), " ", make("span", { class: "note" }, named(pack.model))),
      make("ul", {}, ...directions.map(([name, direction]) => entry(name, direction, actions))),
    ),
  );
  byId("found").replaceChildren(...groups);
  const shown = Math.min(matching.length, SHOWN);
  const count = matching.length === 1 ? "1 direction" : `${matching.length} directions`;
  byId("found-note").textContent = shown < matching.length ? `${count}; the first ${shown} are shown.` : `${count}.`;
}

function entry(name, direction, actions) {
  const buttons = actions.map(([verb, label, act]) =>
    make("button", { type: "button", "aria-label": `${label} ${name}`, on: { click: () => act(name) } }, verb),
  );
  const about = make("div", {}, named(direction.name), make("div", { class: "note" }, measured(direction)));
  return make("li", {}, about, make("div", { class: "buttons" }, ...buttons));
}

/** One direction that steers: its row, and the part of the request that it stands for. */
export class Row {
  /**
   * @param name `pack/direction`.
   * @param known All directions by name.
   * @param limits What requests may ask for.
   * @param given The direction as a request has it.
   * @param changed Called after every change.
   * @param removed Called when it is to go.
   */
  constructor(name, known, limits, given, changed, removed) {
    Object.assign(this, { name, known, limits, changed, direction: known.get(name) });
    this.unit = "strength" in given ? "strength" : "scale";
    const { calibration, default_scale: scale } = this.direction;
    const title = make("h3", {}, named(name));
    const remove = make("button", { type: "button", "aria-label": `Remove ${name}`, on: { click: removed } }, "Remove");
    this.element = make("li", { class: "row" }, make("div", { class: "head" }, title, remove));
    this.value = make("input", { type: "number", step: "any", on: { input: () => this.typed() } });
    this.slider = make("input", { type: "range", step: "any", on: { input: () => this.slid() } });
    this.marks = make("div", { class: "marks", "aria-hidden": "true" });
    this.about = make("p", { class: "note", id: `about-${crypto.getRandomValues(new Uint32Array(1))[0]}` });
    this.slider.setAttribute("aria-label", `Scale of ${name}`);
    this.slider.setAttribute("aria-describedby", this.about.id);
    this.unitSelect = select([["scale", "Scale ε"], ["strength", "Strength"]], this.unit, () => this.changeUnit());
    const unit = field("Unit", this.unitSelect);
    unit.hidden = !calibration || !scale;
    this.element.append(
      make("div", { class: "slide" }, make("div", { class: "track" }, this.slider, this.marks), field("Value", this.value), unit),
      this.about,
      this.more(given),
    );
    this.value.value = short(given[this.unit] ?? scale);
    this.draw();
  }

  /** Layers, positions, schedule and form. */
  more(given) {
    const { direction, limits } = this;
    const change = () => this.draw(true);
    const on = { input: change };
    this.layers = make("input", { placeholder: `default: ${showLayers(steeredLayers(direction))}`, value: given.layers ? showLayers(given.layers) : null, autocomplete: "off", on });
    const plain = ["all", "prompt", "generated", "last_prompt"];
    const positions = given.positions === undefined ? "" : plain.includes(given.positions) ? given.positions : "custom";
    const choices = [["", `default: ${showPositions(direction.positions)}`], ...plain.map((each) => [each, each]), ["custom", "ranges …"]];
    this.positions = select(choices, positions, change);
    this.ranges = make("input", { value: positions === "custom" ? JSON.stringify(given.positions) : '{"generated": [0, 32]}', autocomplete: "off", spellcheck: "false", on });
    this.rangesField = field("Ranges, as JSON", this.ranges, "wide");
    const { start = 1, end = 0, tokens = 32, shape = given.schedule ? "linear" : "" } = given.schedule ?? {};
    this.shape = select([["", "constant"], ["linear", "linear"], ["exponential", "exponential"]], shape, change);
    this.factors = [["First factor", start], ["Last factor", end], ["Tokens until then", tokens]].map(([label, value]) => {
      const control = make("input", { type: "number", step: "any", value: String(value), on });
      return { control, field: field(label, control) };
    });
    const ops = limits.ops === "affine" ? Object.keys(OPS) : ["add"];
    this.op = select([["", `default: ${opOf(direction)}`], ...ops.map((op) => [op, OPS[op]])], given.op ?? "", change);
    const names = (value) => make("input", { list: "names", value: value ?? null, autocomplete: "off", spellcheck: "false", on });
    this.plane = names(given.plane);
    this.read = names(given.read);
    this.bias = make("input", { type: "number", step: "any", value: given.bias ?? null, on });
    this.gate = names(given.gate?.direction);
    this.gateAt = make("input", { value: given.gate ? (given.gate.at ?? String(given.gate.above)) : null, placeholder: "1.5, or fpr=0.01", autocomplete: "off", on });
    const norm = given.restore_norm;
    this.norm = select([["", "default"], ["true", "yes"], ["false", "no"]], norm === undefined ? "" : String(norm), change);
    this.forms = {
      plane: field("Plane: with direction", this.plane, "wide"),
      read: field("Read direction", this.read, "wide"),
      bias: field("Bias", this.bias),
      gate: field("Only where this direction fires", this.gate, "wide"),
      gateAt: field("Above", this.gateAt),
      norm: field("Restore the norm", this.norm),
    };
    const affine = limits.ops === "affine";
    return make(
      "details",
      {},
      make("summary", {}, "Layers, positions, schedule, form"),
      make(
        "div",
        { class: "fields" },
        field("Layers", this.layers, "wide"),
        field("Positions", this.positions, "wide"),
        this.rangesField,
        field("Schedule", this.shape, "wide"),
        ...this.factors.map((each) => each.field),
        affine ? field("Form", this.op, "wide") : null,
        ...(affine ? Object.values(this.forms) : []),
      ),
      affine ? null : make("p", { class: "note" }, "Other forms than addition need a server started with --steering-ops affine."),
    );
  }

  /** The form that acts: the one chosen, or the direction's own. */
  get acting() {
    return this.op.value || opOf(this.direction);
  }

  /** Whether what was measured holds: the form and the layers are the calibrated ones. */
  get asMeasured() {
    return this.acting === opOf(this.direction) && !this.layers.value.trim();
  }

  /** Ends of the slider, in the unit that is chosen. */
  get ends() {
    const { default_scale: scale, safe_scale: safe } = this.direction;
    const unit = this.unit === "strength" ? scale : 1;
    if (PLANES.includes(this.acting)) return [-180 / Math.abs(unit), 180 / Math.abs(unit)];
    if (this.acting === "ablate" && this.unit === "scale") return [0, 2];
    const farthest = this.asMeasured && safe !== null ? BEYOND * safe : UNMEASURED * (Math.abs(scale) || 1);
    const end = Math.max(farthest, BEYOND * Math.abs(scale)) / Math.abs(unit);
    return [-end, end];
  }

  typed() {
    this.slider.value = this.value.value;
    this.draw(true);
  }

  slid() {
    const [low, high] = this.ends;
    // Two hundred steps from end to end, and zero is one of them.
    const step = (high - low) / 200;
    this.value.value = short(Math.round(Number(this.slider.value) / step) * step);
    this.draw(true);
  }

  changeUnit() {
    const { default_scale: scale } = this.direction;
    const value = Number(this.value.value);
    this.unit = this.unitSelect.value;
    this.value.value = short(this.unit === "strength" ? value / scale : value * scale);
    this.draw(true);
  }

  draw(report = false) {
    const { direction } = this;
    const [low, high] = this.ends;
    this.slider.min = low;
    this.slider.max = high;
    this.slider.value = this.value.value;
    this.drawMarks(low, high);
    const valid = this.asMeasured ? "" : " What was measured is for other layers or another form.";
    this.about.textContent = `${measured(direction)}.${valid}`;
    this.rangesField.hidden = this.positions.value !== "custom";
    for (const each of this.factors) each.field.hidden = !this.shape.value;
    const op = this.op.value;
    this.forms.plane.hidden = !PLANES.includes(op);
    this.forms.read.hidden = this.forms.bias.hidden = op !== "affine";
    this.forms.gateAt.hidden = !this.gate.value;
    this.slider.setAttribute("aria-valuetext", `${this.value.value} ${this.unit}`);
    if (report) this.changed();
  }

  /** Marks the range at which text was fluent, the range that was measured, zero and the default. */
  drawMarks(low, high) {
    const { default_scale: scale, safe_scale: safe, calibration } = this.direction;
    const unit = this.unit === "strength" ? scale : 1;
    const place = (value) => Math.min(Math.max((value / unit - low) / (high - low), 0), 1);
    const band = (className, first, last) => {
      const made = make("span", { class: className });
      const [from, to] = [place(first), place(last)].sort((a, b) => a - b);
      made.style.setProperty("--from", from);
      made.style.setProperty("--to", to);
      return made;
    };
    const parts = [];
    if (this.asMeasured) {
      const side = Math.sign(scale) || 1;
      if (calibration) parts.push(band("range tried", ...calibration.scales));
      if (safe !== null) parts.push(band("range fluent", 0, side * safe));
      parts.push(band("tick default", scale, scale));
    }
    parts.push(band("tick", 0, 0));
    this.marks.replaceChildren(...parts);
  }

  /** The direction as the request has it. Raises an Error that names what cannot be used. */
  get choice() {
    const wrong = [];
    const read = (control, parse) => {
      try {
        const value = parse(control.value);
        mark(control, "");
        return value;
      } catch (error) {
        mark(control, error.message);
        wrong.push(error.message);
        return undefined;
      }
    };
    const number = (text) => {
      if (!text.trim() || !Number.isFinite(Number(text))) throw new Error("This is no number");
      return Number(text);
    };
    const json = (text) => {
      try {
        return JSON.parse(text);
      } catch {
        throw new Error('Ranges are JSON, such as [[-4, null]] or {"generated": [0, 32]}');
      }
    };
    const found = { name: this.name, [this.unit]: read(this.value, number) };
    const layers = read(this.layers, parseLayers);
    if (layers) found.layers = layers;
    const positions = this.positions.value;
    if (positions) found.positions = positions === "custom" ? read(this.ranges, json) : positions;
    if (this.shape.value) {
      const [start, end, tokens] = this.factors.map((each) => read(each.control, number));
      found.schedule = { start, end, tokens, shape: this.shape.value };
    }
    const op = this.op.value;
    if (op) found.op = op;
    if (PLANES.includes(op) && this.plane.value) found.plane = this.plane.value;
    if (op === "affine" && this.read.value) found.read = this.read.value;
    if (op === "affine" && this.bias.value) found.bias = read(this.bias, number);
    if (this.norm.value) found.restore_norm = this.norm.value === "true";
    if (this.gate.value) {
      const at = this.gateAt.value.trim();
      found.gate = { direction: this.gate.value, ...(at.startsWith("fpr=") ? { at } : { above: read(this.gateAt, number) }) };
    }
    if (wrong.length) throw new Error(`${this.name}: ${wrong[0]}`);
    return found;
  }
}
