// The server's API: every call goes to the server of this page, with the key that was entered.

/** The server as this page was reached: whatever stands before /steering/ stands before /v1/ too. */
export const ROOT = new URL("..", document.baseURI);

const MEANING = {
  401: "The server asks for an API key, or does not know this one",
  403: "This API key may not do this",
  404: "The server has no such route or model",
  429: "The server is busy",
  503: "The server is busy",
};
// Of what no JSON is.
const SHOWN = 500;

/** An answer that is an error; `status` is null where there was no answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = "";

export function setKey(value) {
  if ([...value].some((each) => each < "!" || each > "\u00ff")) {
    throw new ApiError(null, "An API key has no blanks, and only characters of Latin-1");
  }
  key = value;
}

export const hasKey = () => key !== "";

/** The message of an error's body: OpenAI's form, vLLM's own, or FastAPI's. */
export function messageOf(text) {
  try {
    const found = JSON.parse(text);
    const error = found.error ?? found.detail ?? found.message;
    const message = typeof error === "string" ? error : error?.message;
    return typeof message === "string" ? message : JSON.stringify(found).slice(0, SHOWN);
  } catch {
    return text.slice(0, SHOWN);
  }
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { ...options, headers, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(null, "The server does not answer");
  }
  if (!response.ok) {
    const known = MEANING[response.status];
    const message = messageOf(await response.text().catch(() => ""));
    throw new ApiError(response.status, `${response.status}: ${known ? `${known}. ` : ""}${message}`);
  }
  return response;
}

/** The JSON of a GET. */
export async function get(path) {
  const response = await ask(path, { method: "GET" });
  try {
    return await response.json();
  } catch {
    throw new ApiError(response.status, `${path} is not JSON`);
  }
}

/** The chunks of a streamed answer, as they come; an answer that ends early throws. */
export async function* stream(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      const lines = (rest + (done ? "\n" : value)).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = parse(data);
        if (chunk.error) throw new ApiError(chunk.error.code ?? null, `The server ended the answer: ${messageOf(data)}`);
        yield chunk;
      }
      if (done) throw new ApiError(null, "The connection ended before the answer did");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(null, "The connection ended before the answer did");
  }
}

function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk !== null && typeof chunk === "object") return chunk;
  } catch {
    // Said below.
  }
  throw new ApiError(null, `The server sent a chunk that is not an object: ${data.slice(0, SHOWN)}`);
}
