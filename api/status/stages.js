// Stages: a line each, with where the time went; the rest of it when it is opened.

const PHASES = { // phase → what happens then, in the order of the timeline
  queued: "waiting for its turn", listing: "listing what is at the URI", headers: "headers and configuration files", source: "waiting on the source",
  buffers: "waiting for buffers", copying: "copying", verifying: "hashing and comparing", other: "all else",
};
const ACTIVE = ["queued", "planning", "loading", "verifying"];
const GROUPS = { all: null, active: ACTIVE, ready: ["ready"], failed: ["failed"], ended: ["cancelled", "evicted"] };
const PAGE = 100;
const RATE_WINDOW = 3; // seconds

const samples = new Map(); // stage → [[time, bytes], ...] of the last seconds
let limit = PAGE;
let group = "all";

function sample() {
  for (const [id, stage] of there.stages) {
    if (stage.state !== "loading") {
      samples.delete(id);
      continue;
    }
    const seen = samples.get(id) ?? [];
    if (seen.at(-1)?.[0] !== stage.at) seen.push([stage.at, stage.bytes_done]);
    while (seen.length > 2 && seen[1][0] < stage.at - RATE_WINDOW) seen.shift();
    samples.set(id, seen);
  }
  for (const id of samples.keys()) if (!there.stages.has(id)) samples.delete(id);
}

function rateNow(stage) {
  const seen = samples.get(stage.id);
  if (!seen || seen.length < 2) return stage.state === "loading" ? stage.bytes_per_second ?? 0 : 0;
  const [first, last] = [seen[0], seen.at(-1)];
  const until = now() - last[0] > RATE_WINDOW ? now() : last[0]; // nothing has come for long: it has stalled
  return (last[1] - first[1]) / Math.max(until - first[0], 0.001);
}

// Seconds by phase, but for phases that it has not been in.
function spent(stage) {
  const found = { ...stage.seconds };
  if (stage.state === "queued") found.queued += Math.max(0, now() - stage.at); // nothing tells of it but time
  return Object.keys(PHASES).filter((name) => found[name] > 0).map((name) => [name, found[name]]);
}

function stack() {
  const root = element("span", { class: "stack", role: "img" });
  const part = ([name]) => {
    const made = element("span", { "data-phase": name });
    return { root: made, update: ([, , share]) => { made.style.flexGrow = (share * 1000).toFixed(3); } };
  };
  return {
    root,
    update(spans, total) {
      keep(root, spans.map(([name, seconds]) => [name, seconds, seconds / total]), ([name]) => name, part);
      mark(root, "aria-label", spans.map(([name, seconds]) => `${name} ${span(seconds)}`).join(", ") || "no time yet");
    },
  };
}

