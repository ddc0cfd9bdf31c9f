// The stream of events: by fetch, because EventSource cannot send a token, and says nothing of why it failed.

const KEYS = { node: () => "", devices: (of) => of.name, stages: (of) => of.id, leases: (of) => of.id,
  peers: (of) => of.address, refusals: (of) => of.id };
const SILENCE = 45000; // ms; the daemon says something every 15 s
const MOST_BUFFERED = 4 << 20;
const HIDDEN_FOR = 15000; // ms after which a page that nobody sees stops listening

const empty = () => Object.fromEntries(Object.keys(KEYS).map((kind) => [kind, new Map()]));
let there = empty();

function apply(store, event) {
  for (const kind of Object.keys(KEYS)) {
    for (const record of event[kind] ?? []) store[kind].set(KEYS[kind](record), record);
    for (const key of event.gone?.[kind] ?? []) store[kind].delete(key);
  }
}

const token = {
  get: () => sessionStorage.getItem("weightd-token"),
  set: (value) => (value ? sessionStorage.setItem("weightd-token", value) : sessionStorage.removeItem("weightd-token")),
};

// Calls `told(whole)` when `there` has changed, and `linked(state, words)` with live, waiting, token or hidden.
function listen(told, linked) {
  let stop = new AbortController();
  let tries = 0;
  let timer = 0;

  function heard(name, event, coming) {
    clockOffset = event.at - Date.now() / 1000;
    if (name === "snapshot") {
      const store = event.part ? coming : empty();
      apply(store, event);
      if (event.more) return store;
      there = store;
      tries = 0;
      linked("live", "Live");
      told(true);
    } else if (name === "changes") {
      apply(there, event);
      if (!event.more) told(false);
    }
    return null;
  }

  async function read(body, control) {
    const decoder = new TextDecoder();
    let silence = 0;
    let buffer = "";
    let coming = null;
    const reader = body.getReader();
    try {
      for (;;) {
        clearTimeout(silence);
        silence = setTimeout(() => control.abort(), SILENCE);
        const { done, value } = await reader.read();
        if (done) return;
        buffer += decoder.decode(value, { stream: true });
        if (buffer.length > MOST_BUFFERED) throw new Error("an event without an end");
        const blocks = buffer.split("\n\n");
        buffer = blocks.pop();
        for (const block of blocks) {
          let name = "";
          let data = "";
          for (const line of block.split("\n")) {
            if (line.startsWith("event: ")) name = line.slice(7);
            if (line.startsWith("data: ")) data += line.slice(6);
          }
          if (data) coming = heard(name, JSON.parse(data), coming);
        }
      }
    } finally {
      clearTimeout(silence);
    }
  }

  async function connect() {
    clearTimeout(timer);
    stop.abort();
    const control = (stop = new AbortController());
    let why = "";
    try {
      const headers = { Accept: "text/event-stream" };
      if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
      const answer = await fetch("v1/events", { headers, cache: "no-store", credentials: "omit", signal: control.signal });
      if (answer.status === 401) {
        const refused = token.get() !== null;
        token.set(null);
        there = empty(); // what a token showed is not shown without one
        linked("token", refused ? "That token was not accepted" : "A token is needed");
        return;
      }
      if (answer.ok) await read(answer.body, control);
      else why = (await answer.json()).detail ?? `HTTP ${answer.status}`;
    } catch (error) {
      if (control !== stop) return; // another connection has taken its place
      why = error instanceof SyntaxError ? "an answer that is not weightd's" : "";
    }
    if (control !== stop) return;
    linked("waiting", why ? `Reconnecting: ${why}` : "Reconnecting");
    const pause = Math.min(5000, 200 * 2 ** tries++) * (0.75 + Math.random() / 2);
    timer = setTimeout(connect, pause);
  }

  let hiding = 0;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hiding);
    if (!document.hidden && stop.signal.aborted) connect();
    if (document.hidden) {
      hiding = setTimeout(() => {
        clearTimeout(timer);
        stop.abort();
        stop = new AbortController();
        stop.abort();
        linked("hidden", "Paused while hidden");
      }, HIDDEN_FOR);
    }
  });
  connect();
  return connect;
}
