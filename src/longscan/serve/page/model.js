// What the page knows of the model that is served.

import { json } from "./api.js";

let found = null;

/** Return the description of the model; see GET /v1/inspect. */
export function model() {
  found ??= json("v1/inspect").catch((error) => {
    found = null;
    throw error;
  });
  return found;
}