function stageLine() {
  const state = element("span", { class: "state" });
  const name = element("bdi", { class: "base" });
  const uri = element("bdi", { class: "muted uri" });
  const timeline = stack();
  const done = element("span");
  const track = element("span", { class: "track", "aria-hidden": "true" }, done);
  const times = element("small", { class: "muted" });
  const bytes = element("span");
  const share = element("small", { class: "muted" });
  const fast = element("span");
  const mean = element("small", { class: "muted" });
  const leases = element("span");
  const summary = element("summary", {},
    state, element("span", { class: "model" }, name, uri),
    element("span", { class: "time" }, timeline.root, track, times),
    element("span", { class: "number bytes" }, bytes, share),
    element("span", { class: "number speed" }, fast, mean),
    element("span", { class: "number held" }, leases));
  const inside = element("div", { class: "inside" });
  const details = element("details", {}, summary, inside);
  const root = element("li", { class: "stage" }, details);
  let opened = null;
  let current = null;

  function update(stage) {
    current = stage;
    root.id = `s-${stage.id}`;
    const spans = spent(stage);
    const total = spans.reduce((sum, [, seconds]) => sum + seconds, 0);
    const longest = spans.reduce((a, b) => (b[1] > a[1] ? b : a), ["", 0]);
    const speed = rateNow(stage);
    write(state, stage.revoked_until ? "revoked" : stage.moving ? "moving" : stage.state);
    mark(root, "data-state", stage.state);
    write(name, base(stage.model));
    write(uri, `${stage.model} · ${stage.device}`);
    mark(uri, "title", stage.model);
    timeline.update(spans, total);
    track.hidden = !(ACTIVE.includes(stage.state) && stage.bytes_total);
    done.style.width = percent(stage.bytes_done, stage.bytes_total).replace(" ", "");
    const left = stage.state === "loading" && speed > 0 ? (stage.bytes_total - stage.bytes_done) / speed : null;
    write(times, `${span(total)}${longest[1] > 0 && spans.length > 1 ? `, ${span(longest[1])} of it ${longest[0]}` : ""}` +
      (left === null ? "" : `, ${span(left)} left`));
    const held = Object.values(stage.reserved).reduce((sum, nbytes) => sum + nbytes, 0);
    write(bytes, stage.bytes_total || held ? size(stage.bytes_total || held) : "–");
    write(share, stage.bytes_total ? percent(stage.bytes_done, stage.bytes_total) : "");
    write(fast, stage.state === "loading" ? `${size(Math.max(0, speed))}/s` : rate(stage.bytes_per_second));
    write(mean, stage.state === "loading" ? `mean ${rate(stage.bytes_per_second)}` : stage.bytes_per_second ? "mean" : "");
    write(leases, count(stage.leases, "lease"));
    mark(leases, "class", stage.leases ? "held-yes" : "muted");
    opened?.update(stage, spans, total);
  }
  details.addEventListener("toggle", () => {
    inside.replaceChildren();
    opened = details.open ? stageInside(inside) : null;
    if (opened) update(current);
  });
  return { root, update };
}

function stageInside(host) {
  const error = element("div", { class: "error whole", hidden: true });
  const facts = element("dl", { class: "facts" });
  const [timesAt, sourcesAt, leasesAt, peersAt] = ["", "", "", " whole"].map((more) =>
    element("div", { class: `scroll${more}` }));
  host.append(error, timesAt, element("div", {}, sourcesAt, leasesAt), facts, peersAt);
  let whole = 0;
  const times = table(timesAt, "times", "Where the time went", [
    ["Phase", ([name]) => name], ["Seconds", ([, seconds]) => seconds.toFixed(2), { number: true }],
    ["Share", ([, seconds]) => `${Math.round((100 * seconds) / whole)} %`, { number: true }], ["", ([name]) => PHASES[name]],
  ], ([name]) => name, "It has not begun.");
  const sources = table(sourcesAt, "", "Bytes by source", [
    ["Source", ([name]) => name || "unknown"], ["Bytes", ([, nbytes]) => size(nbytes), { number: true }],
  ], ([name]) => name, "Nothing has been read.");
  const peers = table(peersAt, "stacked", "Read from peers", [
    ["Peer", (of) => of.address], ["Bytes", (of) => size(of.bytes), { number: true }],
    ["Rate", (of) => rate(of.bytes_per_second), { number: true }], ["By", (of) => of.transport],
    ["Given up", (of) => of.given_up], ["Better", (of) => of.slow_path],
  ], (of) => of.address, "");
  const leases = table(leasesAt, "stacked", "Leases on it", [
    ["Process", (of) => (of.client ? `S3, ${of.client}` : of.pid === null ? "over TCP" : of.pid ? `pid ${of.pid}` : "foreign pid")],
    ["User", (of) => (of.uid === null ? "" : `uid ${of.uid}`)], ["Rank", (of) => of.tp_rank, { number: true }],
    ["Since", (of) => ago(of.since), { title: (of) => when(of.since) }],
  ], (of) => of.id, "Nobody leases it.");
  const fact = ([title]) => {
    const value = element("bdi");
    const root = element("div", {}, element("dt", {}, title), element("dd", {}, value));
    return { root, update: ([, text]) => write(value, text) };
  };
  return {
    update(stage, spans, total) {
      whole = total;
      times(spans);
      for (const row of timesAt.querySelectorAll("tbody tr")) mark(row, "data-phase", row.firstChild.textContent);
      sources(Object.entries(stage.bytes_by_source).filter(([, nbytes]) => nbytes > 0));
      peers(stage.peers);
      peersAt.hidden = !stage.peers.length;
      leases([...there.leases.values()].filter((lease) => lease.stage === stage.id));
      error.hidden = !stage.error;
      if (stage.error && !error.firstChild) error.append(...problem(stage.error));
      keep(facts, [
        ["Id", stage.id], ["URI", stage.model],
        ["Read", `${size(stage.bytes_done)} of ${size(stage.bytes_total)}, mean ${rate(stage.bytes_per_second)}`],
        ["Segments", stage.segments ? `${number(stage.segments)} with ${count(stage.tensors, "tensor")}` : "not planned"],
        ["Memory", Object.entries(stage.reserved).map(([where, nbytes]) => `${size(nbytes)} on ${where}`).join(", ") || "none"],
        ["Handle", stage.handle], ["Digest", stage.checkpoint_digest ?? "not known"],
        ["Priority", `${stage.priority}${stage.pin ? ", pinned" : ""}`], ["Asked for", when(stage.created_at)],
        ["Ready", stage.ready_at ? when(stage.ready_at) : "not yet"],
        ...(stage.request_id ? [["Request id", stage.request_id]] : []),
        ...(stage.moving ? [["Moving to", stage.moving]] : []),
        ...(stage.revoked_until ? [["To be let go by", when(stage.revoked_until)]] : []),
      ], ([title]) => title, fact);
    },
  };
}

