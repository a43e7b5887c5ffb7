// What the page computes. Everything above `start` is arithmetic and touches no document.

function softmax(z) {
  const top = Math.max(...z), e = z.map(x => Math.exp(x - top)), sum = e.reduce((a, b) => a + b, 0);
  return e.map(x => x / sum);
}

// rows x cols numbers, row by row, times x
function times(matrix, cols, x) {
  const out = new Float64Array(matrix.length / cols);
  for (let i = 0; i < out.length; i++) {
    let sum = 0;
    for (let j = 0; j < cols; j++) sum += matrix[i * cols + j] * x[j];
    out[i] = sum;
  }
  return out;
}

// to_out(softmax(q k^T / sqrt(d)) v) of one query x over some keys: {weights: [head][key], out: [c]}
function attention(site, x, keys) {
  const d = site.c / site.heads, q = times(site.to_q, site.c, x);
  const k = keys.map(key => times(site.to_k, site.c_key, key)), v = keys.map(key => times(site.to_v, site.c_key, key));
  const mixed = new Float64Array(site.c), weights = [];
  for (let head = 0; head < site.heads; head++) {
    const scores = k.map(row => {
      let sum = 0;
      for (let i = head * d; i < (head + 1) * d; i++) sum += q[i] * row[i];
      return sum / Math.sqrt(d);
    });
    const of = softmax(scores);
    weights.push(of);
    for (let i = head * d; i < (head + 1) * d; i++) mixed[i] = of.reduce((sum, w, j) => sum + w * v[j][i], 0);
  }
  const out = times(site.to_out, site.c, mixed);
  return {weights, out: out.map((y, i) => y + site.bias[i])};
}

// W = to_out to_v, c x c_key
function linearMap(site) {
  const W = new Float64Array(site.c * site.c_key);
  for (let i = 0; i < site.c; i++)
    for (let m = 0; m < site.c; m++) {
      const a = site.to_out[i * site.c + m];
      for (let j = 0; j < site.c_key; j++) W[i * site.c_key + j] += a * site.to_v[m * site.c_key + j];
    }
  return W;
}

function linear(site, W, key) {
  return times(W, site.c_key, key).map((y, i) => y + site.bias[i]);
}

// largest |a - b| over largest |a|
function apart(a, b) {
  let off = 0, size = 0;
  for (let i = 0; i < a.length; i++) {
    off = Math.max(off, Math.abs(a[i] - b[i]));
    size = Math.max(size, Math.abs(a[i]));
  }
  return off / size;
}

// tools.cost.accounting.run_cost, of costs of single forwards
function ledger(costs, steps, c, build) {
  const guided = Math.min(c - 1, steps), single = steps - guided, {two, one} = costs.builds[build];
  const full = steps * costs.full, shared = steps * costs.shared, built = steps * two.macs + two.once;
  const macs = guided * two.macs + single * one.macs + (guided > 0) * two.once + (single > 0) * one.once;
  return {guided, single, full, by_sharing: full - shared, by_build: shared - built, by_guidance: built - macs, macs};
}

function nearest(list, value) {
  return list.reduce((best, x, i) => (Math.abs(x - value) < Math.abs(list[best] - value) ? i : best), 0);
}

function amplified(difference, factor) {
  return Math.max(0, Math.min(255, 128 + 128 * factor * difference));
}

function counted(n) {
  const units = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]];
  const [size, unit] = units.find(([size]) => Math.abs(n) >= size) || [1, ""];
  return unit ? (n / size).toPrecision(4) + unit : String(n);
}

function share(x) {
  return (100 * x).toFixed(x !== 0 && Math.abs(x) < 0.01 ? 3 : 1) + " %";
}

function ratio(x) {
  return x === 0 ? "0, to the bit" : x < 0.001 ? x.toExponential(1) : share(x);
}

// --- the document ---------------------------------------------------------------------------------------------------

async function unpacked(array) {
  const bytes = Uint8Array.from(atob(array.data), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  if (array.type === "u8") return new Uint8Array(buffer);
  if (array.type === "f32") return new Float32Array(buffer);
  return Float32Array.from(array.type === "i8" ? new Int8Array(buffer) : new Int16Array(buffer), x => x * array.scale);
}

function picture(uri) {
  return new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = failed;
    image.src = uri;
  });
}

const $ = id => document.getElementById(id);

// dark, warm, bright: of a share of the largest
function heat(x) {
  const anchors = [[13, 18, 41], [217, 89, 26], [255, 242, 191]], i = x < 0.5 ? 0 : 1, part = 2 * x - i;
  return anchors[i].map((low, c) => Math.round(low + part * (anchors[i + 1][c] - low)));
}

