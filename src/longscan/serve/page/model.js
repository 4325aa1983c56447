// What the page knows of the models that are served, and which of them it asks.

import { json } from "./api.js";

const STORE = "longscan.model"; // of this tab: another one may ask another model

let chosen = sessionStorage.getItem(STORE);
let found = null;

/** Return the description of the model that is asked; see GET /v1/inspect. */
export function model() {
  found ??= describe().catch((error) => {
    found = null;
    throw error;
  });
  return found;
}

async function describe() {
  const usual = await json("v1/inspect");
  if (chosen !== null && !usual.models.includes(chosen)) {
    sessionStorage.removeItem(STORE); // the server has other adapters now
    chosen = null;
  }
  return chosen === null || chosen === usual.model
    ? usual
    : json(`v1/inspect?model=${encodeURIComponent(chosen)}`);
}

/** Ask another model from now on. */
export function choose(name) {
  chosen = name;
  found = null;
  sessionStorage.setItem(STORE, name);
}

/** Return the fields of a request that say which model it is for; without them, the server decides. */
export const asked = () => (chosen === null ? {} : { model: chosen });
