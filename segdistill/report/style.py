"""The look of the report: one style sheet, light and dark, no request to anywhere."""

CSS = """
:root { color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --page: #f5f6f8; --surface: #ffffff; --ink: #1a1d21; --muted: #6b7280; --grid: #dfe3e8;
  --heat: #144b93; --on-heat: #ffffff; --up: #0b6b3a; --down: #b3261e; --accent: #2a78d6;
  --series-1: #2a78d6; --series-2: #eb6834; --series-3: #1baf7a; --series-4: #eda100;
  --series-5: #e87ba4; --series-6: #008300; --series-7: #4a3aa7; --series-8: #e34948; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14161a; --surface: #1c1f24; --ink: #e8eaed; --muted: #9aa3af; --grid: #343a43;
  --heat: #7db4f5; --on-heat: #10151c; --up: #5fd39a; --down: #ff8a80; --accent: #3987e5;
  --series-1: #3987e5; --series-2: #d95926; --series-3: #199e70; --series-4: #c98500;
  --series-5: #d55181; --series-6: #3fa53f; --series-7: #9085e9; --series-8: #e66767; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--font); }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 96ch; }
.quiet { color: var(--muted); font-size: 13.5px; }
code { font-family: ui-monospace, "SF Mono", Consolas, monospace; font-size: 0.92em; }
section { background: var(--surface); border: 1px solid var(--grid); border-radius: 10px;
  padding: 22px 24px; margin-top: 20px; }
.finding { font-size: 17px; line-height: 1.5; border-left: 4px solid var(--accent); padding-left: 16px;
  margin: 22px 0; }
.finding p { max-width: 90ch; margin: 0 0 6px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
.fact { background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 18px; }
.fact b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.fact span { display: block; color: var(--muted); font-size: 13px; }
.warning { border: 1px solid var(--series-4); border-radius: 8px; padding: 10px 14px; margin-top: 12px;
  font-size: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
.main { width: 100%; margin-top: 10px; }
th { text-align: right; color: var(--muted); font-weight: 500; font-size: 12.5px; padding: 6px 10px;
  vertical-align: bottom; }
td { text-align: right; padding: 7px 10px; white-space: nowrap; }
.main td { border-top: 1px solid var(--grid); }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
.main tr.teacher td { border-bottom: 2px solid var(--grid); }
.main tr.best td:first-child::after { content: "best on val"; margin-left: 8px; padding: 1px 7px; font-size: 11px;
  border-radius: 9px; border: 1px solid var(--accent); color: var(--accent); }
.small { display: block; color: var(--muted); font-size: 12px; }
.wide { white-space: normal; min-width: 170px; color: var(--down); }
.up { color: var(--up); } .down { color: var(--down); } .sure { font-weight: 650; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px;
  vertical-align: -1px; border: 1px solid color-mix(in srgb, var(--ink) 25%, transparent); }
svg { display: block; width: 100%; height: auto; max-width: 900px; min-width: 600px; margin: 6px auto 0; }
.heat td { padding: 4px 10px; border: 2px solid var(--surface); border-radius: 6px; min-width: 68px;
  text-align: center; }
.heat th { text-align: center; } .heat th:first-child, .heat td:first-child { text-align: left; }
.heat td[style] { background: color-mix(in oklab, var(--heat) var(--h), var(--surface)); }
.heat td.strong { color: var(--on-heat); }
.heat small { font-size: 11px; opacity: 0.95; margin-left: 4px; }
.matrix td { padding: 0; width: 38px; min-width: 38px; height: 30px; font-size: 12px; border-width: 1px; }
.matrix td:first-child { width: auto; padding-right: 12px; font-size: 13px; }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 4px 0;
  line-height: 38px; width: 38px; }
.matrix thead th:first-child { writing-mode: horizontal-tb; transform: none; width: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 14px; font-size: 13px; }
.choice { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 8px 0; font-size: 14px; }
.choice label { cursor: pointer; }
.scene { display: grid; grid-template-columns: repeat(auto-fill, minmax(186px, 1fr)); gap: 12px; padding: 14px 0;
  border-top: 1px solid var(--grid); }
figure { margin: 0; } figcaption { font-size: 12.5px; display: flex; justify-content: space-between;
  padding-top: 3px; }
figcaption span { color: var(--muted); }
.picture { position: relative; background-size: 100% 100%; border-radius: 6px; overflow: hidden; }
.picture img { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; }
.picture .classes { opacity: 0.72; } .picture .errors { display: none; }
.pictures:has(#view-classes:checked) .classes { opacity: 1; }
.pictures:has(#view-errors:checked) .classes.prediction { display: none; }
.pictures:has(#view-errors:checked) .errors { display: block; opacity: 0.85; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 12px 0; }
dt { color: var(--muted); } dd { margin: 0; }
li { margin-bottom: 6px; max-width: 84ch; }
@media (max-width: 700px) { main { padding: 20px 12px; }
  section { padding: 16px 12px; } dl { grid-template-columns: 1fr; gap: 0; } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
