// The manager's page. It asks for /api/v1/status once a second while it is looked at, and shows what it says.
// INVARIANT: text from elsewhere never becomes markup; it only ever passes text nodes and attributes.

import { controlWord, journals, short } from "./journal.js";
import { locks } from "./lock.js";

const API = "/api/v1";
const EVERY_MS = 1000;
/** The charts show so much of the past. */
const WINDOW_MS = 120_000;
/** Ended tasks stay visible for so long. */
const RECENT_MS = 180_000;
/** One that the person has to tell somebody of does for longer. */
const UNHEARD_MS = 3_600_000;
const SVG = "http://www.w3.org/2000/svg";

// ---------------------------------------------------------------------------------------------------------------
// Elements: `h` describes, `patch` changes what is there as little as possible, so that focus, selection and the
// screen reader's place survive a refresh every second.

const isNothing = (child) => child === null || child === undefined || child === false || child === "";

/** Describes an element. Properties: attributes, `on…` listeners, `key`. Children: descriptions, text, null. */
function h(tag, props, ...children) {
  return { tag, props: props ?? {}, children };
}

function sameKind(node, want) {
  if (typeof want !== "object") return node.nodeType === Node.TEXT_NODE;
  return node.nodeType === Node.ELEMENT_NODE && node.localName === want.tag.replace("svg:", "") && node.clanKey === want.props.key;
}

function make(want) {
  if (typeof want !== "object") return document.createTextNode(String(want));
  const node = want.tag.startsWith("svg:") ? document.createElementNS(SVG, want.tag.slice(4)) : document.createElement(want.tag);
  node.clanKey = want.props.key;
  node.clanProps = {};
  update(node, want);
  return node;
}

function update(node, want) {
  if (typeof want !== "object") {
    if (node.data !== String(want)) node.data = String(want);
    return;
  }
  const before = node.clanProps;
  for (const name of Object.keys(before)) if (!(name in want.props)) setProp(node, name, before[name], null);
  for (const [name, value] of Object.entries(want.props)) if (before[name] !== value) setProp(node, name, before[name], value);
  node.clanProps = want.props;
  patch(node, want.children);
}

function setProp(node, name, before, value) {
  if (name === "key") return;
  if (name.startsWith("on")) {
    if (before) node.removeEventListener(name.slice(2), before);
    if (value) node.addEventListener(name.slice(2), value);
  } else if (value === null || value === undefined || value === false) {
    node.removeAttribute(name);
  } else {
    node.setAttribute(name, value === true ? "" : String(value));
  }
}