function range(id, low, high, value, changed) {
  const input = $(id);
  Object.assign(input, {min: low, max: high, value});
  input.addEventListener("input", changed);
  return input;
}

function bars(values, size, colour) {
  const w = 480 / values.length, mid = 30;
  return [...values].map((y, i) => {
    const high = Math.min(29, 29 * Math.abs(y) / size);
    return `<rect x="${(i * w).toFixed(2)}" y="${(y < 0 ? mid : mid - high).toFixed(2)}" width="${(0.8 * w).toFixed(2)}" height="${high.toFixed(2)}" fill="${colour}"/>`;
  }).join("");
}

async function start(data) {
  drawU(data);
  await drawSteps(data);
  await drawMaps(data);
  await drawBuilds(data);
  await drawTheorem(data);
  drawLedger(data);
  document.body.dataset.ready = "yes";
}

function drawU(data) {
  const groups = [...document.querySelectorAll("#u svg .block")], select = $("block");
  select.innerHTML = data.blocks.map((block, i) => `<option value="${i}">${block.name}</option>`).join("");
  function show(i, focus) {
    const block = data.blocks[i];
    select.value = i;
    for (const group of groups) {
      const on = group.dataset.block === String(i);
      group.classList.toggle("on", on);
      group.setAttribute("tabindex", on ? 0 : -1);
      if (on && focus) group.focus();
    }
    $("block-shape").textContent = `${block.name}: ${block.shape}; ${block.numbers}`;
    $("block-kinds").innerHTML = block.kinds.map(kind =>
      `<tr><th scope="row">${kind.kind}</th><td>${kind.parameters.toLocaleString("en")}</td><td>${counted(kind.macs)}</td><td>${counted(kind.once)}</td></tr>`).join("");
  }
  for (const group of groups) {
    const i = Number(group.dataset.block);
    group.setAttribute("role", "button");
    group.setAttribute("aria-label", group.querySelector("title").textContent);
    group.addEventListener("pointerenter", () => show(i));
    group.addEventListener("focus", () => show(i));
    group.addEventListener("click", () => show(i, true));
    group.addEventListener("keydown", event => {
      const to = {ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1}[event.key];
      if (to === undefined || !data.blocks[to]) return;
      event.preventDefault();
      show(to, true);
    });
  }
  select.addEventListener("input", () => show(Number(select.value)));
  show(data.blocks.findIndex(block => block.kinds.some(kind => kind.kind === "SCA")));
}

async function drawSteps(data) {
  const steps = data.steps;
  function show() {
    const step = steps[input.value - 1];
    $("denoised").src = step.strip;
    $("denoised").alt = `The ${data.frames} denoised frames of step ${step.number}`;
    $("step-said").textContent = `step ${step.number} of ${steps.length}, from sigma ${step.left} to ${step.reached}, ${step.branches}; ${step.away} from where it ends (root mean square of the latents)`;
  }
  const input = range("step", 1, steps.length, Math.ceil(steps.length / 2), show);
  show();
}

