// Requests: from what was set to a body, and from a body to curl, OpenAI Python and JSON. No part of the page.

import { unturned } from "./dom.js";

/** Layers as a person writes them, "1-3, 7", as a list; null for none. */
export function parseLayers(text) {
  if (!text.trim()) return null;
  const layers = [];
  for (const part of text.split(",")) {
    const found = /^\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?$/.exec(part);
    const [first, last] = found ? [Number(found[1]), Number(found[2] ?? found[1])] : [1, 0];
    if (first > last) throw new Error('Layers are numbers and ranges, such as "1-3, 7"');
    for (let layer = first; layer <= last; layer += 1) layers.push(layer);
  }
  return [...new Set(layers)].sort((a, b) => a - b);
}

/** A list of layers as a person writes it. */
export function showLayers(layers) {
  const runs = [];
  for (const layer of layers) {
    const run = runs.at(-1);
    if (run && layer === run[1] + 1) run[1] = layer;
    else runs.push([layer, layer]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
}

/** Positions in one line. */
export const showPositions = (positions) => (typeof positions === "string" ? positions : JSON.stringify(positions));

/** The factors of a sweep. */
export function parseFactors(text) {
  const factors = text.split(",").filter((part) => part.trim()).map(Number);
  if (!factors.length || !factors.every(Number.isFinite)) throw new Error('Factors are numbers, such as "0, 0.5, 1"');
  return [...new Set(factors)];
}

/** The steering of a request; null where nothing steers and nothing is read. */
export function steeringOf(directions, reads, extra = {}) {
  const steering = { ...(directions.length ? { directions } : {}), ...(reads.length ? { read: reads } : {}), ...extra };
  return Object.keys(steering).length ? steering : null;
}

/** A direction with its scale or strength multiplied. */
export function times(direction, factor) {
  const field = "strength" in direction ? "strength" : "scale";
  return { ...direction, [field]: Number((direction[field] * factor).toPrecision(12)) };
}

/** The body of a request. `steering` is an object, "none", or null for a model that steers by itself. */
export function bodyOf(settings, steering) {
  const chat = settings.route === "chat";
  const messages = [{ role: "user", content: settings.question }];
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  return {
    model: settings.model,
    ...(chat ? { messages } : { prompt: settings.question }),
    max_tokens: settings.maxTokens,
    temperature: settings.temperature,
    seed: settings.seed,
    ...(steering === null ? {} : { steering }),
  };
}

/** What the page adds to a body, to show tokens and scores while they come; the answer is the same. */
export function streamed(body, tokens) {
  const more = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  return { ...body, ...more, ...(tokens ? { logprobs: "messages" in body ? true : 0 } : {}) };
}

export const pathOf = (body) => ("messages" in body ? "v1/chat/completions" : "v1/completions");

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The request for a shell. */
export function asCurl(body, root, hasKey) {
  const lines = [`curl ${quoted(new URL(pathOf(body), root).href)}`, `-H 'Content-Type: application/json'`];
  if (hasKey) lines.push(`-H "Authorization: Bearer $API_KEY"`);
  lines.push(`-d ${quoted(unturned(JSON.stringify(body, null, 1)))}`);
  return lines.join(" \\\n  ");
}

/** A JSON value as Python writes it. */
export function asPython(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return unturned(JSON.stringify(value));
  const isList = Array.isArray(value);
  const parts = isList
    ? value.map((each) => asPython(each, inner))
    : Object.entries(value).map(([name, each]) => `${asPython(name)}: ${asPython(each, inner)}`);
  const [open, close] = isList ? "[]" : "{}";
  const line = open + parts.join(", ") + close;
  if (indent.length + line.length <= 80 && !line.includes("\n")) return line;
  return `${open}\n${parts.map((part) => `${inner}${part},\n`).join("")}${indent}${close}`;
}

/** The request for the OpenAI client of Python. */
export function asOpenAI(body, root, hasKey) {
  const { steering, ...fields } = body;
  const chat = "messages" in body;
  const given = Object.entries(fields).map(([name, value]) => `    ${name}=${asPython(value, "    ")},`);
  if (steering !== undefined) given.push(`    extra_body=${asPython({ steering }, "    ")},`);
  const key = hasKey ? 'os.environ["API_KEY"]' : '"none"';
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", root).href)}, api_key=${key})`,
    `response = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...given,
    ")",
    `print(response.choices[0].${chat ? "message.content" : "text"})`,
    'print((response.model_extra or {}).get("steering"))',
  ].join("\n");
}

/** The request as JSON alone. */
export const asJson = (body) => unturned(JSON.stringify(body, null, 2));
