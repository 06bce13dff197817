// Small helpers for the document. Text becomes text nodes, never markup.

/** Makes an element. `attributes` holds attributes, `on` its listeners; false and null leave an attribute out. */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  const { on = {}, ...rest } = attributes;
  for (const [name, value] of Object.entries(rest)) {
    if (value !== false && value !== null && value !== undefined) {
      made.setAttribute(name, value === true ? "" : value);
    }
  }
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Text in which characters that turn the direction of writing around are seen, as JSON and Python escape them. */
export const unturned = (text) => text.replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (each) => `\\u${each.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** A name that someone chose: its direction of writing must not reorder what stands beside it. */
export const named = (text) => make("bdi", { class: "name" }, unturned(text));

let made = 0;

/** A control with its label; `attributes` are those of the control. */
export function field(label, control, className = "") {
  if (!control.id) control.id = `control-${(made += 1)}`;
  return make("div", { class: className }, make("label", { for: control.id }, label), control);
}

/** A select of `[value, text]` pairs. */
export function select(pairs, value, on) {
  const options = pairs.map(([each, text]) => make("option", { value: each }, text));
  const control = make("select", { on: { change: on } }, ...options);
  control.value = value;
  return control;
}

/** A number without digits that nobody set. */
export const short = (value) => String(Number(Number(value).toPrecision(6)));

/** Shows a message to people who look, and to people who listen. */
export function say(text) {
  byId("status").textContent = text;
}

/** Says that the value of a control cannot be used, or no longer. */
export function mark(control, fault) {
  control.setCustomValidity(fault);
  control.setAttribute("aria-invalid", String(fault !== ""));
  let note = control.parentElement.querySelector(":scope > .fault");
  if (!note && fault) {
    note = make("p", { class: "fault", id: `${control.id}-fault` });
    control.after(note);
    control.setAttribute("aria-errormessage", note.id);
  }
  if (note) {
    note.textContent = fault;
    note.hidden = !fault;
  }
}
