// The page: draws what there is when it has changed, and says in words what an eye would see.

let before = new Map(); // stage → state, as it was drawn last
let pid = null;
let version = null; // of the daemon that the page came from
let drawing = 0;
const news = [];
let telling = 0;

function tell(words) {
  news.push(words);
  telling ||= setTimeout(() => {
    // Of many at once, a screen reader is told how many.
    write(byId("news"), news.length > 3 ? `${news.length} changes, the last: ${news.at(-1)}` : news.join("; "));
    news.length = 0;
    telling = 0;
  }, 400);
}

function compare(whole) {
  const about = there.node.get("");
  if (!about) return;
  if (whole && pid !== null && pid !== about.node.pid) {
    const held = [...there.stages.values()].filter((stage) => stage.state === "ready").length;
    tell(`A new daemon runs, with pid ${about.node.pid}; ${count(held, "stage")} ready`);
    if (about.version !== version) tell(`it is weightd ${about.version}: load the page again`);
  } else if (!whole) {
    for (const stage of there.stages.values()) {
      if (before.get(stage.id) === stage.state) continue;
      tell(`${base(stage.model)} is ${stage.state}${stage.error ? `: ${stage.error.code}` : ""}`);
    }
  }
  pid = about.node.pid;
  version ??= about.version;
  before = new Map([...there.stages.values()].map((stage) => [stage.id, stage.state]));
}

function total([title]) {
  const figure = element("dd");
  const root = element("div", {}, element("dt", {}, title), figure);
  return {
    root,
    update([, text, warn]) {
      write(figure, text);
      mark(root, "class", warn ? "warning" : null);
    },
  };
}

function draw() {
  const about = there.node.get("");
  if (!about) return;
  const { stages, node } = about;
  write(byId("about"), `${about.version} · pid ${node.pid} · default device ${node.default_device} · up ` +
    span(Math.max(1, Math.floor(now() - node.started_at))).replace(".0", ""));
  const reading = [...there.stages.values()].reduce((sum, stage) => sum + rateNow(stage), 0);
  const sum = (states) => states.reduce((n, state) => n + (stages[state] ?? 0), 0);
  keep(byId("totals"), [
    ["Ready", number(sum(["ready"]))], ["On their way", number(sum(ACTIVE))],
    ["Failed", number(sum(["failed"])), sum(["failed"]) > 0], ["Leases", number(about.leases)],
    ["Reading now", rate(reading)], ["Peers", node.peers.state === "none" ? "none" : number(about.peers), node.peers.state === "off"],
    ...(node.unadopted.length ? [["Not adopted", number(node.unadopted.length), true]] : []),
  ], ([title]) => title, total);
  drawPreload(node);
  const devices = [...there.devices.values()].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  keep(byId("devices").querySelector(".rows"), devices, (of) => of.name, device);
  drawStages(stages);
  drawLeases([...there.leases.values()].sort((a, b) => b.since - a.since).slice(0, MOST_ROWS));
  drawPeers(about);
  drawErrors();
}

function drawSoon() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    draw();
  });
}

function told(whole) {
  sample();
  compare(whole);
  if (whole) {
    byId("board").hidden = false;
    byId("token").hidden = true;
    byId("forget").hidden = !token.get();
    draw();
    if (!told.once && location.hash.startsWith("#s-")) reveal(location.hash.slice(3));
    told.once = true;
  } else drawSoon();
}

function linked(state, words) {
  const last = byId("link").dataset.state;
  if (last === "live" && state === "waiting") tell("Reconnecting");
  if (last === "waiting" && state === "live") tell("Live again");
  byId("link").hidden = false;
  mark(byId("link"), "data-state", state);
  write(byId("link-text"), words);
  if (state === "token") {
    if (told.once) location.reload(); // what a token has shown does not stay in the page without one
    const typed = byId("token-value").value !== "";
    byId("token").hidden = false;
    write(byId("token-wrong"), typed ? `${words}.` : "");
    byId("token-value").focus();
  }
}

byId("live").hidden = false;
const connect = listen(told, linked);
byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = byId("token-value").value.trim();
  const possible = /^[\x21-\x7e]+$/.test(typed); // what a header can carry
  write(byId("token-wrong"), possible ? "" : "That is no token: it has characters that none can have.");
  if (!possible) return;
  token.set(typed);
  connect();
});
byId("forget").addEventListener("click", () => {
  token.set(null);
  location.reload();
});
byId("filter").addEventListener("input", () => {
  limit = PAGE;
  drawSoon();
});
byId("more").addEventListener("click", () => {
  limit += PAGE;
  draw();
});
document.addEventListener("click", (event) => {
  const href = event.target.closest?.("a")?.getAttribute("href");
  if (href?.startsWith("#s-")) {
    event.preventDefault();
    history.replaceState(null, "", href);
    reveal(href.slice(3));
  }
});
setInterval(() => document.hidden || drawSoon(), 1000); // what only time changes
