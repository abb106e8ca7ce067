"""The page around a report: its frame, its style in light and dark, its one script."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>{head}</header>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root {
  --page: #fafaf9; --card: #ffffff; --ink: #1c1e21; --soft: #5b6068; --rule: #e3e5e8;
  --grid: #ebedf0; --stock: #8a8f98; --ours: #2563b0; --barrier: #b7651a; --symmetric: #8a4fa3;
  --matmuls: #2c8a5b; --torch: #c2344a; --other: #0f8a94;
  --win: #e4f3ea; --loss: #fbe9e7; --wrong: #f6d0cc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131517; --card: #1b1e21; --ink: #e8eaed; --soft: #a2a8b1; --rule: #33373d;
    --grid: #2a2e33; --stock: #9aa0a9; --ours: #6ea8ef; --barrier: #e09a4f; --symmetric: #c390da;
    --matmuls: #62c492; --torch: #f0788a; --other: #5cc6cf;
    --win: #17301f; --loss: #3a1d1a; --wrong: #5a2620;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1380px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; }
h2 { font-size: 18px; margin: 0 0 6px; }
p { margin: 6px 0 12px; max-width: 86ch; }
.sub { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 18px 20px; margin-top: 20px;
}
.tiles { display: grid; gap: 10px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 10px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 12.5px; line-height: 1.3; display: block; }
.pair { display: grid; gap: 16px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.multiples { display: grid; gap: 14px 22px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10.5px; fill: var(--soft); font-family: inherit; }
svg text.label { fill: var(--ink); }
svg text.value { fill: var(--ink); paint-order: stroke; stroke: var(--card);
  stroke-width: 3px; font-variant-numeric: tabular-nums; }
svg text.title { fill: var(--ink); font-size: 11.5px; font-weight: 600; }
line.grid { stroke: var(--grid); }
line.base { stroke: var(--ink); stroke-width: 1.2; }
line.span { stroke: var(--rule); stroke-width: 2; }
line.ceiling { stroke: var(--ink); stroke-width: 1.4; }
.dot { stroke: var(--card); stroke-width: 1; }
.curve { fill: none; stroke-width: 1.8; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 12px; font-size: 13px;
  color: var(--soft); }
.key { display: inline-flex; align-items: center; gap: 6px; }
.swatch { width: 11px; height: 11px; border-radius: 50%; display: inline-block; }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); background: var(--card); }
thead th { position: sticky; top: 0; z-index: 2; color: var(--soft); font-weight: 600;
  vertical-align: bottom; }
tbody th { position: sticky; left: 0; z-index: 1; text-align: left; font-weight: 500; }
thead th:first-child { left: 0; z-index: 3; text-align: left; }
td:nth-child(2), td:nth-child(3) { color: var(--soft); }
th:nth-child(2), td:nth-child(2), th:nth-child(3), td:nth-child(3) { text-align: left; }
tr.win th, tr.win td { background: var(--win); }
tr.loss th, tr.loss td { background: var(--loss); }
tr.wrong th, tr.wrong td { background: var(--wrong); }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 500; }
details > .scroll, details > .pair { margin-top: 10px; }
input[type=search] { font: inherit; color: inherit; background: var(--page); padding: 5px 10px;
  border: 1px solid var(--rule); border-radius: 7px; width: min(100%, 320px); }
@media (max-width: 640px) {
  main { padding: 14px 10px 40px; }
  section { padding: 14px 12px; }
  th, td { padding: 4px 7px; }
  tbody th { max-width: 45vw; overflow: hidden; text-overflow: ellipsis; }
  .multiples { grid-template-columns: 1fr; }
}
""" + "\n".join(
    f".dot.{name} {{ fill: var(--{name}); }} .curve.{name} {{ stroke: var(--{name}); }} "
    f".swatch.{name} {{ background: var(--{name}); }}"
    for name in ("stock", "ours", "barrier", "symmetric", "matmuls", "torch", "other")
)

SCRIPT = """
const box = document.getElementById("filter");
if (box) box.addEventListener("input", () => {
  for (const row of box.closest("section").querySelectorAll("tbody tr"))
    row.hidden = !row.textContent.includes(box.value);
});
"""
