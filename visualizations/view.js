// A function body over `element` (the part that is rendered again and again), `trigger`, and
// `watch` where there is one. Rendering keeps the nodes but takes back every attribute and class
// that was set here, so what is set here is set again after each rendering; and all listeners sit
// on `element`, never on a token.

const scope = element.closest('.candor-scope') || document;
const ROWS = ['probability', 'surprisal', 'entropy', 'margin', 'rank', 'origin'];
let current = null;  // position of the token that Tab reaches
let selected = null;  // position of the token whose panel is open

const tokenAt = (pos) => (pos === null ? null : element.querySelector(`[data-i="${pos}"]`));

// The token under the pointer. A character that took several tokens is split evenly among them:
// the earlier ones are empty and cannot be hit themselves.
function tokenOf(event) {
  const token = event.target.closest('[data-i]');
  if (!token || !('clientX' in event)) return token;
  const pieces = [token];
  while (pieces[0].previousElementSibling?.matches('.u')) {
    pieces.unshift(pieces[0].previousElementSibling);
  }
  const { left, width } = token.getBoundingClientRect();
  const share = Math.floor((pieces.length * (event.clientX - left)) / (width || 1));
  return pieces[Math.max(0, Math.min(pieces.length - 1, share))];
}

// ---- the tooltip: one for the whole page, text only --------------------------------------------

function tip() {
  let box = document.getElementById('candor-tip');
  if (!box) {
    box = document.createElement('div');
    box.id = 'candor-tip';
    box.className = 'candor-tip';
    box.setAttribute('role', 'tooltip');
    document.body.appendChild(box);
  }
  return box;
}

function line(box, name, value, on) {
  const row = box.appendChild(document.createElement('div'));
  row.className = on ? 'row on' : 'row';
  row.appendChild(document.createElement('span')).textContent = name;
  row.appendChild(document.createElement('b')).textContent = value;
}

function numbers(token) {
  const [logprob, entropy, margin, rank] = token.dataset.v.split(';');
  const fixed = (text, digits) => Number(text).toFixed(digits).replace('-', '−');
  const p = 100 * Math.exp(Number(logprob));
  const percent = p < 0.1 ? '< 0.1' : p > 99.95 && p < 100 ? '> 99.9' : p.toFixed(1);
  return {
    probability: logprob && `${percent} %`,
    surprisal: logprob && `${fixed(-Number(logprob) || 0, 2)} nats`,
    entropy: entropy && `${fixed(entropy, 2)} nats`,
    margin: margin && fixed(margin, 2),
    rank: rank && Number(rank).toLocaleString('en'),
    origin: /\bo-(drafted|corrected|bonus)\b/.exec(token.className)?.[1],
  };
}

function showTip(token) {
  const box = tip();
  box.textContent = '';
  const before = token.classList.contains('sp') ? token.previousSibling.data : '';
  const text = (before + token.textContent).replaceAll('\n', '⏎').replaceAll('\t', '⇥');
  const head = box.appendChild(document.createElement('div'));
  head.className = text ? 'head' : 'head part';
  head.textContent = text || 'part of a character';
  const signal = token.closest('[class*="by-"]');
  const values = numbers(token);
  for (const name of ROWS) {
    if (values[name]) {
      line(box, name, values[name], signal && signal.classList.contains(`by-${name}`));
    }
  }
  if (!values.probability) line(box, 'no numbers: nothing precedes it', '');
  const at = token.getClientRects()[0];
  if (!at) return;
  box.classList.add('on');
  const { offsetWidth: width, offsetHeight: height } = box;
  const below = at.bottom + 8;
  const top = below + height > window.innerHeight ? Math.max(4, at.top - height - 8) : below;
  const left = Math.min(at.left, window.innerWidth - width - 8);
  box.style.top = `${top}px`;
  box.style.left = `${Math.max(8, left)}px`;
}

const hideTip = () => tip().classList.remove('on');

// ---- one token is reachable with Tab, the arrows move from there -------------------------------

