// A conversation with its branches: a tree of messages, of which one path is shown.

const STORE = "longscan.conversation"; // of this tab; reloading it loses nothing
const ROLES = new Set(["system", "user", "assistant"]);
const MOST = 1000; // messages of an import

/** A message: its role and content, the answers to it, and which of them is on the path. */
class Message {
  constructor(role, content, parent) {
    Object.assign(this, {
      role,
      content,
      parent,
      children: [],
      chosen: 0,
      reasoning: "",
      stats: null,
      error: null,
    });
    this.running = false;
  }

  toJSON() {
    const { role, content, reasoning, chosen, stats, error, children } = this;
    return { role, content, reasoning, chosen, stats, error, children };
  }
}

export class Conversation {
  constructor() {
    this.root = new Message(null, "", null);
    this.leaf = null; // where the next message goes, if not at the end of the path
  }

  /** The messages from the first to the last one shown. */
  get path() {
    const found = [];
    for (let one = this.root; one !== this.leaf && one.children.length;) {
      one = one.children[one.chosen];
      found.push(one);
    }
    return found;
  }

  get end() {
    return this.path.at(-1) ?? this.root;
  }

  /** Append a message to the path, or to another one as a new branch; return it. */
  add(role, content, parent = this.end) {
    const message = new Message(role, content, parent);
    parent.chosen = parent.children.push(message) - 1;
    this.leaf = null;
    return message;
  }

  /** Show another branch. */
  choose(message) {
    message.parent.chosen = message.parent.children.indexOf(message);
    this.leaf = null;
  }

  /** Let the next message follow this one, beside what follows already. */
  fork(message) {
    this.leaf = message.children.length ? message : null;
  }

  /** What the server gets to answer the end of the path, or another message. */
  messages(system, until = this.end) {
    const found = [];
    for (let one = until; one.role; one = one.parent) {
      const { role, content, reasoning } = one;
      found.push(reasoning ? { role, content, reasoning_content: reasoning } : { role, content });
    }
    if (system.trim()) found.push({ role: "system", content: system });
    return found.reverse();
  }

  store() {
    try {
      sessionStorage.setItem(STORE, JSON.stringify(this.root));
    } catch {
      sessionStorage.removeItem(STORE); // too long for it
    }
  }

  static stored() {
    const conversation = new Conversation();
    try {
      const root = JSON.parse(sessionStorage.getItem(STORE));
      if (root) conversation.root = revive(root, null);
    } catch {
      sessionStorage.removeItem(STORE);
    }
    return conversation;
  }

  /** Return the messages shown as a file, as `longscan chat --file NAME` reads it. */
  export(system) {
    return JSON.stringify({ format: "longscan chat 1", messages: this.messages(system) }, null, 1);
  }

  /** Return a conversation and its system prompt from such a file; it throws if that is none. */
  static import(text) {
    const given = JSON.parse(text);
    const list = Array.isArray(given) ? given : given?.messages;
    const fits =
      Array.isArray(list) &&
      list.length <= MOST &&
      list.every((one) => ROLES.has(one?.role) && typeof one.content === "string");
    if (!fits) throw new TypeError("messages");
    const conversation = new Conversation();
    let system = "";
    for (const { role, content, reasoning_content: reasoning } of list) {
      if (role === "system") system = system ? `${system}\n\n${content}` : content;
      else conversation.add(role, content).reasoning = typeof reasoning === "string" ? reasoning : "";
    }
    return { conversation, system };
  }
}

function revive(given, parent) {
  const message = new Message(given.role, given.content, parent);
  Object.assign(message, {
    reasoning: given.reasoning,
    chosen: given.chosen,
    stats: given.stats,
    error: given.error,
  });
  message.children = given.children.map((child) => revive(child, message));
  return message;
}
