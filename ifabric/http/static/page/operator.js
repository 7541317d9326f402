// Acting: the token, and the dialog that says what will happen before it does, and what became of it after.

import { $, el, say, usd } from "./dom.js";
import { act, isOperator, onOperator, setOperator, setViewer } from "./api.js";

const dialog = $("dialog");
const actors = new Set();

/** Calls back whenever acting becomes possible or stops being so. */
export const onActing = (told) => { actors.add(told); told(isOperator()); };
export const acting = isOperator;

function open(title, body, { onClose } = {}) {
  dialog.replaceChildren(el("h2", { id: "dialog-title" }, title), ...body);
  dialog.onclose = () => { dialog.replaceChildren(); onClose?.(); };
  if (!dialog.open) dialog.showModal();
}

const close = () => dialog.close();
const buttons = (...all) => el("div", { class: "dialog-buttons" }, all);
const plain = (text, click) => el("button", { type: "button", class: "button", on: { click } }, text);

function tokenForm(title, words, submit, extra = []) {
  const input = el("input", { type: "password", id: "token", required: true, autocomplete: "off", spellcheck: "false", maxlength: "4096" });
  const form = el("form", { on: { submit: (e) => { e.preventDefault(); submit(input.value.trim()); input.value = ""; close(); } } },
    words, el("label", { for: "token" }, "Token"), input, extra, buttons(plain("Not now", close), el("button", { class: "button primary" }, "Use it")));
  open(title, [form]);
  input.focus();
}

export function askOperator(why = "") {
  const keep = el("input", { type: "checkbox", id: "keep" });
  tokenForm("Act as an operator", [
    why && el("p", { class: "outcome bad", role: "alert" }, why),
    el("p", {}, "With a token you can cancel and requeue tasks, open and close breakers, set limits and kill sandboxes. It is checked when you act, and each act is audited under its owner's name."),
  ], (token) => setOperator(token, keep.checked), [el("label", { class: "check", for: "keep" }, keep, "Keep it until this tab is closed. Otherwise a reload forgets it.")]);
}

export function askViewer(why, then) {
  tokenForm("This page asks who looks", [why && el("p", { class: "outcome bad", role: "alert" }, why), el("p", {}, "The daemon wants a token before it shows anything (page.viewer_token_file).")],
    (token) => { setViewer(token); then(); });
}

function leave() {
  open("Operator", [
    el("p", {}, "A token is in use: actions are shown, and each asks before it is done."),
    buttons(plain("Close", close), el("button", { type: "button", class: "button primary", id: "forget", on: { click: () => { setOperator("", false); close(); } } }, "Forget the token")),
  ]);
}

/** How a refusal reads: what it is, what the daemon says, and what can be done about it. */
function refused(error) {
  if (error.status === 401) return `Refused: acting needs an operator's token. ${error.message}`;
  if (error.status === 403) return `Refused: this token may not act here. ${error.message}`;
  if (error.status === undefined) return `Nobody answered, so it is not known whether it was done. Look before you try again. (${error.message})`;
  return `Refused: ${error.message}`;
}

/**
 * Asks, acts, and tells. `fields` are shown before the buttons; `body()` gives what is sent, or throws an Error whose
 * message says what is wrong with the fields.
 */
function confirm({ title, words, fields = [], verb, action, body, done }) {
  // One id for one dialog: who asks again because no answer came gets the first answer, and nothing is done twice.
  const id = `page-${[...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("")}`;
  const outcome = el("p", { class: "outcome", role: "status", hidden: true });
  const go = el("button", { class: "button primary", id: "confirm" }, verb);
  const cancel = plain("Leave it", close);
  cancel.id = "leave";
  const form = el("form", { on: { submit: async (e) => {
    e.preventDefault();
    if (!isOperator()) { tell(outcome, "Refused: acting needs an operator's token.", false); return; }
    let sent;
    try { sent = { ...body(), request_id: id }; } catch (error) { tell(outcome, error.message, false); return; }
    go.disabled = true;
    tell(outcome, "Asking…", null);
    try {
      tell(outcome, done(await act(action, sent)), true);
      document.dispatchEvent(new Event("acted"));
      go.remove();
      say(cancel, "Close");
      cancel.focus();
    } catch (error) {
      tell(outcome, refused(error), false);
      go.disabled = false;
      if (error.status === 401 || error.status === 403) {
        setOperator("", false);
        go.replaceWith(el("button", { type: "button", class: "button primary", id: "another", on: { click: () => askOperator() } }, "Another token…"));
      }
    }
  } } }, words.map((w) => el("p", {}, w)), fields, outcome, buttons(cancel, go));
  open(title, [form]);
  (fields.length ? form.querySelector("input") : cancel).focus();
}

function tell(outcome, text, good) {
  outcome.hidden = false;
  outcome.className = `outcome ${good === null ? "" : good ? "good" : "bad"}`;
  say(outcome, text);
}

