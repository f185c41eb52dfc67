"""The style sheet of the page: light and dark by the reader's setting, narrow screens, paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --ink: #1f2430; --muted: #5d6675;
  --line: #e2e5ea; --accent: #0069a5; --tint: #e8f2f9; --warn: #a84800; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12151b; --card: #1a1e26; --ink: #e5e8ee; --muted: #9ba4b3; --line: #2c323d;
    --accent: #6fc0ef; --tint: #1a2f3f; --warn: #f0a35e; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 0.75rem; letter-spacing: -0.005em; }
p { margin: 0.4rem 0; }
.eyebrow { margin: 0 0 0.35rem; font-size: 0.8rem; font-weight: 600; letter-spacing: 0.06em;
  text-transform: uppercase; color: var(--accent); }
.muted, figcaption, .note { color: var(--muted); }
.note, figcaption { font-size: 0.9rem; }
.verdict { margin: 1.25rem 0 0; font-size: 1.15rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0.75rem;
  margin: 1.5rem 0 0; }
.facts div, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.facts div { padding: 0.8rem 1rem 0.85rem; }
.facts dt { font-size: 0.82rem; color: var(--muted); }
.facts dd { margin: 0; }
.facts .value { font-size: 1.4rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.facts .sub { font-size: 0.82rem; line-height: 1.4; color: var(--muted); }
.card { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
th, td { padding: 0.45rem 1rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > td { border-bottom: 0; }
th { font-size: 0.8rem; font-weight: 600; color: var(--muted); white-space: nowrap; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.own td { background: var(--tint); font-weight: 650; }
.bar { width: 34%; min-width: 8rem; vertical-align: middle; }
.bar span { display: block; height: 0.6rem; border-radius: 3px; background: var(--muted); opacity: 0.45; }
.own .bar span { background: var(--accent); opacity: 1; }
.key { width: 1%; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.85rem;
  white-space: nowrap; }
td small { display: block; font-size: 0.8rem; font-weight: 400; line-height: 1.35; color: var(--muted); }
.ladder td { vertical-align: middle; }
.long { overflow-wrap: anywhere; }
figure { margin: 0; }
figure > div { background: #ffffff; border: 1px solid var(--line); border-radius: 10px; padding: 0.6rem;
  overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 30rem; height: auto; }
figure + figure { margin-top: 1.25rem; }
figcaption { margin-top: 0.5rem; }
.sample { margin: 0 0 1rem; }
.sample p { margin: 0 0 0.35rem; font-size: 0.85rem; color: var(--muted); }
pre { margin: 0; padding: 0.9rem 1.1rem;
  font: 0.88rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre b { color: var(--accent); }
details { margin: 0.75rem 0; }
summary { cursor: pointer; padding: 0.35rem 0; font-weight: 600; }
ul { margin: 0.5rem 0; padding-left: 1.2rem; }
aside { margin-top: 1.25rem; padding: 0.7rem 1.1rem; border-left: 3px solid var(--warn);
  background: var(--card); font-size: 0.92rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 0.85rem;
  color: var(--muted); }
@media (max-width: 600px) {
  main { padding: 1.5rem 0.9rem 2rem; }
  h1 { font-size: 1.5rem; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.5rem; }
  .facts div { padding: 0.65rem 0.75rem; }
  .facts .value { font-size: 1.15rem; }
  th, td { padding: 0.4rem 0.65rem; }
  .ladder .bar { display: none; }
}
@media print {
  .facts { grid-template-columns: repeat(4, 1fr); }
  :root { --paper: #ffffff; --card: #ffffff; --ink: #000000; --muted: #444444; --line: #cccccc;
    --accent: #0069a5; --tint: #eef5fa; color-scheme: light; }
  main { max-width: none; padding: 0; }
  figure, .facts div, tr, aside, .sample { break-inside: avoid; }
  h2 { break-after: avoid; }
  figure img { min-width: 0; }
  details::details-content { content-visibility: visible; height: auto; }
  body { font-size: 11pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