function problem(error) {
  return [element("p", {}, element("code", { class: "code" }, error.code), " ", element("bdi", {}, error.message)),
    element("p", { class: "remedy" }, element("strong", {}, "Remedy: "), element("bdi", {}, error.remedy))];
}

function wanted() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (stage) =>
    `${stage.id} ${stage.model} ${stage.device} ${stage.state} ${stage.source} ${stage.error?.code ?? ""}`.toLowerCase();
  return [...there.stages.values()]
    .filter((stage) => (!GROUPS[group] || GROUPS[group].includes(stage.state))
      && (!words.length || words.every((word) => text(stage).includes(word))))
    .sort((a, b) => b.created_at - a.created_at || (a.id < b.id ? 1 : -1));
}

const legendItem = (name) =>
  ({ root: element("li", { "data-phase": name, title: PHASES[name] }, element("i"), name), update() {} });

function drawStages(counts) {
  const found = wanted();
  const used = new Set(found.slice(0, limit).flatMap((stage) => spent(stage).map(([name]) => name)));
  keep(byId("phases"), Object.keys(PHASES).filter((name) => used.has(name)), (name) => name, legendItem);
  const all = Object.values(counts).reduce((sum, n) => sum + n, 0);
  keep(byId("stages").querySelector("ol"), found.slice(0, limit), (stage) => stage.id, stageLine);
  const shown = Math.min(limit, found.length);
  const unknown = all - there.stages.size;
  write(byId("shown"), !all ? "None yet: weightd stage s3://bucket/model" :
    `${number(shown)} of ${number(all)}${unknown > 0 ? `; the ${number(unknown)} that ended first are only in weightd ls` : ""}`);
  byId("more").hidden = shown === found.length;
  write(byId("more"), `Show ${number(Math.min(PAGE, found.length - shown))} more of ${number(found.length - shown)}`);
  keep(byId("states"), Object.keys(GROUPS), (name) => name, groupButton);
  for (const [name, states] of Object.entries(GROUPS)) {
    const n = states ? states.reduce((sum, state) => sum + (counts[state] ?? 0), 0) : all;
    const button = byId("states").known.get(name).root;
    write(button, `${name} ${number(n)}`);
    mark(button, "aria-pressed", String(name === group));
  }
}

function groupButton(name) {
  const root = element("button", { type: "button" });
  root.addEventListener("click", () => {
    group = name;
    limit = PAGE;
    draw();
  });
  return { root, update() {} };
}

// To a stage, wherever it is in the list, and into it.
function reveal(id) {
  if (!there.stages.has(id)) return;
  if (!wanted().slice(0, limit).some((stage) => stage.id === id)) {
    byId("filter").value = id;
    group = "all";
    draw();
  }
  const details = byId(`s-${id}`).querySelector("details");
  details.open = true;
  details.scrollIntoView({ block: "nearest" });
  details.querySelector("summary").focus();
}