async function drawMaps(data) {
  const {maps, size: [w, h]} = data, frames = data.shown.length;
  const strips = await Promise.all(maps.steps.map(number => picture(data.steps[number - 1].strip)));
  for (const site of maps.sites)
    for (const step of site.steps)
      for (const kind of ["space", "space_top", "time", "time_top"]) step[kind] = await unpacked(step[kind]);
  $("map-site").innerHTML = maps.sites.map((site, i) => `<option value="${i}">${site.name}</option>`).join("");
  let rows = 0, cols = 0;

  function show() {
    const site = maps.sites[$("map-site").value];
    [rows, cols] = site.grid;
    Object.assign($("map-row"), {max: rows});
    Object.assign($("map-column"), {max: cols});
    const at = $("map-step").value - 1, f = $("map-frame").value - 1, y = $("map-row").value - 1, x = $("map-column").value - 1;
    const step = site.steps[at], s = rows * cols, place = y * cols + x;
    const space = step.space.subarray((f * s + place) * s, (f * s + place + 1) * s), top = step.space_top[f * s + place];
    const time = step.time.subarray((place * frames + f) * frames, (place * frames + f + 1) * frames), over = step.time_top[place * frames + f];

    for (const [id, first, count] of [["map-strip", 0, frames], ["map-asks", f, 1], ["map-asked", f, 1]]) {
      const canvas = $(id), paint = canvas.getContext("2d"), zoom = count === 1 ? 4 : 2;
      Object.assign(canvas, {width: zoom * count * w, height: zoom * h});
      paint.imageSmoothingEnabled = false;
      paint.drawImage(strips[at], first * w, 0, count * w, h, 0, 0, canvas.width, canvas.height);
      const cw = zoom * w / cols, ch = zoom * h / rows, left = zoom * w * (f - first) + x * cw;
      if (id === "map-asked") {
        space.forEach((value, i) => {
          paint.fillStyle = `rgba(${heat(value / 255)}, 0.75)`;
          paint.fillRect((i % cols) * cw, Math.floor(i / cols) * ch, cw, ch);
        });
      }
      for (const [colour, width] of [["#000", 3], ["#5cf", 1.5]]) {
        Object.assign(paint, {strokeStyle: colour, lineWidth: width});
        paint.strokeRect(left + 1.5, y * ch + 1.5, cw - 3, ch - 3);
      }
    }
    const most = space.indexOf(255), then = time.indexOf(255);
    $("map-time").innerHTML = [...time].map((value, i) =>
      `<li><span class="bar" style="height:${(100 * value / 255 * over).toFixed(1)}px"></span>${(100 * value / 255 * over).toFixed(1)}</li>`).join("");
    $("map-said").textContent = `Step ${maps.steps[at]}, frame ${data.shown[f] + 1}, row ${y + 1}, column ${x + 1}. ` +
      `In space it looks most at row ${Math.floor(most / cols) + 1}, column ${most % cols + 1}: ${share(top)}` +
      ` (evenly it would be ${share(1 / s)}). Along time, most at frame ${data.shown[then] + 1}: ${share(over)} (evenly ${share(1 / frames)}).`;
  }

  $("map-site").addEventListener("input", show);
  range("map-step", 1, maps.steps.length, Math.ceil(maps.steps.length / 2), show);
  range("map-frame", 1, frames, 1, show);
  const [y, x] = maps.start, [r, c] = maps.sites[0].grid;
  range("map-row", 1, r, y + 1, show);
  range("map-column", 1, c, x + 1, show);
  for (const [id, count] of [["map-strip", frames], ["map-asks", 1], ["map-asked", 1]]) {
    $(id).addEventListener("pointermove", event => {
      const box = $(id).getBoundingClientRect(), over = count * (event.clientX - box.left) / box.width;
      if (count > 1) $("map-frame").value = 1 + Math.floor(over);
      $("map-row").value = 1 + Math.floor(rows * (event.clientY - box.top) / box.height);
      $("map-column").value = 1 + Math.floor(cols * (over - Math.floor(over)));
      show();
    });
  }
  show();
}

async function drawBuilds(data) {
  const {builds, size: [w, h]} = data, frames = data.shown.length;
  for (const build of builds) {
    build.image = await picture(build.strip);
    build.off = build.difference ? await unpacked(build.difference) : null;
  }
  $("builds").innerHTML = builds.map((build, i) =>
    `<figure><figcaption><code>vcut=${build.name}</code></figcaption><canvas id="build-${i}" role="img"></canvas>` +
    (build.difference ? `<canvas id="off-${i}" role="img"></canvas>` : "") + `<p>${build.said}</p></figure>`).join("");
  function show() {
    const f = $("build-frame").value - 1, factor = 10 ** $("amplify").value;
    $("build-said").textContent = `frame ${data.shown[f] + 1}, differences times ${factor.toLocaleString("en")}, around grey`;
    builds.forEach((build, i) => {
      const canvas = $(`build-${i}`);
      Object.assign(canvas, {width: w, height: h});
      canvas.getContext("2d").drawImage(build.image, f * w, 0, w, h, 0, 0, w, h);
      canvas.setAttribute("aria-label", `Frame ${data.shown[f] + 1} of vcut=${build.name}`);
      if (!build.off) return;
      const off = $(`off-${i}`), paint = Object.assign(off, {width: w, height: h}).getContext("2d");
      const pixels = paint.createImageData(w, h), begin = f * 3 * w * h;
      for (let p = 0; p < w * h; p++) {
        for (let rgb = 0; rgb < 3; rgb++)
          pixels.data[4 * p + rgb] = amplified(build.off[begin + rgb * w * h + p], factor);
        pixels.data[4 * p + 3] = 255;
      }
      paint.putImageData(pixels, 0, 0);
      off.setAttribute("aria-label", `Its difference from vcut=${builds[0].name}, times ${factor}`);
    });
  }
  range("build-frame", 1, frames, frames, show);
  range("amplify", 0, 6, 1, show);
  let timer = 0;
  $("play").addEventListener("click", () => {
    if (timer) timer = clearInterval(timer) || 0;
    else timer = setInterval(() => {
      $("build-frame").value = 1 + $("build-frame").value % frames;
      show();
    }, 1000 / data.fps);
    $("play").textContent = timer ? "Stop" : "Play";
    $("play").setAttribute("aria-pressed", timer ? "true" : "false");
  });
  show();
}

