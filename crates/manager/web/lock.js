// Encrypted disks: unlocking, locking, and the passphrase of a new one. The page's own tools come in as an argument: see `app.js`.
// INVARIANT: a passphrase is in its field until the form is closed, and nowhere else on the page.

/** The manager takes no shorter one. */
const LEAST = 8;

export function locks({ h, call, ask, act, field, segment, icon, Refusal }) {
  const pathOf = (vm, verb) => `/vms/${segment(vm.id)}/${verb}`;
  // Browsers offer to keep what `autocomplete` calls a password.
  const secret = (name, label, more) => field(label, h("input", { name, type: "password", autocomplete: "off", spellcheck: "false", ...more }));

  function askUnlock(vm) {
    ask({
      title: `Unlock the disk of ${vm.machine}?`,
      text: "The manager keeps the passphrase in memory only: when it is started anew, the disk is locked again.",
      verb: "Unlock",
      anew: true,
      fields: () => [secret("passphrase", "Passphrase of the disk", { required: true })],
      done: ({ passphrase }) => call("POST", pathOf(vm, "unlock"), { passphrase }).then(() => undefined),
    });
  }

  function askChange(vm) {
    ask({
      title: `Change the passphrase of ${vm.machine}?`,
      text: "The old one opens the disk no more, nor the copies that are on this computer. Who has an older copy of the disk elsewhere still opens that with it.",
      verb: "Change it",
      anew: true,
      fields: () => [secret("old", "Passphrase of the disk now", { required: true }), secret("passphrase", "New passphrase", { required: true, minlength: LEAST }), secret("again", "The new one again", { required: true })],
      done: async ({ old, ...typed }) => {
        await call("POST", pathOf(vm, "passphrase"), { old, new: chosen(typed).passphrase });
      },
    });
  }

  /** What can be done about a machine's lock now. */
  function button(vm, disabled) {
    if (vm.locked) {
      return h("button", { type: "button", key: "unlock", class: "button small unlock", disabled, onclick: () => askUnlock(vm) }, icon.unlock(), "Unlock…");
    }
    return vm.encrypted && [
      h("button", { type: "button", key: "passphrase", class: "button small", disabled, onclick: () => askChange(vm) }, "Passphrase…"),
      vm.state === "stopped" && h("button", { type: "button", key: "lock", class: "button small", disabled, onclick: () => act(`vm ${vm.id}`, () => call("POST", pathOf(vm, "lock"), {})) }, icon.lock(), "Lock"),
    ];
  }

  /** For a form that makes a machine. */
  function fields() {
    return h("fieldset", { key: "encryption" }, h("legend", null, "Encrypted disk"),
      h("p", { class: "muted small" }, "With a passphrase, the virtual machine’s disk opens by nothing else, and nobody can tell you what it was. Whenever the manager was started anew, the machine waits for it."),
      secret("passphrase", "Passphrase, or nothing", { minlength: LEAST }),
      secret("again", "The same again"));
  }

  /** What such a form asks the manager for. */
  function chosen({ passphrase, again }) {
    if ((passphrase ?? "") !== (again ?? "")) throw new Refusal({ message: "the two passphrases are not the same", hints: ["type both again"] });
    return passphrase ? { passphrase } : {};
  }

  return { button, fields, chosen };
}
