// What was done with a machine, by whom, and taking it back. The page's own tools come in as an argument: see `app.js`.
// INVARIANT: as there, text from elsewhere never becomes markup. A journal is written by the machine that it is of.

/** A journal is looked at anew after so long, and a refusal after so long. */
const FRESH_MS = 10_000;
const REFUSED_MS = 60_000;
/** The latest entries are shown. */
const SHOWN = 30;

/** So much of an image’s id is shown, or of a key: as the command line shows it. */
export const short = (id) => id.slice(0, 10);

/** Who steers a machine that is not this computer's, in a sentence; of this computer's own, see `CONTROL_WORD`. */
const THEIRS = { local: "Only its user steers it", remote: "The clan’s admins steer it", shared: "Its user and the clan’s admins steer it" };

export function controlWord(machine, own) {
  return machine.control_mode && (machine.this ? own[machine.control_mode] : THEIRS[machine.control_mode]);
}

export function journals({ h, call, ask, ago, span, prose, segment, render }) {
  /** Per machine: what its journal said last, or why it said nothing, and when. */
  const known = new Map();
  const keyOf = (clan, machine) => `${clan.id} ${machine.id}`;
  const pathOf = (clan, machine) => `/clans/${segment(clan.id)}/machines/${segment(machine.id)}`;
  const mayAsk = (clan, machine) => clan.online && !machine.behind && (machine.this || clan.role === "owner" || clan.role === "admin");

  /** Asks a machine for its journal, unless that was done a moment ago. */
  function look(clan, machine, anew = false) {
    if (!mayAsk(clan, machine)) return;
    const before = known.get(keyOf(clan, machine)) ?? { at: 0 };
    const patience = before.problem ? REFUSED_MS : FRESH_MS;
    const changed = before.mode !== machine.control_mode;
    if (before.asking || (!anew && !changed && Date.now() - before.at < patience)) return;
    known.set(keyOf(clan, machine), { ...before, asking: true });
    call("GET", `${pathOf(clan, machine)}/journal`)
      .then((entries) => ({ entries }), (error) => ({ problem: error.problem ?? { message: "The manager does not answer", hints: [] } }))
      .then((said) => {
        known.set(keyOf(clan, machine), { ...said, at: Date.now(), mode: machine.control_mode });
        render();
      });
  }

  function deed(entry) {
    const said = {
      control_mode: () => `control from ${entry.before} to ${entry.after}`,
      setting: () => `${entry.setting} from ${entry.before} to ${entry.after}`,
      image: () => `image from ${short(entry.before ?? "?")} to ${short(entry.after ?? "?")}`,
      restart: () => "restart",
      terminal: () => (entry.ended ? `terminal, for ${span(entry.ended - entry.at)}` : "terminal, open"),
    }[entry.deed];
    const what = said ? said() : entry.deed;
    return entry.reverts ? `${what}, which takes ${entry.reverts} back` : what;
  }

  /** What an entry is about, if that can be taken back. */
  function subject(entry, machine) {
    switch (entry.deed) {
      case "setting": return `setting ${entry.setting}`;
      case "image": return "image";
      // Who may steer is said by the user of its own computer; and whom they let in, anew each time.
      case "control_mode": return machine.this ? "control" : null;
      default: return null;
    }
  }

  /** Numbers of the entries that can be taken back: each is the last word on what it is about. */
  function revertible(entries, machine) {
    const last = new Map();
    for (const entry of entries) if (subject(entry, machine)) last.set(subject(entry, machine), entry);
    const letsIn = (entry) => entry.deed === "control_mode" && entry.before !== "local";
    return new Set([...last.values()].filter((entry) => !letsIn(entry)).map((entry) => entry.number));
  }

  function askRevert(clan, machine, entry) {
    ask({
      title: `Take entry ${entry.number} back?`,
      text: entry.deed === "image"
        ? `${machine.name} stops, and starts with the image that it had before. Its disk stays.`
        : `On ${machine.name}, ${deed(entry)}: it becomes ${entry.before} again. That is written down, too.`,
      verb: "Take it back",
      done: () => call("POST", `${pathOf(clan, machine)}/reverts`, { number: entry.number }).then(() => look(clan, machine, true)),
    });
  }

  /** The terminal is no part of the page: how to open it, or why not. */
  function terminal(clan, machine, forbidden) {
    return forbidden
      ? ["Its control mode is remote: the clan’s admins change it and have terminals on it, and not you. To take that back: ", h("code", null, `clan vm control shared ${clan.name}`)]
      : ["A terminal on it: ", h("code", null, `clan machine terminal ${machine.name} --clan ${clan.name}`)];
  }

  function section(clan, machine) {
    if (machine.behind) return null;
    const body = (...inside) => h("section", { key: "journal", "aria-label": "Journal" },
      h("div", { class: "section-head" }, h("h2", null, "Journal"), h("span", { class: "muted small" }, "what was done with it, and by whom")), inside);
    if (!mayAsk(clan, machine)) {
      return clan.online && body(h("p", { class: "panel empty" }, "Admins of the clan see it, where its user lets them."));
    }
    const { entries, problem } = known.get(keyOf(clan, machine)) ?? {};
    if (problem) {
      const said = [problem.why ? `${problem.message}: ${problem.why}` : problem.message, ...(problem.hints ?? [])].flatMap((text) => [prose(text), " "]);
      return body(h("p", { class: "panel empty" }, said));
    }
    if (!entries) return body(h("p", { class: "panel empty" }, "Asking the machine…"));
    const forbidden = machine.this && machine.control_mode === "remote";
    const last = revertible(entries, machine);
    const cell = (label, ...inside) => h("td", { role: "cell", "data-label": label }, ...inside);
    const row = (entry) => h("tr", { role: "row", key: String(entry.number) },
      cell("Number", String(entry.number)),
      cell("When", ago(entry.at)),
      cell("Who", h("span", { class: "wrap" }, entry.person_name ?? "somebody")),
      cell("From", h("span", { class: "wrap" }, entry.here ? "its own computer" : entry.from_name ?? short(entry.from))),
      cell("What", h("span", { class: "wrap" }, deed(entry))),
      cell("", last.has(entry.number) && !forbidden &&
        h("button", { type: "button", class: "button small revert", "aria-label": `Take entry ${entry.number} back`, onclick: () => askRevert(clan, machine, entry) }, "Take back")));
    const names = ["Number", "When", "Who", "From", "What", ""];
    return body(
      entries.length === 0
        ? h("p", { class: "panel empty" }, "Nothing was done with it yet.")
        : h("div", { class: "panel" }, h("table", { class: "table journal", role: "table" },
            h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, names.map((name) => h("th", { role: "columnheader", scope: "col" }, name)))),
            h("tbody", { role: "rowgroup" }, entries.slice(-SHOWN).reverse().map(row)))),
      h("p", { class: "muted small after" }, terminal(clan, machine, forbidden)));
  }

  return { look, section };
}
