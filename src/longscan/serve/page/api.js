// Requests to the server: JSON, and streams of server-sent events.

import { t } from "./words.js";

const KEY = "longscan.key"; // of this tab only, and gone with it

/** What the server answers instead of what was asked for. */
export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let ask = async () => null;

/** Set what asks for an API key: it returns one, or null. */
export function setAsk(function_) {
  ask = function_;
}

let asking = null; // one question at a time

/** Return the response of the server; a missing key is asked for. */
export async function request(path, body, signal) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    const given =
      body === undefined
        ? { headers, signal }
        : { method: "POST", headers, signal, body: JSON.stringify(body) };
    const response = await fetch(path, { ...given, cache: "no-store" }).catch((error) => {
      throw error.name === "AbortError" ? error : new ApiError(0, t("net.down"));
    });
    if (response.ok) return response;
    const found = await response.json().catch(() => ({}));
    const error = found.error ?? { message: `${response.status} ${response.statusText}` };
    if (response.status === 401) {
      if (sessionStorage.getItem(KEY) !== key) continue; // another request has got one meanwhile
      asking ??= ask(Boolean(key)).finally(() => {
        asking = null;
      });
      const answer = await asking;
      if (answer) {
        sessionStorage.setItem(KEY, answer);
        continue;
      }
    }
    throw new ApiError(response.status, error.message, error.code);
  }
}

/** Return the JSON of an answer. */
export async function json(path, body, signal) {
  return (await request(path, body, signal)).json();
}

/** Yield the chunks of a stream. */
export async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new ApiError(0, t("net.cut"));
      });
      if (done) throw new ApiError(0, t("net.cut")); // a whole stream says that it ends
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue; // a comment keeps the line open
        if (part === "data: [DONE]") return;
        const chunk = JSON.parse(part.slice(6));
        if (chunk.error) throw new ApiError(500, chunk.error.message, chunk.error.code);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
