// The page of one item. A place is a number of 1..count, 0 for none; `places` is the only state, and is kept in
// localStorage with the submission's key until the server has acknowledged it.
"use strict";

const form = document.getElementById("rank");
const count = Number(form.dataset.count || 0);
const cards = [...document.querySelectorAll(".card")];
const zones = [...document.querySelectorAll(".zone")];
const letter = (index) => "ABCDEFGH"[index];
const status = (text) => { document.getElementById("status").textContent = text; };
const button = (id) => document.getElementById(id);
const draftName = (digest) => `rank/${form.dataset.annotator}/${digest}`;

function newKey() { // crypto.randomUUID is not there on plain http
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function load(digest) {
  try {
    const draft = JSON.parse(localStorage.getItem(draftName(digest)));
    if (draft && draft.places.length === count && draft.key) return draft;
  } catch (error) { /* no draft, or none that can be read */ }
  return { key: newKey(), places: Array(count).fill(0) };
}

function store(digest, draft) {
  try { localStorage.setItem(draftName(digest), JSON.stringify(draft)); } catch (error) { /* private browsing: no draft */ }
}

const draft = load(form.dataset.digest);
let marked = Math.max(0, draft.places.indexOf(0));
let busy = false;

// ---------------------------------------------------------------------------------------------------------------
// Showing.

function show() {
  cards.forEach((card, index) => {
    card.classList.toggle("marked", index === marked);
    card.classList.toggle("placed", draft.places[index] > 0);
    card.querySelectorAll("input").forEach((radio) => { radio.checked = Number(radio.value) === draft.places[index]; });
  });
  zones.forEach((zone) => {
    zone.querySelectorAll(".chip").forEach((chip) => chip.remove());
    draft.places.forEach((place, index) => {
      if (place !== Number(zone.dataset.place)) return;
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.textContent = letter(index);
      chip.dataset.index = index;
      zone.append(chip);
    });
  });
  if (count) button("submit").disabled = busy || draft.places.includes(0);
}

function mark(index) {
  marked = (index + count) % count;
  cards[marked].focus();
  show();
}

function place(index, where) {
  if (where > count) return;
  draft.places[index] = where;
  store(form.dataset.digest, draft);
  const open = draft.places.filter((other) => other === 0).length;
  const said = where ? `${letter(index)} is in place ${where}` : `${letter(index)} has no place`;
  status(open ? `${said}; ${open} to go.` : `${said}. Enter submits.`);
  show();
}

function placeAndGoOn(where) {
  if (where > count) return;
  place(marked, where);
  for (let step = 1; step < count; step += 1) {
    const next = (marked + step) % count;
    if (draft.places[next] === 0) return mark(next);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Sending. The key stays the same until the server has said that it was saved, so that a repeated request is the same.

async function send(path, body, kept) {
  if (busy) return null;
  busy = true;
  show();
  try {
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const found = await answer.json();
    if (answer.ok) return found;
    status(`${found.error[0].toUpperCase()}${found.error.slice(1)}.`);
    if (answer.status === 409) setTimeout(() => location.reload(), 2500);
  } catch (error) {
    status(`Not saved: the server cannot be reached. ${kept}`);
  }
  busy = false;
  show();
  return null;
}

async function submit(verdict) {
  if (!count) return;
  if (verdict === "order" && draft.places.includes(0)) {
    status(`${letter(draft.places.indexOf(0))} has no place yet.`);
    mark(draft.places.indexOf(0));
    return;
  }
  const body = { item: Number(form.dataset.item), key: draft.key, verdict };
  if (verdict === "order") body.places = draft.places;
  store(form.dataset.digest, draft);
  if (await send("/rank", body, "Your order is kept; try again.")) {
    localStorage.removeItem(draftName(form.dataset.digest));
    location.replace("/");
  }
}

let undoKey = newKey();
async function undo() {
  const found = await send("/undo", { key: undoKey }, "Try again.");
  if (!found) return;
  undoKey = newKey();
  if (found.places) store(found.digest, { key: newKey(), places: found.places.map((level) => level + 1) });
  location.replace("/");
}

// ---------------------------------------------------------------------------------------------------------------
// Keys.

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const on = event.target;
  if (key === "u") return void (event.preventDefault(), undo());
  if (!count) return;
  const jump = "abcdefgh".slice(0, count).indexOf(key);
  if (/^[1-9]$/.test(key)) placeAndGoOn(Number(key));
  else if (key === "0" || key === "backspace") place(marked, 0);
  else if (key === "x") submit("bad");
  else if (key === "s") submit("skip");
  else if (key.length === 1 && jump >= 0) mark(jump);
  else if (key === "enter" && !on.closest("button, a")) submit("order");
  else if (on.closest("button, a, input")) return;
  else if (key === "arrowright" || key === "arrowdown") mark(marked + 1);
  else if (key === "arrowleft" || key === "arrowup") mark(marked - 1);
  else return;
  event.preventDefault();
}

// ---------------------------------------------------------------------------------------------------------------
// Dragging a letter, by mouse, pen or finger.

function zoneAt(event) {
  const found = document.elementFromPoint(event.clientX, event.clientY);
  return found && found.closest(".zone");
}

function drag(event) {
  const handle = event.target.closest(".grip, .chip");
  if (!handle || event.button) return;
  event.preventDefault();
  const index = Number((handle.closest(".card") || handle).dataset.index);
  const ghost = document.createElement("span");
  ghost.className = "chip ghost";
  ghost.textContent = letter(index);
  const follow = (moved) => {
    ghost.style.transform = `translate(${moved.clientX}px, ${moved.clientY}px)`;
    if (!ghost.isConnected) document.body.append(ghost);
    const over = zoneAt(moved);
    zones.forEach((zone) => zone.classList.toggle("over", zone === over));
  };
  const end = (last) => {
    for (const [name, listener] of listeners) document.removeEventListener(name, listener);
    ghost.remove();
    zones.forEach((zone) => zone.classList.remove("over"));
    document.body.classList.remove("dragging");
    const zone = last.type === "pointerup" && zoneAt(last);
    if (zone) place(index, Number(zone.dataset.place));
    else if (last.type === "pointerup" && handle.classList.contains("chip")) place(index, 0); // thrown out
  };
  const listeners = [["pointermove", follow], ["pointerup", end], ["pointercancel", end]];
  for (const [name, listener] of listeners) document.addEventListener(name, listener);
  document.body.classList.add("dragging");
  marked = index;
  show();
}

document.addEventListener("keydown", pressed);
button("undo").addEventListener("click", undo);
if (count) {
  form.addEventListener("submit", (event) => { event.preventDefault(); submit("order"); });
  form.addEventListener("change", (event) => place(Number(event.target.closest(".card").dataset.index), Number(event.target.value)));
  document.addEventListener("pointerdown", drag);
  button("bad").addEventListener("click", () => submit("bad"));
  button("skip").addEventListener("click", () => submit("skip"));
  cards.forEach((card, index) => card.addEventListener("focusin", () => { marked = index; show(); }));
  cards[marked].focus({ preventScroll: true });
}
show();
