"""Style and script of the diff page. Plain text without a word from any model; no network, no library."""

from __future__ import annotations

STYLE = """
:root{--bg:#fff;--panel:#f6f7f9;--ink:#1d2430;--dim:#6b7686;--line:#dfe3e9;--edge:#b4bdc9;--dot:#5b6b80;
--out:#c5303b;--outbg:#fdecec;--in:#17803d;--inbg:#e7f6ec;--mark:#fff3bf;--accent:#2f63d6}
@media(prefers-color-scheme:dark){:root{--bg:#14171c;--panel:#1b1f26;--ink:#dde3ec;--dim:#8f9aab;--line:#2c323c;
--edge:#4a5463;--dot:#93a1b5;--out:#ff7b82;--outbg:#3a1f23;--in:#5fd38a;--inbg:#17311f;--mark:#5c4a10;--accent:#7aa2ff}}
*{box-sizing:border-box}
body{margin:0;height:100vh;display:flex;flex-direction:column;background:var(--bg);color:var(--ink);
font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header{display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center;padding:10px 18px;background:var(--panel);
border-bottom:1px solid var(--line)}
h1{font-size:16px;margin:0;font-weight:650}
h2{font-size:11px;letter-spacing:.06em;text-transform:uppercase;color:var(--dim);margin:0;display:inline}
.cards{display:flex;gap:20px}.card{display:flex;gap:7px;align-items:baseline;white-space:nowrap}
.card small{color:var(--dim)}.card b{font-weight:600;font-variant-numeric:tabular-nums}.card i{font-style:normal;font-size:12px}
.less{color:var(--in)}.more{color:var(--accent)}
.chips{display:flex;flex-wrap:wrap;gap:5px;flex:1 1 300px}
.chip{border:1px solid var(--line);background:var(--bg);border-radius:11px;padding:1px 9px;font-size:12px;
color:var(--ink);white-space:nowrap}
.chip i{font-style:normal;font-weight:600}.chip.less i{color:var(--out)}.chip.more i{color:var(--in)}
.chip.same{color:var(--in);font-weight:600}
.tools{display:flex;gap:6px;align-items:center;margin-left:auto}
.tools input{width:190px;padding:5px 9px;border:1px solid var(--line);border-radius:6px;background:var(--bg);color:inherit;font:inherit}
.tools button{padding:4px 9px;border:1px solid var(--line);border-radius:6px;background:var(--bg);color:inherit;font:inherit;cursor:pointer}
.tools button:hover{border-color:var(--accent)}#hits{color:var(--dim);font-size:12px}
#body{flex:1;display:flex;min-height:0}
#side{width:270px;flex:none;overflow:auto;border-right:1px solid var(--line);background:var(--panel);padding:14px 12px;font-size:13px}
#side h2 small,#side summary small{font-weight:400;color:var(--dim)}
#side details{margin-top:6px}#side .list{margin-top:18px}
#side summary{cursor:pointer;border-radius:5px;padding:2px 5px;overflow-wrap:anywhere}
#side summary:hover,#side a:hover{background:var(--line)}
#side em{font-style:normal;font-weight:650;background:var(--line);border-radius:9px;padding:0 7px;font-size:12px}
#side a{display:block;color:inherit;text-decoration:none;padding:1px 5px 1px 20px;border-radius:5px;overflow-wrap:anywhere;font-size:12px}
#side ul{list-style:none;margin:4px 0;padding:0 0 0 8px;font-size:12px;overflow-wrap:anywhere}#side li{margin:2px 0}
#side .out::before{content:"\\2212 "}#side .in::before{content:"+ "}
#side .out{color:var(--out)}#side .in{color:var(--in)}
#graphs{flex:1;overflow:auto;padding-bottom:40px;scroll-behavior:smooth}
.heads,.row{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);column-gap:1px;background:var(--line)}
.heads{position:sticky;top:0;z-index:2;border-bottom:1px solid var(--line)}
.heads b{background:var(--panel);padding:5px 14px;font-size:11px;letter-spacing:.06em;text-transform:uppercase;color:var(--dim)}
.row{height:30px;content-visibility:auto;contain-intrinsic-size:auto 30px}
.cell{background:var(--bg);display:flex;align-items:center;overflow:hidden;cursor:default;padding-left:6px}
.cell[data-line]:hover{background:var(--panel)}.cell.gap{background:var(--bg)}
.changed .cell.gap{background:repeating-linear-gradient(135deg,var(--bg) 0 6px,var(--panel) 6px 12px)}
.cell.out{background:var(--outbg);box-shadow:inset 3px 0 var(--out)}.cell.in{background:var(--inbg);box-shadow:inset 3px 0 var(--in)}
.cell.out .t::before,.cell.in .t::before{display:inline-block;width:13px;font-weight:700}
.cell.out .t::before{content:"\\2212";color:var(--out)}.cell.in .t::before{content:"+";color:var(--in)}
.cell.picked{outline:2px solid var(--accent);outline-offset:-2px}
.now .cell{filter:brightness(.965)}
svg{flex:none}path{fill:none;stroke:var(--edge);stroke-width:1.5}circle{fill:var(--dot);stroke:var(--bg);stroke-width:1.5}
.out circle{fill:var(--out)}.in circle{fill:var(--in)}
.t{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;padding-left:6px;font:12px/30px ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
.t.d1{margin-left:20px;border-left:2px solid var(--line)}
.t s,.t u{text-decoration:none;color:var(--dim)}
.op{display:inline-block;line-height:19px;border-radius:5px;padding:0 7px;margin-right:8px;font-weight:600;
background:color-mix(in srgb,var(--hue,#8793a5) 16%,transparent);color:color-mix(in srgb,var(--hue,#8793a5) 72%,var(--ink))}
.linear{--hue:#2f63d6}.norm{--hue:#b3491d}.quant{--hue:#8a3fc0}.shape{--hue:#8a7a1f}.pool{--hue:#0f8a84}.control{--hue:#c02f7d}
.io{--hue:var(--dim)}
.t a{cursor:pointer;border-radius:3px}.t a.w{color:var(--dim)}.t a:hover{text-decoration:underline}
a.on{background:var(--mark)}.hit .cell{background:var(--mark)}
.run>summary{cursor:pointer;padding:5px 14px;color:var(--dim);font-size:12px;background:var(--panel);
border-block:1px solid var(--line);list-style-position:inside}
.run>summary small{margin-left:12px}.run>summary:hover{color:var(--ink)}
footer{border-top:1px solid var(--line);background:var(--panel);padding:7px 18px;min-height:34px;max-height:120px;overflow:auto;
font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere;white-space:pre-wrap}
@media(max-width:900px){#side{display:none}}
"""  # noqa: E501

