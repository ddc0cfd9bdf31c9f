// Devices: each a bar of what lies in it, to scale.

const MOST_SEGMENTS = 24;

function device() {
  const name = element("bdi");
  const more = element("small", { class: "muted" });
  const bar = element("ul", { class: "segments" });
  const figures = element("p", { class: "figures" });
  const root = element("article", { class: "device" }, element("h3", {}, name, " ", more), bar, figures);

  function update(record) {
    const whole = Math.max(record.total_bytes ?? record.capacity_bytes, 1);
    write(name, record.name);
    write(more, [record.uuid, record.fill_path && `filled by ${record.fill_path}`,
      record.digest_path && `digests on the ${record.digest_path}`].filter(Boolean).join(" · "));
    bar.setAttribute("aria-label", `What lies in ${record.name}`);
    const inside = [...there.stages.values()].filter((stage) => stage.reserved[record.name])
      .map((stage) => ({ key: stage.id, stage, bytes: stage.reserved[record.name] }))
      .sort((a, b) => b.bytes - a.bytes);
    const parts = inside.slice(0, MOST_SEGMENTS);
    const known = inside.reduce((sum, part) => sum + part.bytes, 0);
    const rest = inside.slice(MOST_SEGMENTS);
    const put = (key, label, bytes) => bytes > 0 && parts.push({ key, label, bytes });
    const held = rest.reduce((sum, part) => sum + part.bytes, 0) + Math.max(0, record.used_bytes - known);
    put("rest", rest.length ? `${number(rest.length)} more` : "held, not shown", held);
    put("free", "free", record.free_bytes);
    put("reserve", "reserve", record.reserve_bytes ?? 0);
    put("others", "others", whole - record.used_bytes - record.free_bytes - (record.reserve_bytes ?? 0));
    for (const part of parts) part.share = part.bytes / whole;
    keep(bar, parts, (part) => part.key, segment);
    write(figures, [`used ${size(record.used_bytes)} (${percent(record.used_bytes, record.capacity_bytes)})`,
      `free ${size(record.free_bytes)}`, `capacity ${size(record.capacity_bytes)}`,
      record.reserve_bytes != null && `reserve ${size(record.reserve_bytes)}`,
      record.total_bytes != null && `of ${size(record.total_bytes)} in all`].filter(Boolean).join(" · "));
  }
  return { root, update };
}

function segment(part) {
  const label = element("bdi", { class: "label" });
  const words = element("span", { class: "words" });
  const inner = element(part.stage ? "a" : "span", { class: "segment" }, label, words);
  const root = element("li", {}, inner);
  return {
    root,
    update({ key, stage, label: what, bytes, share }) {
      const name = stage ? base(stage.model) : what;
      const about = stage
        ? [stage.state, size(bytes), count(stage.leases, "lease"), stage.pin && "pinned", stage.moving && "moving"]
        : [size(bytes)];
      const text = about.filter(Boolean).join(" · ");
      write(label, name);
      write(words, text);
      mark(root, "data-kind", stage ? stage.state : key);
      mark(root, "data-leased", stage?.leases ? "yes" : null);
      mark(inner, "title", `${stage ? stage.model : name}: ${text}`);
      if (stage) mark(inner, "href", `#s-${stage.id}`);
      root.style.flexGrow = Math.max(share * 1000, 0.01).toFixed(3);
      root.style.setProperty("--share", `${(share * 100).toFixed(2)}%`);
    },
  };
}
