//! How the page looks.

/// CSS of the report, which the comparison of runs shares.
pub(in crate::report) const STYLE: &str = "\
*{box-sizing:border-box}
body{margin:0 auto;padding:32px 20px 56px;max-width:1120px;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 14px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.eyebrow{margin:0 0 4px;font-size:13px;letter-spacing:.06em;text-transform:uppercase;color:var(--muted)}
.sub{margin:0 0 18px;color:var(--muted)}
.sep{color:var(--axis);padding:0 3px}
.chip{display:inline-block;padding:0 9px;border-radius:99px;font-size:13px;line-height:22px;
background:var(--line);color:var(--ink);white-space:nowrap}
.chip.good{background:var(--good-bg);color:var(--good)}
.chip.bad{background:var(--bad-bg);color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:12px;margin:0 0 14px}
.card,section{background:var(--surface);border:1px solid var(--line);border-radius:12px}
.card{padding:14px 16px}
.card dt{font-size:13px;color:var(--muted)}
.card dd{margin:2px 0 0;font-size:27px;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}
.card small{display:block;font-size:13px;font-weight:400;color:var(--muted)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 18px;font-size:14px}
a{color:var(--info)}
section{padding:20px;margin:0 0 16px;overflow:hidden}
.notes{list-style:none;margin:0;padding:0;display:grid;gap:8px}
.notes li{display:flex;gap:10px;align-items:baseline}
.mark{flex:none;width:22px;height:22px;border-radius:50%;text-align:center;line-height:22px;
font-size:13px;font-weight:700}
.bad .mark{background:var(--bad-bg);color:var(--bad)}
.info .mark{background:var(--info-bg);color:var(--info)}
.good .mark{background:var(--good-bg);color:var(--good)}
figure{margin:0;min-width:0}
figcaption{font-size:14px;font-weight:600;margin:0 0 6px}
svg{display:block;width:100%;height:auto;overflow:visible}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:26px 28px}
figure+.grid{margin-top:28px}
.scroll{overflow-x:auto;margin:0 0 6px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-size:13px;color:var(--muted);padding:0 0 6px}
th,td{padding:6px 12px 6px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:baseline}
thead th{font-size:13px;font-weight:500;color:var(--muted)}
tbody th{font-weight:400}
td:last-child,th:last-child{padding-right:0}
tbody tr:last-child>*{border-bottom:0}
.n{text-align:right}
td.n{white-space:nowrap}
.model>*{font-weight:650}
.bar{width:24%;vertical-align:middle}
.bar i{display:block;height:10px;border-radius:3px;background:var(--axis)}
.model .bar i{background:var(--series-0)}
.trits{min-width:110px;white-space:nowrap;font-size:0;vertical-align:middle}
.trits i{display:inline-block;height:10px;background:var(--series-1)}
.trits i:nth-child(2){background:var(--line)}
.trits i:nth-child(3){background:var(--series-0)}
details{margin:10px 0 0}
summary{cursor:pointer;font-size:14px;font-weight:600;margin:0 0 8px}
.sample{padding:0 0 12px;margin:0 0 12px;border-bottom:1px solid var(--line)}
.sample:last-child{padding:0;margin:0;border:0}
.sample p{margin:0}
.sample .text{white-space:pre-wrap;overflow-wrap:anywhere;font-family:Georgia,'Times New Roman',serif;font-size:17px}
.sample .facts{margin-top:4px;font-size:13px;color:var(--muted)}
mark{background:var(--mark);color:inherit;border-radius:3px;white-space:pre-wrap}
dl.facts{margin:0 0 10px;font-size:14px}
dl.facts div{display:grid;grid-template-columns:minmax(130px,240px) 1fr;gap:12px;padding:5px 0;
border-bottom:1px solid var(--line)}
dl.facts div:last-child{border:0}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
.none{color:var(--muted);margin:0}
footer{color:var(--muted);font-size:13px}
@media(max-width:700px){.wide{overflow-x:auto}.wide svg{min-width:640px}section{padding:16px}}
@media print{body{background:none;padding:0}section{break-inside:avoid}nav{display:none}}
";