SCRIPT = """
(function(){
"use strict";
var all=function(q,r){return Array.prototype.slice.call((r||document).querySelectorAll(q))};
var $=function(i){return document.getElementById(i)};
var heads=all(".row[id]"),runs=all("details.run"),at=-1,picked=null;
function reveal(row){var d=row.closest("details.run");if(d)d.open=true;row.scrollIntoView({block:"center"})}
function go(row){
  all(".row.now").forEach(function(r){r.classList.remove("now")});
  all('.row[data-h="'+row.dataset.h+'"]').forEach(function(r){r.classList.add("now")});
  at=heads.indexOf(row);reveal(row);pick(row.querySelector(".cell[data-line]"))}
function step(n){if(heads.length)go(heads[((at<0&&n<0?0:at)+n+heads.length)%heads.length])}
function pick(cell){
  if(!cell)return;if(picked)picked.classList.remove("picked");picked=cell;cell.classList.add("picked");
  var lines=all(".cell[data-line]",cell.parentNode).map(function(c){return c.dataset.line});
  $("line").textContent=lines.filter(function(l,i){return lines.indexOf(l)===i}).join("\\n")}
function light(v){
  all("a.on").forEach(function(a){a.classList.remove("on")});
  all('a[data-v="'+v+'"]').forEach(function(a){a.classList.add("on")})}
function find(){
  var q=$("find").value.trim().toLowerCase(),hits=[];
  all(".row.hit").forEach(function(r){r.classList.remove("hit")});
  if(q)hits=all(".row").filter(function(r){
    return all(".cell[data-line]",r).some(function(c){return c.dataset.line.toLowerCase().indexOf(q)>=0})});
  hits.forEach(function(r){r.classList.add("hit")});
  $("hits").textContent=q?hits.length+" found":"";return hits}
var turn=0;
$("find").addEventListener("input",function(){turn=0;var h=find();if(h.length)reveal(h[0])});
$("find").addEventListener("keydown",function(e){
  if(e.key==="Enter"){var h=find();if(h.length){turn=(turn+(e.shiftKey?h.length-1:1))%h.length;reveal(h[turn]);pick(h[turn].querySelector(".cell[data-line]"))}}
  if(e.key==="Escape"){e.target.value="";find();e.target.blur()}});
$("graphs").addEventListener("click",function(e){
  var a=e.target.closest("a[data-v]");if(a)light(a.dataset.v);
  pick(e.target.closest(".cell[data-line]"))});
$("side").addEventListener("click",function(e){
  var s=e.target.closest("summary[data-hunk]"),a=e.target.closest("a[href]");
  if(s)go($("h"+s.dataset.hunk));
  if(a){e.preventDefault();go($(a.getAttribute("href").slice(1)))}});
function fold(){var open=runs.some(function(d){return !d.open});runs.forEach(function(d){d.open=open});
  $("fold").textContent=open?"fold all":"unfold all"}
$("fold").addEventListener("click",fold);
$("next").addEventListener("click",function(){step(1)});
$("previous").addEventListener("click",function(){step(-1)});
document.addEventListener("keydown",function(e){
  if(e.target.tagName==="INPUT"||e.ctrlKey||e.metaKey||e.altKey)return;
  if(e.key==="n")step(1);if(e.key==="p")step(-1);if(e.key==="f")fold();
  if(e.key==="/"){e.preventDefault();$("find").focus()}});
if(location.hash&&$(location.hash.slice(1))&&heads.indexOf($(location.hash.slice(1)))>=0)go($(location.hash.slice(1)));
})();
"""  # noqa: E501