async function drawTheorem(data) {
  const site = {...data.site};
  for (const name of ["to_q", "to_k", "to_v", "to_out", "bias", "key", "tokens"]) site[name] = await unpacked(site[name]);
  const count = site.tokens.length / site.c, token = i => site.tokens.subarray(i * site.c, (i + 1) * site.c);
  const W = linearMap(site), flat = linear(site, W, site.key);
  const second = blend => [...site.key].map(y => (1 - blend) * y);
  const zero = token(0), first = {one: attention(site, zero, [site.key]).out};
  function show() {
    const i = $("query").value - 1, scale = Number($("strength").value), x = token(i).map(y => scale * y);
    const blend = Number($("second").value), keys = [site.key, second(blend)];
    const one = attention(site, x, [site.key]), two = attention(site, x, keys), was = attention(site, zero, keys);
    const size = Math.max(...[...flat, ...two.out].map(Math.abs));
    $("out-linear").innerHTML = bars(flat, size, "var(--ink)");
    $("out-one").innerHTML = bars(one.out, size, "var(--sca)");
    $("out-two").innerHTML = bars(two.out, size, "var(--tca)");
    const said = result => result.weights.map(of => of.map(w => w.toFixed(4)).join(" + ")).join(", ");
    $("said-linear").textContent = "has no query";
    $("said-one").textContent = `weights of its ${site.heads} heads: ${said(one)}. Off W c + b by ${ratio(apart(flat, one.out))}; moved by this query from that of the first place: ${ratio(apart(first.one, one.out))}.`;
    $("said-two").textContent = `weights of its ${site.heads} heads: ${said(two)}. Moved by this query from that of the first place: ${ratio(apart(was.out, two.out))}.`;
    $("query-said").textContent = `the token of place ${i + 1} of ${count}, times ${scale}; the second key is the image's, times ${(1 - blend).toFixed(2)}`;
  }
  range("query", 1, count, Math.ceil(count / 2), show);
  range("strength", 0, 4, 1, show);
  range("second", 0, 2, 1, show);
  const model = attention(site, zero, [site.key]).out;
  $("site-said").textContent = `${site.name}: ${site.c} channels, ${site.heads} heads, a key of ${site.c_key} numbers. What the model itself returned here is ${apart(await unpacked(site.returned), model).toExponential(1)} off what this page computes, its weights being sent with 16 bits.`;
  show();
}

function drawLedger(data) {
  const select = $("cost-model"), names = Object.keys(data.costs);
  select.innerHTML = names.map(name => `<option>${name}</option>`).join("");
  $("cost-build").innerHTML = Object.keys(data.costs[names[0]].builds).map(name => `<option>${name}</option>`).join("");
  function show() {
    const costs = data.costs[select.value], c = Number($("cut").value);
    const run = ledger(costs, costs.steps, c, $("cost-build").value);
    const lines = data.ledger.map(([field, words]) => [words, run[field], field === "full" || field === "macs"]);
    $("ledger").innerHTML = lines.map(([words, macs, whole]) => `<tr><th scope="row">${words}</th>` +
      `<td>${whole ? "" : macs > 0 ? "−" : ""}${counted(Math.abs(macs))}</td><td>${share(macs / run.full)}</td>` +
      `<td class="wide"><span class="bar ${whole ? "whole" : "saved"}" style="width:${(100 * Math.max(0, macs) / run.full).toFixed(2)}%"></span></td></tr>`).join("");
    const count = costs.builds[$("cost-build").value].parameters.toLocaleString("en");
    $("cut-said").textContent = `${count} parameters; ` + (c > costs.steps ? `no cut: ${run.guided} guided steps` : `c = ${c}: ${run.guided} guided steps, then ${run.single} on one branch`);
  }
  range("cut", 1, 2, 1, show);
  function choose() {
    const {steps} = data.costs[select.value];
    Object.assign($("cut"), {max: steps + 1});
    $("cut").value = Math.round(data.cut / 25 * steps);
    show();
  }
  select.addEventListener("input", choose);
  $("cost-build").addEventListener("input", show);
  $("cost-build").value = Object.keys(data.costs[names[0]].builds)[1];
  choose();
}

if (typeof document !== "undefined") start(JSON.parse($("data").textContent));
