// A sweep: the question once for each factor of the scales, as a grid.

import { ApiError } from "./api.js";
import { Answer } from "./answers.js";
import { byId, make, named, say, short } from "./dom.js";
import { steeringOf, times } from "./request.js";

// Requests at once, and cells of a grid.
const AT_ONCE = 4;
const MOST = 100;

/** The rows of a grid: a name, and the directions that its factors multiply. */
function rowsOf(directions, vary) {
  if (vary === "alone" && directions.length > 1) return directions.map((each) => [each.name, [each]]);
  return [[directions.map((each) => each.name).join(" + "), directions]];
}

/** Asks for every cell and shows the answers as they come. `bodyFor` makes a body from a steering. */
export async function sweep(directions, reads, extra, factors, vary, bodyFor, use, signal) {
  const rows = rowsOf(directions, vary);
  if (rows.length * factors.length > MOST) throw new Error(`A sweep has at most ${MOST} answers; these would be ${rows.length * factors.length}`);
  const cells = [];
  const lines = rows.map(([name, chosen]) => {
    const line = factors.map((factor) => {
      const steering = chosen.map((each) => times(each, factor));
      const cell = new Cell(() => use(steering));
      cells.push([cell, bodyFor(steeringOf(steering, reads, extra))]);
      return cell.element;
    });
    const scales = chosen.map((each) => short(each.strength ?? each.scale)).join(", ");
    return make("tr", {}, make("th", { scope: "row" }, named(name), make("div", { class: "note" }, `× ${scales}`)), ...line);
  });
  const head = make("tr", {}, make("th", { scope: "col" }, "Directions"), ...factors.map((each) => make("th", { scope: "col" }, `×${short(each)}`)));
  byId("grid").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines)));
  byId("grid").hidden = false;
  const waiting = cells.values();
  let [whole, done] = [0, 0];
  const worker = async () => {
    for (const [cell, body] of waiting) {
      if (await cell.ask(body, signal)) whole += 1;
      done += 1;
      say(`${done} of ${cells.length} answers of the sweep`);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  say(`The sweep has ${whole} of ${cells.length} answers`);
}

/** One answer of a grid. */
class Cell {
  constructor(use) {
    this.text = make("div", { class: "cell" }, make("span", { class: "note" }, "waits"));
    this.note = make("div", { class: "note" });
    this.button = make("button", { type: "button", hidden: true, on: { click: use } }, "Use");
    this.element = make("td", {}, this.text, this.note, this.button);
  }

  async ask(body, signal) {
    if (signal.aborted) {
      this.text.textContent = "Stopped.";
      return false;
    }
    const answer = new Answer();
    let [shown, frame] = [0, undefined];
    const draw = () => {
      frame = undefined;
      if (!shown) this.text.replaceChildren();
      this.text.append(answer.text.slice(shown));
      shown = answer.text.length;
    };
    try {
      await answer.ask(body, false, signal, () => (frame ??= requestAnimationFrame(draw)));
      return true;
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof ApiError)) console.error(error);
      this.error = make("p", { class: "error" }, error.name === "AbortError" ? "Stopped." : error.message);
      return false;
    } finally {
      if (frame !== undefined) cancelAnimationFrame(frame);
      draw();
      if (this.error) this.text.append(this.error);
      const { receipt, usage } = answer;
      const parts = [receipt ? `dose ${short(receipt.dose)}` : "", receipt && receipt.dose_factor !== 1 ? `scales × ${short(receipt.dose_factor)}` : "", usage ? `${usage.completion_tokens} tokens` : ""];
      this.note.textContent = parts.filter(Boolean).join(" · ");
      this.button.hidden = Boolean(this.error);
    }
  }
}
