// Answers: streamed text, tokens coloured by scores, the dose and the receipt.

import { ApiError, stream } from "./api.js";
import { make, named, short } from "./dom.js";
import { pathOf, showLayers, streamed } from "./request.js";

// More tokens than these are shown as text: each would be an element.
const COLOURED = 4000;
// Of a table of scores.
const LISTED = 400;

/** One answer as it comes: its text, tokens, scores and receipt. Not shown by itself. */
export class Answer {
  constructor() {
    this.text = "";
    this.thoughts = "";
    this.tokens = [];
    // By read, then by position from the first token of the prompt.
    this.scores = [];
    this.receipt = null;
    this.usage = null;
    this.reason = null;
    this.decoder = new TextDecoder();
  }

  /** Asks, and calls `changed` after every chunk. */
  async ask(body, wantsTokens, signal, changed) {
    const started = performance.now();
    for await (const chunk of stream(pathOf(body), streamed(body, wantsTokens), signal)) {
      this.add(chunk);
      this.seconds = (performance.now() - started) / 1000;
      changed();
    }
  }

  add(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    if (Array.isArray(chunk.steering)) this.receipt = chunk.steering[0] ?? null;
    for (const { start, scores } of chunk.steering_scores ?? []) {
      scores.forEach((row, read) => {
        this.scores[read] ??= [];
        row.forEach((score, index) => (this.scores[read][start + index] = score));
      });
    }
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.text += choice.delta?.content ?? choice.text ?? "";
    this.thoughts += choice.delta?.reasoning ?? choice.delta?.reasoning_content ?? "";
    for (const each of choice.logprobs?.content ?? []) {
      this.tokens.push(each.bytes ? this.decoder.decode(new Uint8Array(each.bytes), { stream: true }) : each.token);
    }
    this.tokens.push(...(choice.logprobs?.tokens ?? []));
    if (choice.finish_reason) this.reason = [choice.finish_reason, choice.stop_reason].filter((each) => each !== null && each !== undefined);
  }

  /** Score of the token with an index, of a read. */
  score(index, read) {
    return this.scores[read]?.[(this.usage?.prompt_tokens ?? NaN) + index];
  }
}

/** Shows an answer beside another. */
export class Pane {
  constructor(title, legend) {
    this.legend = legend;
    this.note = make("span", { class: "note" });
    this.text = make("div", { class: "answer", tabindex: "0", role: "region", "aria-label": `${title} answer` });
    this.error = make("p", { class: "error", role: "alert", hidden: true });
    this.after = make("div", { class: "after" });
    this.element = make("article", { class: "pane" }, make("h3", {}, title, " ", this.note), this.text, this.error, this.after);
    this.title = title;
    this.clear("Nothing was asked yet.");
  }

  clear(text) {
    this.answer = null;
    this.note.textContent = "";
    this.text.replaceChildren(make("span", { class: "note" }, text));
    this.text.classList.remove("busy");
    this.error.hidden = true;
    this.after.replaceChildren();
  }

  /** Asks and shows what comes; returns whether the answer is whole. */
  async ask(body, signal) {
    const reads = body.steering?.read ?? [];
    this.clear("");
    this.text.replaceChildren();
    this.answer = new Answer();
    this.shown = { text: 0, tokens: 0 };
    this.spans = [];
    this.text.classList.add("busy");
    try {
      await this.answer.ask(body, reads.length > 0, signal, () => this.later());
      return true;
    } catch (error) {
      this.fail(error);
      return false;
    } finally {
      this.text.classList.remove("busy");
      this.draw();
      this.end();
    }
  }

  fail(error) {
    const stopped = error.name === "AbortError";
    if (!stopped && !(error instanceof ApiError)) console.error(error);
    this.error.textContent = stopped ? "Stopped." : error.message;
    this.error.hidden = false;
  }

  /** Draws with the next frame, however many chunks come until then. */
  later() {
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    if (this.frame !== undefined) cancelAnimationFrame(this.frame);
    this.frame = undefined;
    const { answer, shown } = this;
    if (!answer) return;
    if (answer.tokens.length) this.drawTokens();
    else {
      const whole = answer.thoughts + answer.text;
      this.text.append(whole.slice(shown.text));
      shown.text = whole.length;
    }
    const { usage, seconds } = answer;
    const parts = [];
    if (usage?.completion_tokens) parts.push(`${usage.completion_tokens} tokens`);
    if (seconds) parts.push(`${seconds.toFixed(1)} s`);
    if (answer.reason) parts.push(answer.reason.join(": "));
    this.note.textContent = parts.join(" · ");
  }