/** Makes the children of `parent` what `wants` describes. */
function patch(parent, wants) {
  let at = parent.firstChild;
  for (const want of wants.flat(Infinity)) {
    if (isNothing(want)) continue;
    let found = at;
    while (found && !sameKind(found, want)) found = want?.props?.key === undefined ? null : found.nextSibling;
    if (found) {
      if (found !== at) parent.insertBefore(found, at);
      else at = at.nextSibling;
      update(found, want);
    } else {
      parent.insertBefore(make(want), at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function svg(size, ...paths) {
  return h("svg:svg", { viewBox: `0 0 ${size} ${size}`, width: size, height: size, "aria-hidden": "true" }, paths.map((d) => h("svg:path", { d })));
}

const ICON = {
  home: () => svg(20, "M3 9.5 10 3.5l7 6v7h-4.5v-5h-5v5H3z"),
  clan: () => svg(20, "M10 7.2 5.6 13M10 7.2l4.4 5.8M6.8 14.6h6.4", "M12 5.2a2 2 0 1 1-4 0 2 2 0 0 1 4 0zM6.8 14.6a2 2 0 1 1-4 0 2 2 0 0 1 4 0zM17.2 14.6a2 2 0 1 1-4 0 2 2 0 0 1 4 0z"),
  open: () => svg(20, "M8 4.5H4.5v11h11V12", "M11.5 3.5h5v5M16.5 3.5l-7 7"),
  invite: () => svg(20, "M11 6.5a3 3 0 1 1-6 0 3 3 0 0 1 6 0z", "M2.5 16.5c.4-3 2.6-4.7 5.5-4.7s5.1 1.7 5.5 4.7", "M15.5 6v5M13 8.5h5"),
  start: () => svg(20, "M6.5 4.2v11.6L16 10z"),
  stop: () => svg(20, "M5.5 5.5h9v9h-9z"),
  lock: () => svg(20, "M4.5 9h11v7.5h-11z", "M6.8 9V6.700a3.2 3.2 0 0 1 6.4 0V9"),
  unlock: () => svg(20, "M4.5 9h11v7.5h-11z", "M6.8 9V6.700a3.2 3.2 0 0 1 6.2-1.100"),
  attention: () => svg(20, "M10 3.2 18 16.8H2z", "M10 8.5v4M10 14.7v.1"),
  link: () => svg(20, "M8.5 11.5a3.2 3.2 0 0 0 4.6 0l2.6-2.6a3.2 3.2 0 0 0-4.6-4.6L10 5.400", "M11.5 8.5a3.2 3.2 0 0 0-4.6 0l-2.6 2.6a3.2 3.2 0 0 0 4.6 4.6l1.100-1.100"),
};

// ---------------------------------------------------------------------------------------------------------------
// Words

function bytes(n) {
  if (n < 1024) return `${Math.round(n)} B`;
  let unit = -1;
  do { n /= 1024; unit += 1; } while (n >= 1023.5 && unit < 3);
  return `${n >= 99.95 || n - Math.floor(n) < 0.05 ? n.toFixed(0) : n.toFixed(1)} ${["KiB", "MiB", "GiB", "TiB"][unit]}`;
}

function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  const two = (a, aUnit, b, bUnit) => (b ? `${a} ${aUnit} ${b} ${bUnit}` : `${a} ${aUnit}`);
  if (s < 60) return `${s} s`;
  if (s < 3600) return two(Math.floor(s / 60), "min", s % 60, "s");
  if (s < 86_400) return two(Math.floor(s / 3600), "h", Math.floor((s % 3600) / 60), "min");
  const days = Math.floor(s / 86_400);
  return two(days, days === 1 ? "day" : "days", Math.floor((s % 86_400) / 3600), "h");
}

function ago(then) {
  const ms = state.status.now - then;
  if (ms < 5000) return "just now";
  return ms < 60_000 ? "less than a minute ago" : `${span(Math.floor(ms / 60_000) * 60_000)} ago`;
}

const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

const VM_WORD = { stopped: ["idle", "Stopped"], locked: ["warn", "Locked"], starting: ["warn", "Starting"], running: ["good", "Running"], paused: ["warn", "Paused"], stopping: ["warn", "Stopping"], failed: ["bad", "Failed"] };
const PHASE_WORD = { creating: "being founded", joining: "being joined", leaving: "being left" };
const PATH_WORD = { local: "This computer", direct: "Direct", quic_direct: "Direct (QUIC)", relayed: "Relayed" };
const CONTROL_WORD = { local: "Only you steer it", remote: "The clan’s admins steer it", shared: "You and the clan’s admins steer it" };
const ACCELERATOR_WORD = { kvm: "KVM, the processor itself", tcg: "Emulation, slower" };

function rtt(us) {
  return us < 10_000 ? `${(us / 1000).toFixed(1)} ms` : `${Math.round(us / 1000)} ms`;
}

/** One of six colours, always the same for the same name. */
function hue(name) {
  let sum = 0;
  for (const c of name) sum = (sum * 31 + c.codePointAt(0)) % 9973;
  return sum % 6;
}

// ---------------------------------------------------------------------------------------------------------------
// State and the manager

const state = {
  status: null,
  /** "ok", "signed-out" or "lost". */
  link: "ok",
  /** Per VM id: points, oldest first. */
  history: new Map(),
  seeding: new Set(),
  units: new Map(),
  busy: new Set(),
  notices: [],
  told: new Map(),
};

class Refusal extends Error {
  constructor(problem, status) {
    super(problem?.message ?? "The manager gave an unexpected answer");
    this.problem = problem ?? { message: this.message, hints: [] };
    this.status = status;
  }
}

async function call(method, path, body) {
  const request = { method, headers: { accept: "application/json" }, credentials: "same-origin", cache: "no-store" };
  if (method === "GET") request.signal = AbortSignal.timeout(10_000);
  if (body !== undefined) {
    request.headers["content-type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  const response = await fetch(API + path, request);
  const text = await response.text();
  let value = null;
  try { value = JSON.parse(text); } catch { /* told below */ }
  if (!response.ok || value === null) throw new Refusal(value, response.status);
  return value;
}

const segment = encodeURIComponent;

async function refresh() {
  try {
    const status = await call("GET", "/status");
    state.link = "ok";
    state.status = status;
    for (const vm of status.vms) remember(vm);
    for (const id of state.history.keys()) if (!status.vms.some((vm) => vm.id === id)) state.history.delete(id);
    tell();
    const { clan, machine } = readRoute();
    if (machine) journal.look(clan, machine);
  } catch (error) {
    state.link = error instanceof Refusal && error.status === 401 ? "signed-out" : "lost";
  }
  render();
}

/** Adds the latest point; fetches what was before it if that is not known. */
function remember(vm) {
  const point = vm.stats;
  if (!point) return;
  const points = state.history.get(vm.id) ?? [];
  const last = points.at(-1);
  if (last?.at === point.at) return;
  if ((!last || point.at - last.at > 10_000) && !state.seeding.has(vm.id)) {
    state.seeding.add(vm.id);
    call("GET", `/vms/${segment(vm.id)}/stats`)
      .then((stats) => {
        const known = new Map([...stats.history, ...(state.history.get(vm.id) ?? [])].map((p) => [p.at, p]));
        state.history.set(vm.id, [...known.values()].sort((a, b) => a.at - b.at));
        state.units.set(vm.id, stats.units);
      })
      .catch(() => { /* the charts fill by themselves */ })
      .finally(() => state.seeding.delete(vm.id));
  }
  // A guest that was restarted counts from zero again.
  const kept = last && point.uptime_s + 5 < last.uptime_s ? [] : points.filter((p) => point.at - p.at <= WINDOW_MS + 15_000);
  state.history.set(vm.id, [...kept, point]);
}

/** Tells the screen reader what changed in tasks and machines: states, never percentages. */
function tell() {
  const now = new Map();
  for (const task of state.status.tasks) {
    const step = task.steps.find((s) => s.state === "running")?.title;
    const text = { running: step ? `${task.title}: ${step}` : task.title, done: isUnheard(task) ? `${task.title}: done. ${UNHEARD}` : `${task.title}: done`, failed: `${task.title}: failed. ${task.problem?.message ?? ""}`, cancelled: `${task.title}: cancelled` };
    now.set(`task ${task.id}`, text[task.state]);
  }
  for (const vm of state.status.vms) now.set(`vm ${vm.id}`, `${vm.machine} of ${vm.clan}: ${VM_WORD[vm.state]?.[1]}`);
  const news = state.told.size === 0 ? [] : [...now].filter(([key, text]) => state.told.get(key) !== text).map(([, text]) => text);
  state.told = now;
  if (news.length) announce(news.join(". "));
}

function announce(text) {
  document.getElementById("announce").textContent = text.replaceAll("`", "");
}

/** Runs what a button does: once at a time, with its failure shown. */
async function act(key, work) {
  if (state.busy.has(key)) return;
  state.busy.add(key);
  render();
  try {
    await work();
  } catch (error) {
    if (error instanceof Refusal && error.status === 401) state.link = "signed-out";
    else notice(error);
  } finally {
    state.busy.delete(key);
    await refresh();
  }
}

function notice(error) {
  const problem = error instanceof Refusal ? error.problem : { message: "The manager does not answer", hints: ["Start it in a terminal: clan manager"] };
  state.notices = [...state.notices, { key: `${Date.now()} ${Math.random()}`, ...problem }].slice(-3);
  announce(problem.message);
}

// ---------------------------------------------------------------------------------------------------------------
// What can be done

/** Only what leads to this computer is opened, whatever the answer says. */
function isOwnUrl(text) {
  let url;
  try { url = new URL(text); } catch { return false; }
  return url.protocol === "http:" && (url.hostname === "localhost" || url.hostname.endsWith(".localhost") || url.hostname === "127.0.0.1" || url.hostname === "[::1]");
}

function openService(clan, service) {
  // The window is made while the click still counts, or the browser takes it for a pop-up.
  const tab = window.open("about:blank", "_blank");
  if (tab) tab.opener = null;
  act(`open ${clan.id} ${service.name} ${service.machine}`, async () => {
    try {
      const { url } = await call("POST", `/clans/${segment(clan.id)}/services/${segment(service.name)}/open`, {});
      if (!isOwnUrl(url)) throw new Refusal({ message: "The manager named an address that is not on this computer", hints: [] });
      if (tab) tab.location.replace(url);
      else throw new Refusal({ message: "The browser did not allow a new window", hints: ["Allow pop-ups for this page, then try again"] });
    } catch (error) {
      tab?.close();
      throw error;
    }
  });
}

function startVm(vm) {
  act(`vm ${vm.id}`, () => call("POST", `/vms/${segment(vm.id)}/start`, {}));
}

function stopVm(vm) {
  ask({
    title: `Stop ${vm.machine}?`,
    text: `Its services cannot be reached until it runs again. Nothing is deleted.`,
    verb: "Stop",
    done: () => call("POST", `/vms/${segment(vm.id)}/stop`, {}),
  });
}

function cancelTask(task) {
  act(`task ${task.id}`, () => call("POST", `/tasks/${segment(task.id)}/cancel`, {}));
}

// ---------------------------------------------------------------------------------------------------------------
// Dialogs: one at a time; the browser's own element keeps the focus inside and returns it.

const dialog = document.createElement("dialog");
dialog.setAttribute("aria-labelledby", "dialog-title");
document.body.append(dialog);
// However it was closed; the next one may be open already.
dialog.addEventListener("close", () => dialog.open || wipe());

/** Passphrases that were typed go. */
function wipe() {
  for (const typed of dialog.querySelectorAll("input[type=password]")) typed.value = "";
}

/**
 * Shows a form. `fields()` describes its inside; `done(values)` may return what describes the next page of it. With `anew`, passphrases
 * are typed anew when it was refused.
 */
function ask({ title, text, verb, fields, done, anew = false }) {
  const form = { busy: false, error: null, next: null };
  const buttons = () => [
    h("button", { type: "button", class: "button", onclick: () => dialog.close() }, "Cancel"),
    h("button", { type: "submit", class: "button primary", disabled: form.busy }, form.busy ? "One moment…" : verb),
  ];
  const problem = ({ message, why, hints }) =>
    h("p", { class: "form-error", role: "alert" }, prose(why ? `${message}: ${why}` : message), (hints ?? []).map((hint) => [" ", prose(hint)]));
  const draw = () => {
    const inside = form.next
      ? [form.next(), h("div", { key: "close", class: "row" }, h("button", { type: "submit", class: "button primary" }, "Close"))]
      : [text && h("p", { class: "muted" }, text), fields?.(), form.error && problem(form.error), h("div", { key: "buttons", class: "row" }, buttons())];
    patch(dialog, [h("form", { method: "dialog", onsubmit: submit }, h("h2", { id: "dialog-title" }, title), inside)]);
  };
  const submit = async (event) => {
    if (form.next) return;
    event.preventDefault();
    if (form.busy) return;
    const values = Object.fromEntries(new FormData(event.target));
    Object.assign(form, { busy: true, error: null });
    draw();
    try {
      const next = await done(values);
      form.next = typeof next === "function" ? next : null;
      if (!form.next) dialog.close();
    } catch (error) {
      form.error = error instanceof Refusal ? error.problem : { message: "The manager does not answer" };
      if (anew) wipe();
    }
    form.busy = false;
    draw();
    dialog.querySelector(".form-error[role=alert]")?.scrollIntoView({ block: "nearest" });
    refresh();
  };
  patch(dialog, []);
  draw();
  dialog.showModal();
}

function field(label, control) {
  return h("label", { class: "field", key: label }, h("span", null, label), control);
}

function askInvite(clan) {
  const option = (value, text) => h("option", { value }, text);
  ask({
    title: `Invite somebody to ${clan.name}`,
    text: "Whoever has the link may join: send it over a channel that you trust.",
    verb: "Make the link",
    fields: () => [
      field("They may", h("select", { name: "role" }, option("member", "use and offer services (member)"), option("guest", "use services (guest)"), option("admin", "also invite and remove others (admin)"))),
      field("The link works for", h("select", { name: "expires_in" }, option("86400", "24 hours"), option("3600", "1 hour"), option("604800", "7 days"))),
      field("How many people", h("input", { name: "uses", type: "number", min: "1", max: "100", value: "1", required: true })),
    ],
    done: async (values) => {
      const invite = await call("POST", `/clans/${segment(clan.id)}/invites`, { role: values.role, uses: Number(values.uses), expires_in: Number(values.expires_in) });
      return () => [
        h("p", { class: "muted" }, "They will see this fingerprint; it must be the same on both screens: ", h("code", null, invite.fingerprint)),
        field("Link", h("textarea", { readonly: true, rows: "6", onfocus: (event) => event.target.select() }, invite.link)),
        h("button", { type: "button", class: "button", onclick: () => copy(invite.link) }, ICON.link(), "Copy the link"),
        invite.words && h("p", { class: "muted" }, "On the same network these words do as well, once, within ten minutes: ", h("code", null, invite.words)),
      ];
    },
  });
}

function askJoin(text = "") {
  ask({
    title: "Join a clan",
    text: "You will see where the link leads before anything happens.",
    verb: "Go on",
    fields: () => [field("Invitation link, or four words", h("textarea", { name: "text", rows: "5", required: true, placeholder: "clan://join/…", spellcheck: "false" }, text)), homeFields()],
    done: async ({ text, integrate, container }) => {
      const { link } = await call("POST", "/joins/invitation", { text });
      const home = homeOf(integrate, container);
      const preview = await call("POST", "/joins/preview", { link, ...home });
      setTimeout(() => confirmJoin(link, preview, home));
    },
  });
  // What somebody clicked on needs no second click.
  if (text) dialog.querySelector("form").requestSubmit();
}

/** What the desktop handed over came behind the `#`; it does not stay in the address or in the history. */
function takeOpened() {
  const prefix = "#/open/";
  if (!location.hash.startsWith(prefix)) return;
  const text = decodeURIComponent(location.hash.slice(prefix.length));
  history.replaceState(null, "", "#/");
  askJoin(text);
}

/** Where the machine will be: a virtual one, unless a container is asked for, or a controller on this computer is named. */
function homeFields() {
  return [
    field("A container instead of a virtual machine: needs less of this computer, and keeps less apart from it",
      h("input", { name: "container", type: "checkbox" })),
    field("To make this computer itself the machine, without a virtual one: socket of its controller",
      h("input", { name: "integrate", placeholder: "/run/clan/controller.sock", pattern: "/.+", title: "A path that begins with /", spellcheck: "false" })),
  ];
}

function homeOf(integrate, container) {
  return { ...(integrate && { integrate }), ...(container && { container: true }) };
}

/** This computer's name, as far as it may be a machine's and is free. */
function machineName(taken) {
  const label = (state.status?.host.name ?? "").split(".")[0].toLowerCase().replace(/[^a-z0-9-]+/g, "-").replace(/^-+|-+$/g, "") || "computer";
  for (let n = 1; ; n++) {
    const name = n === 1 ? label : `${label}-${n}`;
    if (!taken.includes(name)) return name;
  }
}

/** How the machine would run, with the reason unless a warning gives it. */
function runsBy({ vm, warnings }) {
  const word = ACCELERATOR_WORD[vm.accelerator.kind];
  return warnings.some((warning) => warning.includes(vm.accelerator.reason)) ? word : `${word}: ${vm.accelerator.reason}`;
}

/** What of an image has to come. */
function download({ total, missing }) {
  if (!missing) return `nothing: its ${bytes(total)} are here already`;
  return missing === total ? bytes(total) : `${bytes(missing)} of ${bytes(total)}; the rest is here`;
}

function networkWord(layer = "mesh") {
  return layer === "mesh" ? "mesh: encrypted, and directly between machines where that works" : layer;
}

/** What was shown, so that it is what is asked for, whatever an admin publishes meanwhile. */
function agreed(p) {
  const image = (p.vm ?? p.container)?.image;
  const size = p.vm ? { memory: p.vm.memory, disk: p.vm.disk, cpus: p.vm.cpus } : {};
  return image ? { ...size, agreed: { image, network_layer: p.network_layer, applications: p.applications } } : {};
}

function confirmJoin(link, p, home) {
  ask({
    title: p.device_of ? `Make this computer yours in ${p.clan_name}?` : `Join ${p.clan_name}?`,
    text: p.device_of
      ? `It becomes one of ${p.device_of}’s devices. Compare the fingerprint with what the other device shows.`
      : `${p.inviter} invites you as ${p.role}. Compare the fingerprint with what ${p.inviter} sees.`,
    verb: p.device_of ? "Make it mine" : "Join",
    fields: () => [
      h("dl", { class: "facts panel" }, facts([
        ["Fingerprint", h("code", null, p.fingerprint)],
        ["Will run", p.vm ? p.vm.image_title : p.container ? `A container: ${p.container.image_title}` : p.integrated && "No virtual machine: this computer itself becomes the clan’s machine"],
        ["Not now", p.container?.problem && [p.container.problem.why ?? p.container.problem.message, ...p.container.problem.hints.slice(0, 1)].join("; ")],
        ["Controller", p.integrated && `${p.integrated.socket}: ${p.integrated.problem ? p.integrated.problem.message : "it runs, and is free"}`],
        ["Needs", p.vm && `${bytes(p.vm.memory)} of memory, up to ${bytes(p.vm.disk)} of disk beside the image’s ${bytes(p.vm.download.total)}`],
        ["Takes", p.container && `${bytes(p.container.download.total)} of disk for the image, some ${bytes(p.container.unpacked)} to unpack it, and what it writes`],
        ["Download", (p.vm ?? p.container) && download((p.vm ?? p.container).download)],
        ["Applications", (p.vm || p.container) && ((p.applications ?? []).join(", ") || "None that is named")],
        ["Network", networkWord(p.network_layer)],
        ["Runs by", p.vm && runsBy(p)],
      ])),
      p.warnings.map((warning) => h("p", { class: "form-error" }, prose(warning))),
      field("Who may steer this computer’s machine, with a terminal on it", h("select", { name: "control" },
        Object.entries(CONTROL_WORD).map(([mode, word]) => h("option", { value: mode, selected: mode === p.control_mode }, word)))),
      p.device_of || field("Your name", h("input", { name: "person", required: true, pattern: NAME, autocomplete: "username", title: NAME_HELP })),
      field("Name of this computer", h("input", { name: "machine", required: true, pattern: NAME, title: NAME_HELP, value: machineName(p.machines) })),
      p.vm && lock.fields(),
    ],
    done: async ({ person, machine, control, ...typed }) => {
      await call("POST", "/joins", { link, person: p.device_of ?? person, machine, control, ...home, ...agreed(p), ...lock.chosen(typed) });
    },
  });
}

function askCreate() {
  ask({
    title: "Found a clan",
    text: "A small virtual machine on this computer becomes its first machine, or a container, or this computer itself.",
    verb: "Found it",
    fields: () => [
      field("Name of the clan", h("input", { name: "name", required: true, pattern: NAME, title: NAME_HELP, placeholder: "family" })),
      field("Your name", h("input", { name: "person", required: true, pattern: NAME, autocomplete: "username", title: NAME_HELP })),
      field("Name of this computer", h("input", { name: "machine", required: true, pattern: NAME, title: NAME_HELP, placeholder: "laptop" })),
      homeFields(),
      lock.fields(),
    ],
    done: async ({ name, person, machine, integrate, container, ...typed }) => {
      await call("POST", "/clans", { name, person, machine, ...homeOf(integrate, container), ...lock.chosen(typed) });
    },
  });
}

const KIND_WORD = {
  vm: () => "A virtual machine",
  container: () => "A container",
  integrated: (vm) => `This computer itself, by the controller at ${vm.socket}`,
};

const NAME = "[A-Za-z0-9]([A-Za-z0-9\\-]*[A-Za-z0-9])?";
const NAME_HELP = "Letters a to z, digits and inner hyphens";

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
  } catch {
    announce("The browser did not allow copying: select the text and copy it");
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Pieces

/** As a sentence of its own: capital letter, full stop. */
function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

/** The same, with what is to be typed somewhere set apart. */
function prose(text) {
  return marked(sentence(text));
}

function marked(text) {
  return text.split("`").map((part, n) => (n % 2 ? h("code", null, part) : part));
}

const dot = (tone) => h("span", { class: `dot ${tone}`, "aria-hidden": "true" });
const stateWord = (tone, word) => h("span", { class: "state" }, dot(tone), word);
const facts = (rows) => rows.filter(([, value]) => value).flatMap(([name, value]) => [h("dt", null, name), h("dd", null, value)]);

/** A word whose reason shows on hover and on focus. */
function tip(id, word, reason) {
  if (!reason) return h("span", null, word);
  return h("button", { type: "button", class: "tip", "aria-describedby": id }, word, h("span", { class: "tip-text", role: "tooltip", id }, prose(reason)));
}

function problemBox(problem, onclose) {
  const kind = problem.severity === "warning" ? "warning" : "error";
  return h("div", { key: problem.key ?? `${problem.clan} ${problem.message}`, class: `problem ${kind}` },
    ICON.attention(),
    h("p", null, h("span", { class: "visually-hidden" }, kind === "error" ? "Error: " : "Warning: "), h("strong", null, problem.clan ? `${problem.clan}: ` : "", prose(problem.why ? `${problem.message}: ${problem.why}` : problem.message))),
    (problem.hints ?? []).length > 0 && h("p", null, problem.hints.map((hint) => [prose(hint), " "])),
    onclose && h("p", null, h("button", { type: "button", class: "button small", onclick: onclose }, "Dismiss")));
}

function problemsOf(clans) {
  // What the controllers say is among them.
  const { problems } = state.status;
  const names = new Set(clans.map((c) => c.name));
  const all = [
    ...state.notices.map((n) => problemBox(n, () => { state.notices = state.notices.filter((other) => other !== n); render(); })),
    ...problems.filter((p) => !p.clan || names.has(p.clan)).map((p) => problemBox(p)),
    ...clans.filter((c) => !c.online && c.phase === "ready" && c.as_of).map((c) => problemBox({ severity: "warning", clan: c.name, message: `its machine here does not answer; what you see is as of ${ago(c.as_of)}` })),
  ];
  return all.length > 0 && h("section", { key: "problems", "aria-label": "What needs attention" }, all);
}

function serviceCard(clan, service) {
  const key = `open ${clan.id} ${service.name} ${service.machine}`;
  const busy = state.busy.has(key);
  return h("li", { class: "card", key },
    h("div", { class: "card-head" },
      h("span", { class: `tile tile-${hue(service.name)}`, "aria-hidden": "true" }, [...service.name][0]),
      h("div", null, h("h3", null, service.title || service.name), h("p", null, `${service.name} on ${service.machine}`))),
    h("div", { class: "card-foot" },
      service.healthy ? stateWord("good", "Works") : stateWord("bad", "Down"),
      service.kind === "http"
        ? h("button", { type: "button", class: "button primary", disabled: busy, "aria-label": `Open ${service.title || service.name} in a new window`, onclick: () => openService(clan, service) }, busy ? "Opening…" : "Open", ICON.open())
        : h("code", { class: "small" }, `${service.host_name}:${service.port}`)));
}

function servicesSection(clan, heading) {
  return h("section", { key: `services ${clan.id}`, "aria-label": heading },
    h("div", { class: "section-head" }, h("h2", null, heading)),
    clan.services.length
      ? h("ul", { class: "cards" }, clan.services.map((service) => serviceCard(clan, service)))
      : h("p", { class: "panel empty" }, clan.online ? "No machine offers a service yet." : "Services show once this computer’s machine runs."));
}

// Charts: each value is a point in the last two minutes; they move left as time passes.

function line(points, max) {
  const now = state.status.now;
  return points.map(([at, value]) => `${(100 - ((now - at) / WINDOW_MS) * 100).toFixed(2)},${(30 - Math.min(1, value / max) * 28).toFixed(2)}`);
}

function spark(kind, label, series, max) {
  const [first, second] = series.map((points) => line(points, max));
  const area = first.length > 1 && `${first[0].split(",")[0]},32 ${first.join(" ")} ${first.at(-1).split(",")[0]},32`;
  return h("svg:svg", { class: `spark ${kind}`, viewBox: "0 0 100 32", preserveAspectRatio: "none", role: "img", "aria-label": label },
    area && h("svg:polygon", { class: "area", points: area }),
    second && h("svg:polyline", { class: "line second", points: second.join(" ") }),
    h("svg:polyline", { class: "line", points: first.join(" ") }));
}

function rates(points, name) {
  return points.slice(1).map((p, i) => [p.at, Math.max(0, (p[name] - points[i][name]) / Math.max(0.5, (p.at - points[i].at) / 1000))]);
}

function stat(kind, name, value, unit, detail, label, series, max) {
  return h("div", { class: "panel stat", key: kind },
    h("p", { class: "stat-name" }, name),
    h("p", { class: "stat-value" }, value, " ", h("small", null, unit)),
    h("p", { class: "stat-detail" }, detail),
    spark(kind, label, series, max));
}

function statsSection(clan, vm) {
  const points = (state.history.get(vm.id) ?? []).filter((p) => state.status.now - p.at <= WINDOW_MS);
  const [tone, word] = VM_WORD[vm.state];
  const busy = state.busy.has(`vm ${vm.id}`) || Boolean(vm.task);
  // The controller of an integrated machine is a service of the computer, and not for the manager to start or stop.
  const run = vm.flavour === "integrated" || vm.state === "locked" ? null : vm.state === "stopped" || vm.state === "failed"
    ? h("button", { type: "button", key: "start", class: "button small", disabled: busy, onclick: () => startVm(vm) }, ICON.start(), "Start")
    : h("button", { type: "button", key: "stop", class: "button small", disabled: busy, onclick: () => stopVm(vm) }, ICON.stop(), "Stop");
  const head = h("div", { class: "section-head" },
    h("h2", null, "This computer’s machine"),
    h("div", { class: "sub" }, stateWord(tone, `${vm.machine}: ${word.toLowerCase()} for ${span(state.status.now - vm.since)}`), run, lock.button(vm, busy)));
  const now = points.at(-1) ?? vm.stats;
  if (!now || ["stopped", "locked", "failed"].includes(vm.state)) {
    return h("section", { key: `stats ${vm.id}`, "aria-label": "This computer’s machine" }, head,
      h("p", { class: "panel empty" }, vm.reason ? prose(vm.reason) : vm.state === "stopped" ? "It is stopped." : "Statistics show once it has started."));
  }
  const over = "last two minutes";
  const percent = now.cpu_permille / 10;
  const [received, sent] = [rates(points, "net_received"), rates(points, "net_sent")];
  const [down, up] = [received.at(-1)?.[1] ?? 0, sent.at(-1)?.[1] ?? 0];
  const busiest = Math.max(8192, ...received.map((r) => r[1]), ...sent.map((r) => r[1]));
  return h("section", { key: `stats ${vm.id}`, "aria-label": "This computer’s machine" }, head,
    h("div", { class: "stats" },
      stat("cpu", "Processor", percent < 10 ? percent.toFixed(1) : percent.toFixed(0), "%", vm.cpus ? count(vm.cpus, "processor") : "of this computer",
        `Processor use, ${over}: now ${percent.toFixed(0)} %`, [points.map((p) => [p.at, p.cpu_permille])], 1000),
      stat("memory", "Memory", bytes(now.memory_used), "", `of ${bytes(now.memory_total)}`,
        `Memory use, ${over}: now ${bytes(now.memory_used)} of ${bytes(now.memory_total)}`, [points.map((p) => [p.at, p.memory_used])], now.memory_total),
      stat("disk", "Disk", bytes(now.disk_used), "", `of ${bytes(now.disk_total)}`,
        `Disk use, ${over}: now ${bytes(now.disk_used)} of ${bytes(now.disk_total)}`, [points.map((p) => [p.at, p.disk_used])], now.disk_total),
      stat("net", "Network", `↓ ${bytes(down)}`, "/s", `↑ ${bytes(up)}/s`,
        `Network, ${over}: now ${bytes(down)} per second received, ${bytes(up)} sent`, [received, sent], busiest)));
}

function machineState(clan, machine) {
  if (machine.this) {
    const vm = state.status.vms.find((v) => v.id === clan.id);
    if (vm) return VM_WORD[vm.state];
  }
  return machine.path && clan.online ? ["good", "Online"] : ["idle", "Offline"];
}

function pathCell(clan, machine) {
  const { path } = machine;
  if (machine.this) return h("span", null, "This computer");
  if (!path) return h("span", { class: "muted" }, machine.last_seen ? `seen ${ago(machine.last_seen)}` : "never seen");
  const word = path.rtt_us === null || path.rtt_us === undefined ? PATH_WORD[path.kind] : `${PATH_WORD[path.kind]}, ${rtt(path.rtt_us)}`;
  return tip(`why-${clan.id}-${machine.id}`, h("span", { class: "num" }, word), path.why);
}

// The roles are there because a table that is laid out as a list, on narrow screens, is no table to a screen reader.
function machinesSection(clan) {
  const cell = (label, ...inside) => h("td", { role: "cell", "data-label": label }, ...inside);
  return h("section", { key: `machines ${clan.id}`, "aria-label": "Machines" },
    h("div", { class: "section-head" }, h("h2", null, "Machines"), h("span", { class: "muted small" }, count(clan.machines.length, "machine"))),
    clan.machines.length === 0
      ? h("p", { class: "panel empty" }, "They show once this computer’s machine runs.")
      : h("div", { class: "panel" }, h("table", { class: "table", role: "table" },
          h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ["Machine", "State", "Path", "Owner", "Control"].map((name) => h("th", { role: "columnheader", scope: "col" }, name)))),
          h("tbody", { role: "rowgroup" }, clan.machines.map((machine) => h("tr", { role: "row", key: machine.id },
            cell("Machine", h("a", { href: `#/clan/${clan.id}/machine/${machine.id}` }, machine.name)),
            cell("State", stateWord(...machineState(clan, machine))),
            cell("Path", pathCell(clan, machine)),
            cell("Owner", h("span", { class: "wrap" }, machine.owner_name ?? "unknown")),
            cell("Control", machine.control_mode ? tip(`control-${clan.id}-${machine.id}`, machine.control_mode, controlWord(machine, CONTROL_WORD)) : h("span", { class: "muted" }, "unknown"))))))));
}

function peopleSection(clan) {
  return h("section", { key: `people ${clan.id}`, "aria-label": "People" },
    h("div", { class: "section-head" }, h("h2", null, "People"), h("span", { class: "muted small" }, count(clan.people.length, "person", "people"))),
    h("ul", { class: "panel people" }, clan.people.map((person) => h("li", { key: person.id },
      h("span", { class: `avatar tile-${hue(person.name)}`, "aria-hidden": "true" }, [...person.name][0]),
      h("span", { class: "who" }, person.name, person.this && h("span", { class: "muted" }, " (you)")),
      h("span", { class: "tag" }, person.role)))));
}

// ---------------------------------------------------------------------------------------------------------------
// Pages

const journal = journals({ h, call, ask, ago, span, prose, segment, render });
const lock = locks({ h, call, ask, act, field, segment, icon: ICON, Refusal });

function clanHead(clan, level) {
  const online = clan.machines.filter((m) => machineState(clan, m)[0] === "good").length;
  const may = clan.online && (clan.role === "owner" || clan.role === "admin");
  return h("header", { class: "page-head", key: `head ${clan.id}` },
    h("div", null,
      h(level, null, clan.name),
      h("div", { class: "sub" },
        clan.phase !== "ready" && stateWord("warn", PHASE_WORD[clan.phase]),
        clan.role && h("span", null, `You are ${clan.role}`),
        clan.machines.length > 0 && h("span", null, `${online} of ${count(clan.machines.length, "machine")} online`),
        clan.people.length > 0 && h("span", null, count(clan.people.length, "person", "people")),
        h("span", null, "Fingerprint ", h("code", null, clan.fingerprint)))),
    may && h("div", { class: "actions" }, h("button", { type: "button", class: "button primary", onclick: () => askInvite(clan) }, ICON.invite(), "Invite")));
}

function clanParts(clan) {
  const vm = state.status.vms.find((v) => v.id === clan.id);
  return [
    servicesSection(clan, "Services"),
    vm && statsSection(clan, vm),
    h("div", { class: "two-columns", key: `columns ${clan.id}` }, machinesSection(clan), clan.people.length > 0 && peopleSection(clan)),
  ];
}

function overview() {
  const { status } = state;
  if (status.clans.length === 0) {
    return [
      h("h1", { class: "visually-hidden", key: "title" }, "Clan"),
      problemsOf([]),
      h("section", { class: "panel door", key: "door" },
        h("h2", null, "You are in no clan yet"),
        h("p", null, "A clan is a private network of people and their machines. Nobody hosts it: it lives on your computers."),
        h("div", { class: "actions" },
          h("button", { type: "button", class: "button primary", onclick: () => askJoin() }, ICON.link(), "Join with a link"), " ",
          h("button", { type: "button", class: "button", onclick: askCreate }, "Found a clan")),
        h("p", { class: "small" }, "Or in a terminal: ", h("code", null, "clan join LINK"), ", ", h("code", null, "clan create NAME"))),
    ];
  }
  if (status.clans.length === 1) return [problemsOf(status.clans), clanHead(status.clans[0], "h1"), clanParts(status.clans[0])];
  return [
    h("h1", { key: "title", class: "page-title" }, "Overview"),
    problemsOf(status.clans),
    status.clans.flatMap((clan) => [h("section", { class: "clan-block", key: `block ${clan.id}`, "aria-label": clan.name }, clanHead(clan, "h2"), clanParts(clan))]),
  ];
}

function clanPage(clan) {
  return [
    problemsOf([clan]),
    clanHead(clan, "h1"),
    clanParts(clan),
  ];
}

/** That the clan publishes another image than the machine here runs, and how to take it. */
function publishedNote(clan, { published }) {
  return h("section", { key: "published", class: "panel published", "aria-label": "Another image" },
    h("p", null, `${clan.name} publishes another image than this machine runs: ${published.title} (${short(published.image)}).`),
    h("p", { class: "row" },
      h("button", { type: "button", class: "button", disabled: state.busy.has(`update ${clan.id}`), onclick: () => askUpdate(clan, published) }, "Take it…"),
      h("span", { class: "small" }, "Or in a terminal: ", h("code", null, `clan vm update ${clan.name}`))));
}

/** Shows what an update would do, and asks. What was shown is what is done, whatever the clan publishes meanwhile. */
function askUpdate(clan, published) {
  const path = `/vms/${segment(clan.id)}/update`;
  const request = { image: published.image };
  act(`update ${clan.id}`, async () => {
    const plan = await call("POST", `${path}/preview`, request);
    ask({
      title: `Take what ${clan.name} publishes?`,
      text: "The machine is stopped, and started with the other image. What is on its disk stays; if it is not well afterwards, it gets its previous image back.",
      verb: "Update",
      fields: () => [
        h("dl", { class: "facts panel" }, facts([
          ["Runs now", plan.before && h("code", null, short(plan.before))],
          ["Next", `${plan.image_title} (${short(plan.image)})`],
          ["Download", plan.source === "members" && download(plan.download)],
        ])),
        plan.stays.map((line) => h("p", { class: "form-error" }, prose(line))),
      ],
      done: () => call("POST", path, request).then(() => undefined),
    });
  });
}

function machinePage(clan, machine) {
  const vm = machine.this && state.status.vms.find((v) => v.id === clan.id);
  const services = clan.services.filter((s) => s.machine === machine.name);
  const units = vm ? state.units.get(vm.id) ?? [] : [];
  const [tone, word] = machineState(clan, machine);
  return [
    h("header", { class: "page-head", key: "head" },
      h("div", null,
        h("p", { class: "crumb" }, h("a", { href: `#/clan/${clan.id}` }, clan.name)),
        h("h1", null, machine.name),
        h("div", { class: "sub" }, stateWord(tone, word), h("span", null, `Owner: ${machine.owner_name ?? "unknown"}`), !machine.this && h("span", null, pathCell(clan, machine))))),
    problemsOf([clan]),
    vm && vm.published && publishedNote(clan, vm),
    services.length > 0 && servicesSection({ ...clan, services }, `Services of ${machine.name}`),
    vm && statsSection(clan, vm),
    journal.section(clan, machine),
    h("section", { key: "details", "aria-label": "Details" },
      h("div", { class: "section-head" }, h("h2", null, "Details")),
      h("dl", { class: "panel facts" }, facts([
        ["Name in the clan", h("code", null, machine.host_name)],
        ["Address", h("code", null, machine.address)],
        ["Key", h("code", null, machine.id)],
        ["Path", !machine.this && machine.path && `${PATH_WORD[machine.path.kind]}${machine.path.remote ? ` to ${machine.path.remote}` : ""}: ${machine.path.why}`],
        ["Last heard of", !machine.this && (machine.last_seen ? ago(machine.last_seen) : "never")],
        ["Version", machine.version],
        ["Runs by", vm && vm.accelerator && `${ACCELERATOR_WORD[vm.accelerator]}: ${state.status.accelerator.reason}`],
        ["Kind", vm && (KIND_WORD[vm.flavour](vm))],
        ["Memory", vm && vm.flavour === "vm" && bytes(vm.memory)],
        ["Disk", vm && vm.flavour === "vm" && `up to ${bytes(vm.disk)}; takes ${bytes(vm.disk_used)} of this computer now`],
        ["Image", (machine.image ?? vm?.image) && h("code", null, short(machine.image ?? vm.image))],
        ["Control", vm ? CONTROL_WORD[vm.control_mode] : controlWord(machine, CONTROL_WORD)],
        ["Restarts", vm && vm.restarts > 0 && String(vm.restarts)],
        ["System units", units.length > 0 && units.map((u) => `${u.name}: ${u.state}`).join(", ")],
      ]))),
  ];
}

function door(title, text, command) {
  return h("section", { class: "panel door", key: title },
    h("svg:svg", { viewBox: "0 0 32 32", width: 48, height: 48, "aria-hidden": "true" },
      h("svg:rect", { class: "brand-tile", width: 32, height: 32, rx: 9 }), h("svg:path", { class: "brand-lines", d: "M16 9.5 9 21.5h14z" }),
      [[16, 9.5], [9, 21.5], [23, 21.5]].map(([cx, cy]) => h("svg:circle", { class: "brand-dot", cx, cy, r: 3.4 }))),
    h("h1", null, title), h("p", null, text), h("code", { class: "command" }, command));
}

// ---------------------------------------------------------------------------------------------------------------
// The frame: tree, tasks, what the top bar says

function treeNav(route) {
  const here = (on) => (on ? "page" : null);
  return [
    h("ul", { key: "home" }, h("li", null, h("a", { href: "#/", "aria-current": here(!route.clan) }, ICON.home(), h("span", null, "Overview")))),
    state.status.clans.length > 0 && h("p", { class: "label", key: "label" }, "Networks"),
    h("ul", { key: "clans" }, state.status.clans.map((clan) => h("li", { class: "clan", key: clan.id },
      h("a", { href: `#/clan/${clan.id}`, "aria-current": here(route.clan === clan && !route.machine) }, ICON.clan(), h("span", null, clan.name), clan.phase !== "ready" && h("span", { class: "tag" }, PHASE_WORD[clan.phase])),
      clan.machines.length > 0 && h("ul", null, clan.machines.map((machine) => {
        const [tone, word] = machineState(clan, machine);
        return h("li", { key: machine.id },
          h("a", { href: `#/clan/${clan.id}/machine/${machine.id}`, "aria-current": here(route.machine === machine) },
            dot(tone), h("span", null, machine.name, h("span", { class: "visually-hidden" }, `, ${word}`)), machine.this && h("span", { class: "tag" }, "here")));
      }))))),
    state.status.clans.length > 0 && h("div", { class: "tree-actions", key: "actions" },
      h("button", { type: "button", class: "button small", onclick: () => askJoin() }, "Join a clan"),
      h("button", { type: "button", class: "button small", onclick: askCreate }, "Found a clan")),
  ];
}

const UNHEARD = "No other machine of the clan was there to hear it. They show this one until one of its admins takes it off the list: clan revoke machine";
const isUnheard = (task) => task.state === "done" && task.result?.kind === "left" && !task.result.heard;

function taskRow(task) {
  const running = task.state === "running";
  const step = task.steps.find((s) => s.state === "running");
  const { progress } = task;
  const done = task.steps.filter((s) => s.state === "done" || s.state === "skipped").length;
  const known = running && progress?.total > 0;
  const left = known && progress.rate > 0 && progress.total > progress.done ? `, ${span(((progress.total - progress.done) / progress.rate) * 1000)} left` : "";
  const figures = known ? `${bytes(progress.done)} of ${bytes(progress.total)}` : running && step ? span(step.elapsed_ms) : "";
  const now = [step && step.title, task.detail && task.detail !== step?.title && task.detail, known && progress.rate > 0 && `${bytes(progress.rate)}/s${left}`].filter(Boolean).join(" · ");
  const bar = known
    ? h("progress", { key: "known", max: progress.total, value: progress.done, "aria-label": `${task.title}: ${step?.title ?? ""}` })
    : h("progress", { key: "unknown", "aria-label": `${task.title}: step ${done + 1} of ${task.steps.length || 1}` });
  const ended = { done: ["good", "Done"], failed: ["bad", "Failed"], cancelled: ["idle", "Cancelled"] }[task.state];
  const why = task.problem && task.state === "failed" ? [task.problem.why ? `${task.problem.message}: ${task.problem.why}` : task.problem.message, ...(task.problem.hints ?? [])].map((text) => [prose(text), " "]) : "";
  const unheard = isUnheard(task);
  return h("li", { class: "task", key: task.id },
    h("span", { class: "task-title" }, task.title),
    h("span", { class: "task-step" }, running ? (now ? marked(now) : "Starting") : unheard ? UNHEARD : why),
    running ? bar : unheard ? stateWord("warn", "Done, unheard") : stateWord(...ended),
    h("span", { class: "task-figures" }, running ? figures : task.finished ? span(task.finished - task.started) : ""),
    running ? h("button", { type: "button", class: "button small", disabled: state.busy.has(`task ${task.id}`), "aria-label": `Cancel: ${task.title}`, onclick: () => cancelTask(task) }, "Cancel") : h("span", null));
}

function tasksPanel() {
  const { tasks, now } = state.status;
  const shown = tasks.filter((t) => t.state === "running" || (t.finished && now - t.finished < (isUnheard(t) ? UNHEARD_MS : RECENT_MS))).slice(0, 6);
  const running = shown.filter((t) => t.state === "running").length;
  return [
    h("div", { class: "tasks-head", key: "head" }, h("h2", { id: "tasks-heading" }, "Tasks"), h("span", { class: "muted small" }, running ? `${running} running` : "nothing running")),
    shown.length > 0 && h("ul", { key: "list" }, shown.map(taskRow)),
  ];
}

function readRoute() {
  const [, clanId, machineId] = /^#\/clan\/([a-z2-7]+)(?:\/machine\/([a-z2-7]+))?$/.exec(location.hash) ?? [];
  const clan = state.status?.clans.find((c) => c.id === clanId);
  return { clan, machine: clan?.machines.find((m) => m.id === machineId), gone: Boolean(clanId && !clan) };
}

function render() {
  const [tree, main, tasks, live] = ["tree", "main", "tasks", "live"].map((id) => document.getElementById(id));
  const inside = state.status !== null && state.link !== "signed-out";
  document.body.classList.toggle("outside", !inside);
  if (state.link === "signed-out") {
    state.status = null;
    patch(live, []);
    patch(main, [door("You are not signed in", "Nobody else on this computer can see your clans. To get in, run this in a terminal:", "clan web")]);
    document.title = "Clan: sign in";
    return;
  }
  if (!inside) {
    if (state.link === "lost") patch(main, [door("The manager does not answer", "This page shows your clans as soon as it runs. To start it, run this in a terminal:", "clan manager")]);
    return;
  }
  const { status } = state;
  const route = readRoute();
  patch(live, state.link === "ok"
    ? [dot("good"), h("span", { class: "host" }, status.host.name)]
    : [dot("bad"), "The manager does not answer; trying again"]);
  patch(tree, treeNav(route));
  patch(main, route.machine ? machinePage(route.clan, route.machine) : route.clan ? clanPage(route.clan) : overview());
  patch(tasks, tasksPanel());
  document.title = route.machine ? `${route.machine.name} · ${route.clan.name} · Clan` : route.clan ? `${route.clan.name} · Clan` : "Clan";
}

// ---------------------------------------------------------------------------------------------------------------

const menu = document.getElementById("menu");
const tree = document.getElementById("tree");

function openTree(open) {
  tree.classList.toggle("open", open);
  menu.setAttribute("aria-expanded", String(open));
}

menu.addEventListener("click", () => openTree(!tree.classList.contains("open")));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && tree.classList.contains("open")) {
    openTree(false);
    menu.focus();
  }
});
document.addEventListener("click", (event) => {
  if (!tree.contains(event.target) && !menu.contains(event.target)) openTree(false);
});
window.addEventListener("hashchange", () => {
  takeOpened();
  // The skip link names an element, not a page.
  if (!location.hash.startsWith("#/") && location.hash !== "") return;
  openTree(false);
  render();
  document.getElementById("main").focus({ preventScroll: true });
  window.scrollTo(0, 0);
});

async function run() {
  for (;;) {
    if (document.visibilityState === "visible") await refresh();
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, state.link === "signed-out" ? 3 * EVERY_MS : EVERY_MS);
      if (document.visibilityState !== "visible") document.addEventListener("visibilitychange", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
  }
}

takeOpened();
run();