const name = (text) => el("b", { class: "id" }, el("bdi", {}, text));

export const cancelTask = (task, holder) => confirm({
  title: "Cancel this task?", verb: "Cancel the task", action: "cancel", body: () => ({ task }),
  words: [[name(task), " is taken off the board."], holder ? ["Its holder ", name(holder), " is told at the next renewal, and what it brings back is refused."] : "Nobody holds it now.", "An operator can requeue it later."],
  done: (reply) => `Done: the task is ${reply.state ?? "cancelled"}.`,
});

export const requeueTask = (task) => confirm({
  title: "Requeue this task?", verb: "Requeue the task", action: "requeue", body: () => ({ task }),
  words: [[name(task), " goes back on the board with all its attempts. The next session that fits may take it at once."]],
  done: (reply) => `Done: the task is ${reply.state ?? "pending"}.`,
});

export const closeBreaker = (breaker) => confirm({
  title: "Close this breaker?", verb: "Close the breaker", action: "close", body: () => ({ breaker }),
  words: [["Calls through ", name(breaker), " are let through again at once, on every daemon. If the provider still fails, it opens by itself."]],
  done: (reply) => `Done: the breaker is ${reply.state ?? "closed"}.`,
});

export function openBreaker(breaker) {
  const input = el("input", { id: "breaker-name", required: true, maxlength: "64", autocomplete: "off", spellcheck: "false", placeholder: "openai/gpt-x" });
  const why = el("input", { id: "breaker-why", maxlength: "200", autocomplete: "off" });
  confirm({
    title: "Open a breaker?", verb: "Open the breaker", action: "open", body: () => ({ breaker: breaker ?? input.value.trim(), ...(why.value.trim() ? { why: why.value.trim() } : {}) }),
    words: [breaker ? ["Calls through ", name(breaker), " are refused on every daemon, until an operator closes it. No probe is sent."] : "Calls through it are refused on every daemon, until an operator closes it. No probe is sent."],
    fields: [...(breaker ? [] : [el("label", { for: "breaker-name" }, "Breaker"), input]), el("label", { for: "breaker-why" }, "Why (shown to others)"), why],
    done: (reply) => `Done: the breaker is ${reply.state ?? "open"}.`,
  });
}

export const killRun = (run, session) => confirm({
  title: "Kill this sandbox?", verb: "Kill the sandbox", action: "kill", body: () => ({ run }),
  words: [["The run ", name(run), " of ", name(session), " is ended where it stands. Its caller is told “killed”, and what it has not written is lost."]],
  done: () => "Done: the run was ended.",
});

/** Dollars as typed, to whole micro-USD, without passing through binary fractions. */
export function microUsd(text) {
  const found = /^\s*\$?\s*(\d{1,9})(?:\.(\d{1,6}))?\s*$/.exec(text);
  if (!found) throw new Error("An amount is dollars with up to six places, like 40 or 12.50.");
  return Number(found[1]) * 1_000_000 + Number((found[2] ?? "").padEnd(6, "0"));
}

export function setLimit(account, limit, window, used) {
  const amount = el("input", { id: "limit", inputmode: "decimal", autocomplete: "off" });
  if (limit !== null && limit !== undefined) amount.value = (limit / 1e6).toString();
  const none = el("input", { type: "checkbox", id: "no-limit", on: { change: () => { amount.disabled = none.checked; } } });
  const windows = el("select", { id: "window" }, ["total", "day", "month"].map((w) => el("option", { value: w }, w)));
  windows.value = window ?? "total";
  confirm({
    title: "Set this account's limit?", verb: "Set the limit", action: "limit",
    words: [[name(account), ` has ${usd(used)} spent and held now. A limit below that lets nothing more through, here and in every account below.`]],
    fields: [el("label", { for: "limit" }, "Limit in USD"), amount, el("label", { class: "check", for: "no-limit" }, none, "No limit"),
      el("label", { for: "window" }, "Counted over"), windows],
    body: () => ({ account, limit_micro_usd: none.checked ? null : microUsd(amount.value), window: windows.value }),
    done: () => "Done: the limit is set.",
  });
}

/** A button that is there only for operators. */
export function actButton(text, click, look = "") {
  return el("button", { type: "button", class: `button small act ${look}`, on: { click } }, text);
}

onOperator((is) => {
  document.documentElement.classList.toggle("acting", is);
  const button = $("operator");
  say(button, is ? "Operator: on" : "Operator");
  button.setAttribute("aria-pressed", String(is));
  for (const node of document.querySelectorAll(".operator-only")) node.hidden = !is;
  for (const told of actors) told(is);
});
$("operator").addEventListener("click", () => (isOperator() ? leave() : askOperator()));
$("breaker-new").addEventListener("click", () => openBreaker());
