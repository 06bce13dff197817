// The directions that are read, and the colours of tokens by their scores.

import { field, make, mark, named, select, short } from "./dom.js";
import { parseLayers, showLayers } from "./request.js";
import { steeredLayers } from "./directions.js";

/** One direction that is read: its row, and the part of the request that it stands for. */
export class ReadRow {
  constructor(name, known, given, changed, removed) {
    const on = { input: changed };
    const direction = known.get(name);
    const layers = direction ? showLayers(steeredLayers(direction)) : "";
    const remove = make("button", { type: "button", "aria-label": `Remove ${name}, which is read`, on: { click: removed } }, "Remove");
    Object.assign(this, { name, at: given.at });
    this.layers = make("input", { placeholder: layers && `default: ${layers}`, value: given.layers ? showLayers(given.layers) : null, autocomplete: "off", on });
    this.when = select([["before", "before the change"], ["after", "after the change"]], given.when ?? "before", changed);
    this.above = make("input", { type: "number", step: "any", placeholder: "none", value: given.above ?? null, on });
    this.element = make(
      "li",
      { class: "row" },
      make("div", { class: "head" }, make("h4", {}, named(name)), remove),
      make("div", { class: "fields" }, field("Layers", this.layers), field("When", this.when), field("Threshold", this.above)),
    );
  }

  /** The read as the request has it. Raises an Error that names what cannot be used. */
  get choice() {
    let layers;
    try {
      layers = parseLayers(this.layers.value);
      mark(this.layers, "");
    } catch (error) {
      mark(this.layers, error.message);
      throw new Error(`${this.name}: ${error.message}`);
    }
    const above = this.above.value === "" ? {} : { above: Number(this.above.value) };
    const at = this.at === undefined ? {} : { at: this.at };
    return { name: this.name, ...(layers ? { layers } : {}), ...at, when: this.when.value, ...above };
  }
}

/** What the colours mean, and by which read the tokens are coloured. */
export class Legend {
  constructor(element, changed) {
    Object.assign(this, { element, changed, index: 0, greatest: 0, reads: [] });
  }

  show(reads) {
    this.reads = reads;
    this.index = Math.min(this.index, Math.max(0, reads.length - 1));
    this.greatest = 0;
    this.element.hidden = !reads.length;
    if (!reads.length) return;
    const pairs = reads.map((read, index) => [String(index), `${read.name}, ${read.when ?? "before"}`]);
    const choice = select(pairs, String(this.index), () => {
      this.index = Number(choice.value);
      this.greatest = 0;
      this.changed();
    });
    this.low = make("span");
    this.high = make("span");
    const scale = make("span", { class: "colours" }, this.low, make("span", { class: "bar", "aria-hidden": "true" }), this.high);
    this.element.replaceChildren(field("Tokens coloured by", choice), scale);
    this.drawEnds();
  }

  /** Takes a score into account; returns whether the colours of the others change. */
  widen(score) {
    if (!(Math.abs(score) > this.greatest)) return false;
    this.greatest = Math.abs(score);
    this.drawEnds();
    return true;
  }

  drawEnds() {
    this.low.textContent = short(-this.greatest);
    this.high.textContent = short(this.greatest);
  }

  /** Colours the element of a token. */
  colour(element, score) {
    if (score === null || score === undefined) {
      delete element.dataset.sign;
      element.removeAttribute("title");
      element.classList.remove("above");
      return;
    }
    const share = this.greatest ? Math.abs(score) / this.greatest : 0;
    element.dataset.sign = score < 0 ? "low" : "high";
    element.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
    element.title = `score ${short(score)}`;
    const above = this.reads[this.index]?.above;
    element.classList.toggle("above", above !== undefined && score > above);
  }
}
