// Draws the tree of a search at any of its moments from the JSON of `.x-search[data-search]`; after
// view.js, in a function of its own. Texts of the model only go through textContent.
const SVG = 'http://www.w3.org/2000/svg';
const WORDS = { o: 'open', c: 'committed', r: 'rewound', p: 'pruned' };
const SIGNS = { c: '✓', r: '↩', p: '✕' };
const ALONE = ['sample', 'refinement'];  // kinds of node whose text is a whole answer
const FEW = 40;  // nodes up to which nothing is folded away
const SHOWN = 2;  // children left behind that stay in sight when the tree is folded
const TINY = 0.45;  // zoom below which nodes are blocks of colour
const ROOMY = 14;  // rows up to which a node has two lines
const [MARGIN, GAP, FAR] = [10, 30, 250];  // px: around the tree, between levels, beyond sight
const ZOOMS = [0.25, 0.35, 0.5, 0.7, 0.85, 1, 1.2];
const SECONDS = 0.45;  // a moment, while playing
const SIBLINGS = 12;
let data = null;
let drawn = '';  // the JSON of `data`
let at = 0;
let timer = null;
let chosen = null;  // number of the node whose panel was opened by hand
let unfolded = new Set();  // numbers of parents, all of whose children are in sight
let all = false;
let zoom = 1;
let sheet = null;  // what is laid out: { nodes, width, height, ... }
let spot = [0, 0];  // px: how far the drawing is scrolled
let tall = 0;  // px: of the drawing, the most so far
let painted = new Map();  // key -> element, of what is in sight
const root = () => element.querySelector('.x-search[data-search]');

