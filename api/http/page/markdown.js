// Markdown to elements. `marked` only parses; the elements below are all that an answer can become. Text is never
// parsed as HTML, links lead to the web or to mail, and nothing is loaded.

import { lexer } from "./marked.js";

const DEEPEST = 24; // deeper nesting is shown as it was written: a page of thousands of nested elements stops a browser
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

// An element that shows a growing text. Blocks that are already right stay as they are, so they can be selected.
export class Markdown {
  constructor(element) {
    this.element = element;
    this.blocks = [];
    this.links = "";
  }

  show(text) {
    const [blocks, links] = parse(text);
    const old = links === this.links ? this.blocks : []; // a definition of a link changes the blocks before it
    let same = 0;
    while (same < old.length && old[same].raw === blocks[same]?.raw) same += 1;
    const last = this.element.children[same];
    if (old[same]?.type === "code" && blocks[same]?.type === "code" && old[same].lang === blocks[same].lang) {
      last.querySelector("code").textContent = blocks[same].text; // and its button can be pressed while it grows
      same += 1;
    }
    while (this.element.children.length > same) this.element.lastChild.remove();
    this.element.append(...blocks.slice(same).map(block => draw(block, 0)));
    [this.blocks, this.links] = [blocks, links];
  }
}

// The blocks of a text, and the links that it defines, as one string.
function parse(text) {
  try {
    const tokens = lexer(text, { gfm: true, breaks: true });
    return [tokens.filter(token => token.type !== "space" && token.type !== "def"), JSON.stringify(tokens.links)];
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // it is nested deeper than the stack of the parser
    return [[{ type: "html", block: true, raw: text }], ""];
  }
}

function make(name, ...children) {
  const element = document.createElement(name);
  element.append(...children);
  return element;
}

function drawAll(tokens, depth) {
  return tokens.filter(token => token.type !== "space" && token.type !== "def").map(token => draw(token, depth + 1));
}

// One token as an element, or as text.
function draw(token, depth) {
  if (depth > DEEPEST) return token.raw;
  const inner = () => drawAll(token.tokens, depth);
  switch (token.type) {
    case "paragraph": return make("p", ...inner());
    case "heading": return make(`h${Math.min(token.depth + 2, 6)}`, ...inner()); // the page has h1 and h2
    case "strong": case "em": case "del": case "blockquote": return make(token.type, ...inner());
    case "br": case "hr": return make(token.type);
    case "codespan": return make("code", token.text);
    case "code": return code(token);
    case "list": return list(token, depth);
    case "checkbox": return token.checked ? "\u2611 " : "\u2610 ";
    case "table": return table(token, depth);
    case "link": return link(token.href, inner());
    case "image": return link(token.href, [token.text || "image"]);
    case "escape": return token.text;
    case "text": return text(token.tokens ? inner() : [unescaped(token.text)], depth);
    default: return html(token);
  }
}

function text(parts, depth) {
  const made = depth === 0 ? make("p") : new DocumentFragment();
  made.append(...parts);
  return made;
}

function unescaped(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w+));/gi, (all, decimal, hex, name) => {
    const point = name ? null : parseInt(decimal ?? hex, decimal ? 10 : 16);
    if (name) return ENTITIES[name] ?? all;
    return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : all;
  });
}

// HTML is shown as it was written, but for the line breaks that models put into the cells of tables.
function html(token) {
  if (/^<br\s*\/?>$/i.test(token.raw)) return make("br");
  if (!token.block) return token.raw;
  const shown = make("p", token.raw.trimEnd());
  shown.className = "raw";
  return shown;
}

function link(href, children) {
  const url = URL.canParse(href) ? new URL(href) : null;
  if (!["http:", "https:", "mailto:"].includes(url?.protocol)) return make("span", ...children);
  const anchor = make("a", ...children);
  Object.assign(anchor, { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href });
  return anchor;
}

function list(token, depth) {
  const made = make(token.ordered ? "ol" : "ul", ...token.items.map(item => make("li", ...drawAll(item.tokens, depth + 1))));
  if (token.ordered && token.start !== 1) made.start = token.start;
  return made;
}

function table(token, depth) {
  const row = (name, cells) => make("tr", ...cells.map(cell => {
    const made = make(name, ...drawAll(cell.tokens, depth + 1));
    made.className = cell.align ?? "";
    return made;
  }));
  const body = token.rows.map(cells => row("td", cells));
  const made = make("div", make("table", make("thead", row("th", token.header)), make("tbody", ...body)));
  made.className = "scroll";
  return made;
}

function code(token) {
  const text = make("code", token.text);
  const made = make("div", make("header", token.lang ?? "", copyButton(() => text.textContent)), make("pre", text));
  made.className = "code";
  return made;
}

// A button that copies what `read` gives.
export function copyButton(read) {
  const button = make("button", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    button.textContent = await copy(read()) ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // a page without TLS has no clipboard
    const field = make("textarea", text);
    field.className = "away";
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
