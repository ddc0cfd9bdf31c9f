// What is in plain tables: leases, peers, the preload list; and the last errors.

const GIVEN_UP_LATELY = 60; // seconds
const MOST_ROWS = 100;
const MOST_ERRORS = 20;
const modelOf = (id) => (there.stages.has(id) ? base(there.stages.get(id).model) : id);

const drawLeases = table(byId("leases").querySelector(".rows"), "stacked", "Who uses what, the latest first", [
  ["Process", (of) => (of.client ? `S3, ${of.client}` : of.pid === null ? "over TCP" : of.pid ? `pid ${of.pid}` : "foreign pid")],
  ["User", (of) => (of.uid === null ? "" : `uid ${of.uid}`)],
  ["Model", (of) => modelOf(of.stage), { link: (of) => `#s-${of.stage}` }],
  ["Rank", (of) => of.tp_rank, { number: true }],
  ["Since", (of) => ago(of.since), { title: (of) => when(of.since) }],
], (of) => of.id, "Nobody leases anything.");

const health = (of) => (!of.given_up_at ? (of.bytes_from || of.bytes_to ? "ok" : "idle")
  : now() - of.given_up_at < GIVEN_UP_LATELY ? "given up" : "was given up");
const mood = (of) => ({ ok: "good", "given up": "bad" })[health(of)];
const peersState = element("p");
byId("peers").querySelector(".rows").append(peersState);
const drawPeerTable = table(byId("peers").querySelector(".rows"), "stacked", "Other daemons, as the directory knows them", [
  ["Address", (of) => of.address, { title: (of) => of.node }], ["Health", health, { mood }],
  ["By", (of) => of.transport], ["Rate", (of) => rate(of.bytes_per_second), { number: true }],
  ["From it", (of) => size(of.bytes_from), { number: true }], ["To it", (of) => size(of.bytes_to), { number: true }],
  ["Given up", (of) => (of.given_up ? `${ago(of.given_up_at)}: ${of.given_up}` : "")],
], (of) => of.address, "No other daemon is known.");

function drawPeers(about) {
  const { state, reason, address } = about.node.peers;
  const all = [...there.peers.values()].sort((a, b) => (b.given_up_at ?? 0) - (a.given_up_at ?? 0)
    || b.bytes_from - a.bytes_from || (a.address < b.address ? -1 : 1));
  const words = { none: "Peers are not configured (WEIGHTD_PEERS).", off: `Peers are off: ${reason}`,
    ok: `This daemon is ${address ?? "not served to peers"}; the directory is ${about.directory}` };
  write(peersState, words[state] + (all.length > MOST_ROWS ? `; ${MOST_ROWS} of ${number(about.peers)} are shown` : ""));
  mark(peersState, "class", state === "off" || (state === "ok" && about.directory !== "ok") ? "warning" : "muted");
  drawPeerTable(all.slice(0, MOST_ROWS));
  byId("peers").classList.toggle("none", state === "none");
}

const notReady = element("p", { class: "warning" });
byId("preload").querySelector(".rows").append(notReady);
const drawPreloadTable = table(byId("preload").querySelector(".rows"), "stacked", "What is staged at start", [
  ["Model", (of) => of.model, { link: (of) => of.stage && `#s-${of.stage}` }],
  ["State", (of) => of.state, { mood: (of) => (of.was_ready ? "good" : of.error ? "bad" : null) }],
  ["Attempts", (of) => of.attempts, { number: true }], ["Error", (of) => of.error],
], (of) => of.place, "");

function drawPreload({ preload = [], not_ready: reasons = [] }) {
  byId("preload").hidden = !preload.length && !reasons.length;
  const ready = preload.filter((of) => of.was_ready).length;
  write(notReady, !reasons.length ? "" : preload.length
    ? `Not ready: ${number(ready)} of ${number(preload.length)} have been, so /readyz answers 503` : `Not ready: ${reasons[0]}`);
  drawPreloadTable(preload.map((of, place) => ({ ...of, place })));
}

function errorItem(record) {
  const at = element("time", { class: "muted" });
  const times = element("small", { class: "muted" });
  const of = element(record.stage ? "a" : "span", { class: "base", href: record.stage && `#s-${record.stage}` });
  const root = element("li", { class: "error" }, element("p", {}, of, " ", times, " ", at), ...problem(record));
  return {
    root,
    update(error) {
      write(of, error.stage ? modelOf(error.stage) : "A request was refused");
      write(times, error.count > 1 ? `${number(error.count)} times, the last` : "");
      write(at, ago(error.at));
      mark(at, "datetime", new Date(error.at * 1000).toISOString());
    },
  };
}

const errorList = element("ol");
const noErrors = element("p", { class: "muted" }, "None.");
byId("errors").querySelector(".rows").append(errorList, noErrors);

function drawErrors() {
  const failed = [...there.stages.values()].filter((stage) => stage.state === "failed" && stage.error)
    .map((stage) => ({ ...stage.error, key: stage.id, stage: stage.id, at: stage.state_since, count: 1 }));
  const refused = [...there.refusals.values()].map((refusal) => ({ ...refusal, key: `refused ${refusal.id}` }));
  const found = [...failed, ...refused].sort((a, b) => b.at - a.at).slice(0, MOST_ERRORS);
  keep(errorList, found, (error) => error.key, errorItem);
  noErrors.hidden = found.length > 0;
}