function make(parent, tag, className, text) {
  const made = parent.appendChild(document.createElement(tag));
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const known = (value) => value !== null && value !== undefined;
const signed = (value) => {
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(2);
  return (data.lo < 0 && value > 0 ? `+${text}` : text).replace('-', '−');
};
const plain = (value) => (typeof value === 'number'
  ? String(Number(value.toPrecision(3))).replace('-', '−') : String(value));
const many = (n) => n.toLocaleString('en');
const counted = (n, thing) => `${many(n)} ${thing}${n === 1 ? '' : 's'}`;
const visits = (n) => `${plain(n)} visit${n === 1 ? '' : 's'}`;
const lines = (text) => text.replaceAll('⏎', '⏎\n');
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

// ---- the tree at a moment --------------------------------------------------------------------

function treeAt(moment) {
  const nodes = new Map();
  for (let k = 0; k <= moment; k += 1) {
    for (const change of data.steps[k][1]) {
      nodes.set(change.i, { ...nodes.get(change.i), ...change });
    }
  }
  const roots = [];
  for (const node of nodes.values()) {
    node.children = [];
    node.kind = node.d?.kind;
    node.parent = known(node.up) ? nodes.get(node.up) : undefined;
    node.depth = node.parent ? node.parent.depth + 1 : 0;
    (node.parent ? node.parent.children : roots).push(node);
  }
  return { nodes, roots };
}

function path(node) {
  const found = [];
  for (let each = node; each; each = each.parent) found.unshift(each);
  return found;
}

const better = (one, other) => (
  (other.s === 'c') - (one.s === 'c') || (other.n || 0) - (one.n || 0)
  || worth(other) - worth(one) || (other.p || 0) - (one.p || 0)
);
const worth = (node) => (known(node.v) ? (data.worse ? -node.v : node.v) : -Infinity);

// The committed pieces, then what the search would say next as it stands.
function answerOf({ nodes, roots }) {
  const kept = [...nodes.values()].filter((node) => node.s === 'c' && node.t);
  if (!kept.length && !roots.length) return { pieces: [], next: [] };
  const whole = kept.findLast((node) => ALONE.includes(node.kind));
  if (whole) return { pieces: [whole], next: [] };
  const deepest = kept.reduce((a, b) => (b.depth >= a.depth ? b : a), roots[0]);
  const next = [];
  for (let node = deepest; node;) {
    const open = node.children.filter((child) => (
      child.s === 'o' && child.n > 0 && child.kind !== 'probe' && !ALONE.includes(child.kind)));
    [node] = open.sort(better);
    if (node) next.push(node);
  }
  return { pieces: path(deepest).filter((node) => node.s === 'c' && node.t), next };
}

// ---- where the nodes stand -------------------------------------------------------------------

function size(node) {
  return node.children.reduce((sum, child) => sum + size(child), 1);
}

// In a large tree, of the children that were not committed only the most visited are in sight;
// the others hide behind one "+12".
function inSight(node, folding, held) {
  const { children } = node;
  if (!folding || unfolded.has(node.i) || children.length <= SHOWN + 1) return [children, null];
  const left = children.filter((child) => child.s !== 'c' && !held.has(child.i));
  const hidden = new Set([...left].sort(better).slice(SHOWN));
  if (hidden.size < 2) return [children, null];
  const stub = { stub: node.i, parent: node, depth: node.depth + 1, hidden: [...hidden] };
  stub.children = [];
  stub.count = stub.hidden.reduce((sum, child) => sum + size(child), 0);
  return [children.filter((child) => !hidden.has(child)), stub];
}

// What was committed in the middle, the smallest of the others next to it, and the largest by
// turns above and below, so that the branches of one level leave room for those of the next.
function around(children) {
  const kept = children.find((child) => child.s === 'c');
  if (!kept) return children;
  const others = children.filter((child) => child !== kept);
  others.sort((one, other) => size(one) - size(other));
  const turn = kept.depth + others.length;
  const above = others.filter((_, i) => (i + turn) % 2);
  return [...above.reverse(), kept, ...others.filter((_, i) => !((i + turn) % 2))];
}

// Subtrees stand as close as they can at every depth. node.off: rows below its parent;
// node.edges: of its subtree, the first and last row by depth, from itself. What was committed is
// a straight line.
function pack(node, folding, held) {
  const [children, stub] = inSight(node, folding, held);
  node.shown = around(stub ? [...children, stub] : children);
  const edges = [];
  for (const child of node.shown) {
    if (child === stub) Object.assign(stub, { shown: [], edges: [[0, 0]] });
    else pack(child, folding, held);
    const shared = child.edges.slice(0, edges.length);
    child.off = Math.max(0, ...shared.map(([first], d) => edges[d][1] - first + 1));
    child.edges.forEach(([first, last], d) => {
      edges[d] = [edges[d] ? edges[d][0] : child.off + first, child.off + last];
    });
  }
  const kept = node.shown.find((child) => child.s === 'c');
  const ends = node.shown.length ? [node.shown[0].off, node.shown.at(-1).off] : [0, 0];
  const own = kept ? kept.off : (ends[0] + ends[1]) / 2;
  for (const child of node.shown) child.off -= own;
  node.edges = [[0, 0], ...edges.map(([first, last]) => [first - own, last - own])];
}

function layOut(tree, canvas) {
  const folding = !all && tree.nodes.size > FEW;
  const held = new Set(path(tree.nodes.get(chosen)).map((node) => node.i));
  const placed = [];
  const put = (node, row) => {
    node.row = row;
    placed.push(node);
    for (const child of node.shown) put(child, row + child.off);
  };
  let rows = 0;
  for (const start of tree.roots) {
    pack(start, folding, held);
    put(start, rows - Math.min(...start.edges.map(([first]) => first)));
    rows = 1 + Math.max(...placed.map((node) => node.row));
  }
  const roomy = rows <= ROOMY;
  const whole = placed.some((node) => ALONE.includes(node.kind));
  const deepest = Math.max(1, ...placed.map((node) => node.depth));
  const fair = (canvas.clientWidth - 2 * MARGIN + GAP) / (deepest + 1);
  const column = Math.max(whole ? 250 : 172, Math.min(whole ? 340 : 230, fair));
  const row = roomy ? 52 : 31;
  const pill = roomy ? 42 : 25;
  for (const node of placed) {
    node.x = MARGIN + node.depth * column;
    node.y = MARGIN + (node.row + 0.5) * row;
  }
  return {
    placed, roomy, pill, wide: column - GAP, folding,
    width: 2 * MARGIN + (deepest + 1) * column - GAP, height: 2 * MARGIN + rows * row,
    most: Math.max(1, ...placed.map((node) => node.n || 0)),
  };
}

// ---- one moment ------------------------------------------------------------------------------

// From -1 (bad) to 1 (good), as a mixture of the two ends with grey.
function tone(value) {
  if (!known(value)) return 'var(--x-none)';
  const t = Math.max(-1, Math.min(1, (2 * (value - data.lo)) / (data.hi - data.lo) - 1));
  const good = data.worse ? -t : t;
  const share = Math.round(100 * Math.abs(good));
  return `color-mix(in srgb, var(--x-${good > 0 ? 'high' : 'low'}) ${share}%, var(--x-mid))`;
}

function numbersOf(node, word = true) {
  const said = [];
  if (known(node.v)) said.push(signed(node.v));
  if (node.n) said.push(visits(node.n));
  else if (!known(node.v)) said.push(known(node.p) ? `p ${plain(node.p)}` : 'not visited');
  if (word && (node.s === 'r' || node.s === 'p')) said.push(WORDS[node.s]);
  return said.join(' · ');
}

const textOf = (node) => node.t || (node.parent ? '(empty)' : data.prompt || 'the prompt');

function pill(parent, node, focus) {
  const box = make(parent, 'button', node.stub === undefined ? `node ${node.s}` : 'stub');
  box.type = 'button';
  box.tabIndex = node.i === focus ? 0 : -1;
  box.style.left = `${node.x}px`;
  box.style.top = `${node.y - sheet.pill / 2}px`;
  if (node.stub !== undefined) {
    box.dataset.open = node.stub;
    box.textContent = `+${many(node.count)}`;
    box.title = `${counted(node.count, 'more node')} that came to less; click to see them`;
    return box;
  }
  box.dataset.node = node.i;
  box.style.setProperty('--tone', tone(node.v));
  if (node.i === focus) box.classList.add('on');
  if (!node.parent) box.classList.add('root');
  const line = make(box, 'span', 'line');
  if (SIGNS[node.s]) make(line, 'b', '', SIGNS[node.s]);
  make(line, 'span', 'w', short(textOf(node), 120).trim() || '␣').dir = 'auto';
  if (sheet.roomy) make(box, 'small', '', numbersOf(node, false));
  else if (known(node.v)) make(line, 'small', '', signed(node.v));
  box.title = `“${short(textOf(node), 300)}”\n${numbersOf(node)}`;
  const name = [short(textOf(node), 120), WORDS[node.s], numbersOf(node, false)];
  box.setAttribute('aria-label', name.join('; '));
  return box;
}

function edge(svg, node) {
  const line = svg.appendChild(document.createElementNS(SVG, 'path'));
  const [from, to] = [node.parent.x + sheet.wide, node.x];
  const half = (from + to) / 2;
  const [a, b] = [node.parent.y, node.y];
  line.setAttribute('d', `M${from} ${a}C${half} ${a} ${half} ${b} ${to} ${b}`);
  line.setAttribute('class', node.stub === undefined ? node.s : 'stub');
  line.style.strokeWidth = `${(1.2 + 5.3 * Math.sqrt((node.n || 0) / sheet.most)).toFixed(1)}px`;
  line.style.stroke = tone(node.v);
  return line;
}

const keyOf = (node) => (node.stub === undefined ? node.i : `+${node.stub}`);

// Only what is in sight, or nearly so, is in the page.
function paint() {
  const canvas = element.querySelector('.x-search .canvas');
  if (!canvas || !sheet) return;
  const field = canvas.querySelector('.field');
  const svg = field.querySelector('svg');
  spot = [canvas.scrollLeft, canvas.scrollTop];
  const left = canvas.scrollLeft / zoom - FAR;
  const right = (canvas.scrollLeft + canvas.clientWidth) / zoom + FAR;
  const top = canvas.scrollTop / zoom - FAR;
  const bottom = (canvas.scrollTop + canvas.clientHeight) / zoom + FAR;
  const now = new Map();
  for (const node of sheet.placed) {
    const within = node.y > top && node.y < bottom
      && node.x < right && node.x + sheet.wide > left;
    const near = node.parent && node.x > left && node.parent.x + sheet.wide < right
      && Math.max(node.y, node.parent.y) > top && Math.min(node.y, node.parent.y) < bottom;
    const key = keyOf(node);
    if (within) now.set(key, painted.get(key) || pill(field, node, sheet.focus));
    if (near) now.set(`e${key}`, painted.get(`e${key}`) || edge(svg, node));
  }
  for (const [key, made] of painted) if (!now.has(key)) made.remove();
  painted = now;
}

function drawTree(canvas, tree, focus) {
  const held = element.contains(document.activeElement) && document.activeElement.dataset.node;
  const kept = spot;  // emptying the canvas scrolls it
  sheet = { ...layOut(tree, canvas), focus };
  canvas.textContent = '';
  painted = new Map();
  const scaled = make(canvas, 'div', 'scaled');
  scaled.style.width = `${sheet.width * zoom}px`;
  scaled.style.height = `${sheet.height * zoom}px`;
  const field = make(scaled, 'div', sheet.roomy ? 'field' : 'field close');
  field.classList.toggle('tiny', zoom < TINY);
  field.style.transform = `scale(${zoom})`;
  field.style.width = `${sheet.width}px`;
  field.style.height = `${sheet.height}px`;
  field.style.setProperty('--x-wide', `${sheet.wide}px`);
  field.style.setProperty('--x-pill', `${sheet.pill}px`);
  const svg = field.appendChild(document.createElementNS(SVG, 'svg'));
  svg.setAttribute('width', sheet.width);
  svg.setAttribute('height', sheet.height);
  svg.setAttribute('aria-hidden', 'true');
  tall = Math.max(tall, sheet.height);
  canvas.style.setProperty('--x-tall', `${tall + 2}px`);
  [canvas.scrollLeft, canvas.scrollTop] = kept;
  paint();
  if (known(held)) canvas.querySelector(`[data-node="${held}"]`)?.focus({ preventScroll: true });
}

function bring(number) {
  const canvas = element.querySelector('.x-search .canvas');
  const node = sheet.placed.find((each) => each.i === number);
  if (!node) return;
  const [x, y] = [zoom * node.x, zoom * node.y];
  const wide = zoom * sheet.wide;
  if (x < canvas.scrollLeft || x + wide > canvas.scrollLeft + canvas.clientWidth) {
    canvas.scrollLeft = x + wide + MARGIN - 0.8 * canvas.clientWidth;
  }
  if (y - 20 < canvas.scrollTop || y + 20 > canvas.scrollTop + canvas.clientHeight) {
    canvas.scrollTop = y - canvas.clientHeight / 2;
  }
  paint();
}

function drawAnswer(box, said, number) {
  const { pieces, next } = said;
  box.textContent = '';
  for (const node of pieces) {
    const piece = make(box, 'button', node.i === number ? 'piece on' : 'piece', node.t);
    piece.type = 'button';
    piece.dataset.node = node.i;
  }
  if (next.length) make(box, 'span', 'next', `${next.map((node) => node.t || '').join('')} …`);
  if (!pieces.length && !next.length) make(box, 'span', 'next', 'Nothing is committed yet.');
}

function drawInstead(box, said, node, nodes) {
  box.textContent = '';
  if (!said.pieces.length) return;
  if (!node || !said.pieces.includes(node)) {
    const hint = 'Committed pieces are underlined: click one for what it nearly said instead.';
    make(box, 'small', '', hint);
    return;
  }
  const whole = [...nodes.values()].filter((each) => ALONE.includes(each.kind));
  const beside = ALONE.includes(node.kind) ? whole : node.parent?.children || [];
  const others = beside.filter((each) => each !== node && each.t);
  others.sort(better);
  make(box, 'small', '', others.length
    ? `instead of “${short(node.t.trim(), 40)}” it nearly said`
    : `nothing stood beside “${short(node.t.trim(), 40)}”`);
  for (const other of others.slice(0, 4)) {
    const chip = make(box, 'button', `other ${other.s}`);
    chip.type = 'button';
    chip.dataset.node = other.i;
    chip.style.setProperty('--tone', tone(other.v));
    make(chip, 'span', '', short(other.t.trim() || '␣', 60));
    make(chip, 'small', '', numbersOf(other));
  }
}

// ---- the panel of a node ---------------------------------------------------------------------

function bar(list, name, share, value) {
  const row = make(list, 'div', 'bar');
  make(row, 'span', 'name', name).dir = 'auto';
  const track = make(row, 'span', 'b');
  make(track, 'u').style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  make(row, 'span', 'p', value);
}

function drawContext(box, node) {
  const text = make(box, 'p', 'context');
  text.dir = 'auto';
  const before = ALONE.includes(node.kind) ? [] : path(node).slice(0, -1);
  const written = before.map((each) => each.t || '').join('');
  const near = written.length > 400 ? `… ${written.slice(-400)}` : written;
  make(text, 'span', 'before', lines(near));
  make(text, 'span', 'own', node.parent || node.t ? lines(node.t || '') : textOf(node));
  if (!node.d?.rollout) return;
  make(text, 'span', 'rollout', lines(String(node.d.rollout)));
  make(box, 'small', '', 'in italics: tried out behind it, not a part of it');
}

function drawFacts(box, node) {
  const said = [['status', WORDS[node.s]]];
  if (known(node.v)) said.push(['value', signed(node.v)]);
  if (node.n) {
    const real = node.f !== node.n && known(node.f) ? ` (${plain(node.f)} real)` : '';
    said.push(['visits', `${plain(node.n)}${real}`]);
  }
  if (known(node.p)) said.push(['prior', plain(node.p)]);
  said.push(['depth', plain(node.depth)]);
  for (const [name, value] of Object.entries(node.d || {})) {
    if (['rollout', 'puct', 'siblings', 'score_name', 'reason'].includes(name)) continue;
    const label = name === 'score' && node.d.score_name ? node.d.score_name : name;
    if (!known(value) || value === '') continue;
    if (typeof value !== 'object') said.push([label.replaceAll('_', ' '), yes(value)]);
    else {
      const parts = Object.entries(value).map(([part, each]) => `${part} ${yes(each)}`);
      said.push([label.replaceAll('_', ' '), short(parts.join(', '), 200)]);
    }
  }
  const list = make(box, 'dl', 'facts');
  for (const [name, value] of said) {
    const row = make(list, 'div');
    make(row, 'dt', '', name);
    make(row, 'dd', '', value);
  }
  if (node.d?.reason) make(box, 'p', 'reason', `Why: ${node.d.reason}`);
}

const yes = (value) => (value === true ? 'yes' : value === false ? 'no'
  : typeof value === 'object' && value ? short(JSON.stringify(value), 80) : plain(value));

// PUCT terms of the node and of what stood beside it, at the last selection there.
function drawBeside(box, node) {
  const terms = new Map();
  const told = [node.parent?.d?.siblings || []].flat();
  for (const row of told) if (Array.isArray(row)) terms.set(row[0], row);
  const beside = [...(node.parent?.children || [])].sort(better);
  for (const each of beside) {
    const own = each.d?.puct;
    if (own && !terms.has(each.i)) terms.set(each.i, [each.i, own.exploit, own.explore]);
  }
  if (beside.length < 2 && !terms.size) return;
  const most = Math.max(1e-9, ...[...terms.values()].map(([, a, b]) => (a || 0) + (b || 0)));
  make(box, 'h4', '', terms.size ? 'Chosen by exploit + explore' : 'Beside it');
  const list = make(box, 'div', 'beside');
  const first = beside.slice(0, SIBLINGS);
  if (!first.includes(node)) first.push(node);
  for (const each of first) {
    const row = make(list, 'button', each === node ? 'me' : '');
    row.type = 'button';
    row.dataset.node = each.i;
    row.style.setProperty('--tone', tone(each.v));
    make(row, 'span', 'w', short(textOf(each).trim() || '␣', 60)).dir = 'auto';
    const term = terms.get(each.i);
    if (term) {
      const track = make(row, 'span', 'b');
      make(track, 'u', 'exploit').style.width = `${(100 * Math.max(0, term[1])) / most}%`;
      make(track, 'u', 'explore').style.width = `${(100 * Math.max(0, term[2])) / most}%`;
      const [a, b] = [term[1], term[2]].map((each) => (Number(each) || 0).toFixed(2));
      track.title = `exploit ${a} + explore ${b}`;
      make(row, 'span', 'p', `${a} + ${b}`);
    } else make(row, 'span', 'p', numbersOf(each));
  }
  if (beside.length > first.length) {
    make(box, 'small', '', `and ${many(beside.length - first.length)} more`);
  }
}

const isLabels = (value) => value && typeof value === 'object' && !Array.isArray(value)
  && Object.values(value).length > 0
  && Object.values(value).every((each) => typeof each === 'number' && each >= 0 && each <= 1);

const top = (labels) => Object.keys(labels).reduce((a, b) => (labels[b] > labels[a] ? b : a));

function drawEvaluation(box, said) {
  const head = make(box, 'p', 'judged');
  make(head, 'b', '', said.judge || 'judge');
  const score = known(said.score) ? plain(said.score) : 'could not be read';
  make(head, 'span', '', ` ${score} (from ${plain(said.lo)} to ${plain(said.hi)})`);
  const told = said.detail || {};
  const names = { first: 'as asked first', swapped: 'swapped' };
  for (const [name, value] of Object.entries(told)) {
    if (!isLabels(value)) continue;
    make(box, 'small', '', names[name] || name.replaceAll('_', ' '));
    for (const [label, p] of Object.entries(value)) bar(box, label, p, p.toFixed(2));
  }
  const rest = Object.entries(told).filter(([, value]) => !isLabels(value) && known(value));
  const notes = rest.map(([name, value]) => `${name.replaceAll('_', ' ')}: ${yes(value)}`);
  if (known(said.mass)) notes.unshift(`label mass ${said.mass.toFixed(2)}`);
  if (isLabels(told.first) && isLabels(told.swapped) && top(told.first) === top(told.swapped)) {
    notes.push(`says ${top(told.first)} in both orders: that is the place, not the text`);
  }
  if (said.verdict) notes.unshift(said.verdict);
  if (notes.length) make(box, 'p', 'notes', notes.join(' · '));
  if (said.why) make(box, 'p', 'why', lines(said.why)).dir = 'auto';
}

function drawPanel(box, node) {
  box.textContent = '';
  if (!node) {
    make(box, 'p', 'empty', 'This node is not there yet at this moment.');
    return;
  }
  const head = make(box, 'h4', 'who', node.parent ? 'Node ' : 'The root ');
  make(head, 'span', '', `“${short(textOf(node).trim() || '␣', 48)}”`).dir = 'auto';
  drawContext(box, node);
  drawFacts(box, node);
  drawBeside(box, node);
  const said = (node.e || []).map((key) => data.evals[key]).filter(Boolean);
  if (!said.length) return;
  const count = node.m || said.length;
  make(box, 'h4', '', count === 1 ? 'Its evaluation' : `Its ${counted(count, 'evaluation')}`);
  if (node.m) make(box, 'small', '', `the last ${said.length}, the latest first`);
  for (const each of said.reverse()) drawEvaluation(box, each);
}

// ---- drawing ---------------------------------------------------------------------------------

function happened() {
  const before = at ? treeAt(at - 1).nodes : new Map();
  const count = { born: 0, o: 0, c: 0, r: 0, p: 0 };
  for (const change of data.steps[at][1]) {
    const was = before.get(change.i);
    if (!was) count.born += 1;
    if (change.s && change.s !== 'o' && was?.s !== change.s) count[change.s] += 1;
  }
  const parts = [count.born ? `${count.born} new` : ''];
  for (const s of ['c', 'r', 'p']) if (count[s]) parts.push(`${count[s]} ${WORDS[s]}`);
  return parts.filter(Boolean).join(', ');
}

function focusOf(tree, said) {
  if (chosen !== null) return chosen;
  const last = said.pieces[said.pieces.length - 1] || tree.roots[0];
  return last?.i;
}

function draw(follow = false) {
  const box = root();
  if (!box || !data) return;
  const tree = treeAt(at);
  const said = answerOf(tree);
  const focus = focusOf(tree, said);
  const node = tree.nodes.get(focus);
  drawAnswer(box.querySelector('.answer'), said, chosen);
  drawInstead(box.querySelector('.instead'), said, chosen === null ? null : node, tree.nodes);
  const canvas = box.querySelector('.canvas');
  drawTree(canvas, tree, focus);
  drawPanel(box.querySelector('.node-panel'), node);
  if (follow) {
    const fresh = data.steps[at][1].map((change) => tree.nodes.get(change.i));
    const goal = fresh.findLast((each) => each.s === 'c')
      || fresh.findLast((each) => each.s === 'o' && each.n) || node;
    if (goal) bring(goal.i);
  }
  drawControls(box, tree);
}

function drawControls(box, tree) {
  const slider = box.querySelector('input');
  slider.value = at;
  const [iteration] = data.steps[at];
  const of = `${many(at + 1)} of ${many(data.steps.length)}`;
  const name = known(iteration) ? `iteration ${many(iteration)}` : `moment ${of}`;
  const did = happened();
  const which = [name, counted(tree.nodes.size, 'node'), data.going ? 'growing' : did]
    .filter(Boolean).join(' · ');
  slider.setAttribute('aria-valuetext', `${of}: ${which}`);
  box.querySelector('output').textContent = which;
  const [back, , on] = box.querySelectorAll('.controls button');
  back.disabled = at === 0;
  on.disabled = at === data.steps.length - 1;
  box.querySelector('[data-play]').textContent = timer ? '❚❚ Pause' : '▶ Play';
  box.querySelector('.controls').classList.toggle('one', data.steps.length < 2);
  const fold = box.querySelector('[data-fold]');
  fold.hidden = tree.nodes.size <= FEW;
  fold.textContent = all || unfolded.size ? 'fold' : 'unfold all';
}

function show() {
  const box = root();
  if (!box) {
    stop();
    data = sheet = null;
    drawn = '';
    return;
  }
  const canvas = box.querySelector('.canvas');
  if (box.dataset.search !== drawn) {
    const first = !data || !data.going;
    drawn = box.dataset.search;
    data = JSON.parse(drawn);
    at = data.steps.length - 1;
    stop();
    if (first) {
      chosen = null;
      unfolded = new Set();
      all = false;
      zoom = 1;
      spot = [0, 0];
      tall = 0;
    }
    listen(canvas);
    draw(chosen === null);
    return;
  }
  listen(canvas);
  draw();
}

// Scrolling does not bubble; the canvas may be a new one after a rendering.
const listening = new WeakSet();
function listen(canvas) {
  if (listening.has(canvas)) return;
  listening.add(canvas);
  canvas.addEventListener('scroll', () => requestAnimationFrame(paint), { passive: true });
  let width = canvas.clientWidth;
  new ResizeObserver(() => {  // also when a hidden tab is shown
    if (Math.abs(canvas.clientWidth - width) < 2) return;
    width = canvas.clientWidth;
    draw();
  }).observe(canvas);
}

function go(to) {
  at = Math.max(0, Math.min(data.steps.length - 1, to));
  draw(true);
}

function stop() {
  clearInterval(timer);
  timer = null;
}

function play() {
  if (at === data.steps.length - 1) at = 0;
  timer = setInterval(() => {
    if (!element.isConnected || !data || at >= data.steps.length - 1) stop();
    else at += 1;
    draw(true);
  }, 1000 * SECONDS);
  draw(true);
}

function resize(way) {
  const canvas = element.querySelector('.x-search .canvas');
  const fit = Math.min(canvas.clientWidth / sheet.width, canvas.clientHeight / sheet.height, 1);
  const [x, y] = [canvas.scrollLeft / zoom, canvas.scrollTop / zoom];
  const next = way > 0
    ? ZOOMS.find((z) => z > zoom + 0.01) : ZOOMS.findLast((z) => z < zoom - 0.01);
  if (way === 0) zoom = Math.max(fit, 0.15);
  else zoom = next || zoom;
  draw();
  [canvas.scrollLeft, canvas.scrollTop] = [x * zoom, y * zoom];
  paint();
}

function choose(number) {
  chosen = number;
  draw();
  bring(number);
  const place = data.places.find(([node]) => node === number);
  if (place) scope.dispatchEvent(new CustomEvent('candor:select', { detail: { pos: place[1] } }));
}

// The token that was clicked, in any view, belongs to a piece of the answer.
scope.addEventListener('candor:select', (event) => {
  const { pos } = event.detail;
  const place = data?.places.find(([, first, last]) => first <= pos && pos <= last);
  if (!place || place[0] === chosen || !sheet || !root()) return;
  [chosen] = place;
  draw();
  bring(chosen);
});

element.addEventListener('click', (event) => {
  const hit = event.target.closest('.x-search button');
  if (!hit || !data) return;
  const set = hit.dataset;
  const playing = timer !== null;
  if ('node' in set) choose(Number(set.node));
  else if ('open' in set) {
    unfolded.add(Number(set.open));
    draw();
  } else if ('fold' in set) {
    all = !(all || unfolded.size);
    unfolded = new Set();
    draw();
  } else if ('zoom' in set) resize(Number(set.zoom));
  else {
    stop();
    if ('move' in set) go(at + Number(set.move));
    else if (playing) draw();
    else play();
  }
});
element.addEventListener('input', (event) => {
  if (!data || !event.target.matches('.x-search input')) return;
  stop();
  go(Number(event.target.value));
});
element.addEventListener('keydown', (event) => {
  const hit = event.target.closest('.x-search .node');
  if (!hit || !sheet || event.ctrlKey || event.metaKey || event.altKey) return;
  const node = sheet.placed.find((each) => each.i === Number(hit.dataset.node));
  const column = sheet.placed.filter((each) => each.depth === node?.depth && !known(each.stub));
  column.sort((one, other) => one.row - other.row);
  const goal = {
    ArrowLeft: node?.parent,
    ArrowRight: [...(node?.shown || [])].filter((each) => !known(each.stub)).sort(better)[0],
    ArrowUp: column[column.indexOf(node) - 1],
    ArrowDown: column[column.indexOf(node) + 1],
  }[event.key];
  if (!goal) return;
  event.preventDefault();
  choose(goal.i);
  element.querySelector(`.x-search .node[data-node="${goal.i}"]`)?.focus({ preventScroll: true });
});

if (typeof watch === 'function') watch('value', show);
show();