  drawTokens() {
    const { answer, shown, spans } = this;
    const end = Math.min(answer.tokens.length, COLOURED);
    for (; shown.tokens < end; shown.tokens += 1) {
      const span = make("span", { class: "token" }, answer.tokens[shown.tokens]);
      spans.push(span);
      this.text.append(span);
    }
    if (answer.tokens.length > shown.tokens) {
      this.text.append(answer.tokens.slice(shown.tokens).join(""));
      shown.tokens = answer.tokens.length;
    }
    this.colour();
  }

  /** Colours the tokens; a score that widens the scale changes the colours of the other answer too. */
  colour() {
    const { answer, legend, spans = [] } = this;
    if (!answer?.usage) return;
    let wider = false;
    const scores = spans.map((_, index) => answer.score(index, legend.index));
    for (const score of scores) wider = (typeof score === "number" && legend.widen(score)) || wider;
    scores.forEach((score, index) => legend.colour(spans[index], score));
    if (wider) legend.changed(this);
  }

  end() {
    const { answer, spans } = this;
    const last = spans.at(-1);
    // A stop token is generated and read, but is no part of the text.
    if (last && answer.text && answer.tokens.join("") === answer.text + answer.tokens.at(-1)) last.classList.add("special");
    if (!answer.text && !answer.thoughts && !answer.tokens.length && this.error.hidden) {
      this.text.replaceChildren(make("span", { class: "note" }, "The answer is empty."));
    }
    this.after.replaceChildren(...[answer.receipt ? receiptOf(answer.receipt) : null, scoreTable(answer)].filter(Boolean));
  }
}

/** A receipt: the dose, what steered, and all of it as JSON. */
export function receiptOf(receipt) {
  const facts = [];
  const { dose, dose_factor: factor, directions, tokens_steered: count } = receipt;
  if (directions.length) {
    facts.push(doseOf(dose));
    if (factor !== 1) facts.push(make("p", { class: "warning" }, `The server multiplied all scales by ${short(factor)}, as its policy says.`));
    facts.push(
      make(
        "ul",
        { class: "terms" },
        ...directions.map((each) =>
          make("li", {}, named(each.name), ` ${each.op ?? "add"} ε ${short(each.scale)}`, each.strength === undefined ? "" : ` (strength ${short(each.strength)})`, `, layers ${showLayers(each.layers)}`, each.schedule ? `, ${each.schedule.shape} schedule` : ""),
        ),
      ),
      make("p", { class: "note" }, `${count} tokens steered.`),
    );
  }
  for (const read of receipt.reads ?? []) {
    const { mean, max, share_above: share } = read.answers[0] ?? {};
    const text = mean === undefined ? "no scores" : `mean ${short(mean)}, max ${short(max)}${share === undefined ? "" : `, ${(100 * share).toFixed(0)} % above`}`;
    facts.push(make("p", { class: "note" }, named(read.name), ` ${read.when}: ${text}`));
  }
  const json = make("pre", { tabindex: "0", "aria-label": "Receipt as JSON" });
  const whole = make("details", { on: { toggle: () => (json.textContent ||= JSON.stringify(receipt, null, 1)) } }, make("summary", {}, "Receipt"), json);
  return make("div", { class: "receipt" }, ...facts, whole);
}

/** The dose beside 1, the largest at which text was fluent. */
function doseOf(dose) {
  const meter = make("meter", { min: "0", max: String(Math.max(2, dose)), high: "1", optimum: "0", value: String(dose), "aria-label": "Dose" });
  return make("p", { class: "dose" }, "Dose ", make("strong", {}, short(dose)), " ", meter, dose > 1 ? make("span", { class: "warning" }, " above 1, where text tends to break") : " of 1");
}

/** The tokens and their scores for who does not see the colours. */
function scoreTable(answer) {
  if (!answer.tokens.length || !answer.receipt?.reads) return null;
  const reads = answer.receipt.reads;
  const rows = () =>
    answer.tokens.slice(0, LISTED).map((token, index) =>
      make("tr", {}, make("th", { scope: "row" }, named(JSON.stringify(token))), ...reads.map((_, read) => {
        const score = answer.score(index, read);
        return make("td", {}, score === null || score === undefined ? "none" : short(score));
      })),
    );
  const head = make("tr", {}, make("th", { scope: "col" }, "Token"), ...reads.map((read) => make("th", { scope: "col" }, named(`${read.name} ${read.when}`))));
  const body = make("tbody");
  const table = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores by token" }, make("table", {}, make("thead", {}, head), body));
  const more = answer.tokens.length > LISTED ? make("p", { class: "note" }, `The first ${LISTED} of ${answer.tokens.length} tokens.`) : null;
  return make("details", { on: { toggle: () => body.childElementCount || body.append(...rows()) } }, make("summary", {}, "Scores by token"), more, table);
}
