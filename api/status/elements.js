// Elements, and how figures are written. What comes from outside becomes text, never markup.

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Only what differs is touched: a selection, the focus and a screen reader's place outlive an update.
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function mark(node, name, value) {
  if (value == null || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// Children of `parent` become those of `records`, in that order; each is made once for its key, and then updated.
function keep(parent, records, key, make) {
  const known = (parent.known ??= new Map());
  const wanted = new Set(records.map(key));
  for (const [id, child] of known) {
    if (wanted.has(id)) continue;
    child.root.remove(); // before others are put in order: whatever is moved loses the focus
    known.delete(id);
  }
  let place = parent.firstElementChild;
  for (const record of records) {
    const id = key(record);
    let child = known.get(id);
    if (!child) known.set(id, (child = make(record)));
    child.update(record);
    if (child.root === place) place = place.nextElementSibling;
    else parent.insertBefore(child.root, place);
  }
}

const number = (value) => value.toLocaleString("en");

function size(nbytes) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (nbytes < 1024) return `${unit === "B" ? Math.round(nbytes) : nbytes.toFixed(1)} ${unit}`;
    nbytes /= 1024;
  }
  return `${nbytes.toFixed(1)} TiB`;
}

const rate = (bytesPerSecond) => (bytesPerSecond ? `${size(bytesPerSecond)}/s` : "–");
const percent = (part, whole) => (whole > 0 ? `${Math.floor((100 * part) / whole)} %` : "–");
const count = (n, one, many = `${one}s`) => `${number(n)} ${n === 1 ? one : many}`;

function span(seconds) {
  if (seconds < 0.095) return `${Math.max(0, Math.round(seconds * 1000))} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  if (days > 1) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return `${minutes} min ${Math.floor(seconds % 60)} s`;
}

const ago = (at) => `${span(Math.max(0, now() - at)).replace(/^(\d+) ms$/, "0.0 s").replace(/\.\d s$/, " s")} ago`;
const when = (at) => new Date(at * 1000).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC");

// The last part of a URI is what people call a model.
const base = (uri) => uri.replace(/\/+$/, "").split("/").pop() || uri;

// The daemon's clock, not this machine's.
let clockOffset = 0;
const now = () => Date.now() / 1000 + clockOffset;

// A table whose rows are kept by key. Columns: [title, value(record), {number, link, title, mood: of a record}].
function table(host, kind, caption, columns, key, nothing) {
  const body = element("tbody");
  const head = element("tr", {}, ...columns.map(([title, , options]) =>
    element("th", { scope: "col", class: options?.number && "number" }, title)));
  const made = element("table", { class: kind }, element("caption", {}, caption), element("thead", {}, head), body);
  const empty = element("p", { class: "muted" }, nothing);
  host.append(made, empty);
  const row = () => {
    const cells = columns.map(([title, , options], index) => {
      const place = options?.link ? element("a") : element("bdi");
      const attributes = { class: options?.number && "number", "data-title": title };
      const cell = index ? element("td", attributes, place) : element("th", { scope: "row", ...attributes }, place);
      return { cell, place };
    });
    const update = (record) => columns.forEach(([, value, options], index) => {
      const { cell, place } = cells[index];
      write(place, String(value(record) ?? ""));
      if (options?.link) mark(place, "href", options.link(record));
      if (options?.title) mark(cell, "title", options.title(record));
      if (options?.mood) mark(cell, "data-mood", options.mood(record));
    });
    return { root: element("tr", {}, ...cells.map(({ cell }) => cell)), update };
  };
  return (records) => {
    keep(body, records, key, row);
    made.hidden = !records.length;
    empty.hidden = records.length > 0;
  };
}