function roam(token) {
  const former = tokenAt(current);
  if (former && former !== token) {
    for (const name of ['role', 'aria-describedby', 'aria-pressed']) former.removeAttribute(name);
    former.tabIndex = -1;
  }
  current = token.dataset.i;
  token.tabIndex = 0;
  token.setAttribute('role', 'button');
  token.setAttribute('aria-describedby', 'candor-tip');
  token.setAttribute('aria-pressed', String(current === selected));
}

function mark(pos) {
  for (const former of element.querySelectorAll('[data-i].sel')) former.classList.remove('sel');
  selected = String(pos);
  const token = tokenAt(selected);
  if (token) {
    token.classList.add('sel');
    roam(token);
  }
  return token;
}

function choose(pos, row) {
  scope.dispatchEvent(new CustomEvent('candor:select', { detail: { pos: Number(pos) } }));
  const at = { pos: Number(pos) };
  trigger('select', row === undefined ? at : { ...at, row: Number(row) });
}

function beside(token, key) {
  const rtl = element.matches(':dir(rtl)');
  const forward = key === (rtl ? 'ArrowLeft' : 'ArrowRight');
  if (key === 'Home') return element.querySelector('[data-i]');
  if (key === 'End') return element.querySelector('[data-i]:last-of-type');
  return forward ? token.nextElementSibling : token.previousElementSibling;
}

// ---- listeners ---------------------------------------------------------------------------------

let pointed = null;
element.addEventListener('mousemove', (event) => {
  const token = tokenOf(event);
  if (token === pointed) return;
  pointed = token;
  if (token) showTip(token);
  else hideTip();
});
element.addEventListener('mouseleave', () => {
  pointed = null;
  hideTip();
});
element.addEventListener('focusin', (event) => {
  const token = tokenOf(event);
  if (!token) return;
  roam(token);
  showTip(token);
});
element.addEventListener('focusout', hideTip);
window.addEventListener('scroll', hideTip, { passive: true, capture: true });

element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') hideTip();
  const token = tokenOf(event);
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Enter' || event.key === ' ') {
    event.preventDefault();
    choose(token.dataset.i);
  } else if (['ArrowLeft', 'ArrowRight', 'Home', 'End'].includes(event.key)) {
    event.preventDefault();
    const next = beside(token, event.key);
    if (next && next.matches('[data-i]')) next.focus();
  }
});

element.addEventListener('click', (event) => {
  const hit = event.target.closest('[data-i],[data-go],[data-fork],[data-ask],[data-turn],[data-run]');
  if (!hit || hit.disabled) return;
  const data = hit.dataset;
  if ('i' in data) {
    // The end of dragging over text to copy it is no choice.
    if (window.getSelection().isCollapsed) choose(tokenOf(event).dataset.i);
  } else if ('go' in data) choose(data.go, data.row);
  else if ('ask' in data) trigger('select', { ask: data.ask, pos: Number(data.at) });
  else if ('fork' in data) trigger('select', { fork: Number(data.fork), pos: Number(data.at) });
  else if ('turn' in data) trigger('select', { turn: Number(data.turn) });
  else trigger('select', 'at' in data ? { run: data.run, pos: Number(data.at) } : { run: data.run });
});

element.addEventListener('change', (event) => {
  if (!event.target.matches('[data-pick]')) return;
  const picked = element.querySelectorAll('[data-pick]:checked');
  trigger('select', { picked: Array.from(picked, (box) => box.dataset.pick) });
});

scope.addEventListener('candor:select', (event) => {
  const token = mark(event.detail.pos);
  if (token) token.scrollIntoView({ block: 'nearest' });
});

// ---- after each rendering ----------------------------------------------------------------------

function restore() {
  const first = element.querySelector('[data-i]');
  if (first) {
    if (element.dir !== 'auto') {  // once: setting it again lays the whole text out again
      element.dir = 'auto';
      element.setAttribute('role', 'group');
      element.setAttribute('aria-label', 'Answer; the arrow keys move from token to token');
    }
    if (!tokenAt(selected)) selected = null;
    roam(tokenAt(current) || first);
    if (selected !== null) tokenAt(selected).classList.add('sel');
  } else {
    current = selected = null;
  }
  // A box that was ticked by hand no longer follows its attribute.
  for (const box of element.querySelectorAll('[data-pick]')) box.checked = box.defaultChecked;
}

if (typeof watch === 'function') watch('value', restore);
restore();
