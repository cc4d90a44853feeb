// Click on an image and see what an exported SAM makes of it, before and after an adapter.
//
// page.json says which models lie in this folder: {adapter, base_files}. The adapter's graphs, or the only ones, are
// in onnx/; those of the base that differ are in base/onnx/.
//
// A mark is a list of points {x, y, label} in the image's pixels: a click has one, a box its two corners.

const ORT = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.31.0-dev.20260914-8d85527a0/dist/ort-wasm-simd-threaded.asyncify";
const INTEGRITY = {
  mjs: "sha384-ik7L7J2uXfXmGuWHh3yOUDPpUslz/dJjcvZgdX5hcItLjxlkEpUF7mpCcATr3Dg8",
  wasm: "sha384-JuzrCV6BUmTUbsgNhgU94qo0vZ4l3w0VqgQAKPm0La2hXL9kmv8P9pGenfsWJY9c",
};
const OBJECT = 1, BACKGROUND = 0, TOP_LEFT = 2, BOTTOM_RIGHT = 3;
const GRID = 8; // clicks along each side for "everything"
const LEAST_SCORE = 0.7, MOST_OVERLAP = 0.7;
const COLOURS = [[64, 140, 255], [255, 138, 60], [60, 200, 130], [224, 90, 190], [240, 205, 60], [120, 220, 230]];
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const $ = (id) => document.getElementById(id);
const chosen = () => document.querySelector("input[name=model]:checked").value;
const ms = (time) => `${Math.round(time)} ms`;
const canvas = $("canvas"), context = canvas.getContext("2d");
const state = {
  picture: null, // the image as a bitmap
  marks: [], // clicks and at most one box, in the order in which they were made
  everything: false, // segment by a grid of clicks, and not by the marks
  masks: [], // {painted, share}: a canvas in the image's size, and how much of the image is inside
  cursor: null, // {x, y}: where the mouse or the keys are
  corner: null, // where a click or a box began, by mouse or keys
  drawing: null, // the box from there, as it is now
};
const graphs = {}, models = {};
let library, processor, page, device, queue = Promise.resolve();

// Words on the page

function fail(what, error) {
  console.warn(error);
  Object.assign($("error"), { hidden: false, textContent: `${what}: ${error?.message ?? error}` });
  say("");
}

/** Say something, or what is being done and how much of it is done: null for nobody knows. */
function say(what, share = 1) {
  $("progress").hidden = share >= 1;
  if (share === null) $("progress").removeAttribute("value");
  else $("progress").value = share;
  $("status").textContent = share > 0 && share < 1 ? `${what}: ${Math.round(100 * share)} %` : what;
  return new Promise((done) => setTimeout(done, 20)); // until the words are on the screen
}

/** Run one thing after another: a session of onnxruntime takes one call at a time. */
function enqueue(what, job) {
  $("error").hidden = true;
  document.body.setAttribute("aria-busy", "true");
  const mine = (queue = queue.then(job).catch((error) => fail(what, error)));
  mine.then(() => mine === queue && document.body.removeAttribute("aria-busy"));
}

// Loading

async function start() {
  say("Loading transformers.js", null);
  page = await (await fetch("page.json")).json();
  Object.assign($("models"), { hidden: !page.adapter, title: `Adapter: ${page.adapter}` });
  library = await import("transformers");
  const [mjs, wasm] = await Promise.all(["mjs", "wasm"].map(async (kind) => {
    return URL.createObjectURL(await (await fetch(`${ORT}.${kind}`, { integrity: INTEGRITY[kind] })).blob());
  }));
  library.env.backends.onnx.wasm.wasmPaths = { mjs, wasm };
  Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "./" });
  Object.assign(library.env, { useBrowserCache: false, useWasmCache: false });
  device = (await navigator.gpu?.requestAdapter().catch(() => null)) ? "webgpu" : "wasm";
  processor = await library.AutoProcessor.from_pretrained(".");
  await load(chosen());
  say(`Ready, on ${device === "webgpu" ? "the graphics card (WebGPU)" : "the processor (WASM)"}.`);
}

/** The base or the adapter; they share the graphs that the adapter did not change. */
async function load(name) {
  const encoder = await graph(name, "vision_encoder"), decoder = await graph(name, "prompt_encoder_mask_decoder");
  const sessions = { model: encoder.sessions.model, prompt_encoder_mask_decoder: decoder.sessions.model };
  return (models[name] ??= { model: new library.SamModel(encoder.config, sessions) });
}

async function graph(name, model_file_name) {
  const differs = name === "base" && page.base_files.some((path) => path.startsWith(`onnx/${model_file_name}`));
  const subfolder = differs ? "base/onnx" : "onnx", key = `${subfolder}/${model_file_name}`;
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status === "progress" && total && file.includes(".onnx")) say(`Loading ${file}`, Math.min(0.99, loaded / total));
  };
  const options = { subfolder, model_file_name, device, progress_callback };
  return (graphs[key] ??= await library.PreTrainedModel.from_pretrained(".", options));
}

// Segmenting

/** The chosen model, with the image's embeddings. */
async function embed() {
  const one = await load(chosen());
  if (one.picture === state.picture) return one;
  await say("Reading the image", null);
  const began = performance.now(), image = await library.RawImage.fromBlob(state.blob);
  const inputs = await processor(image.rgb()), embeddings = await one.model.get_image_embeddings(inputs);
  return Object.assign(one, { inputs, embeddings, took: performance.now() - began, picture: state.picture });
}

/** The best mask of each prompt, which all have the same number of points: its score and its logits. */
async function decode({ model, embeddings, inputs }, prompts) {
  const numbers = (read) => [prompts.map((points) => points.map(read))];
  const sizes = [inputs.original_sizes, inputs.reshaped_input_sizes];
  const input_points = processor.reshape_input_points(numbers(({ x, y }) => [x, y]), ...sizes);
  const input_labels = processor.image_processor.add_input_labels(numbers(({ label }) => label), input_points);
  const { iou_scores, pred_masks } = await model({ ...embeddings, input_points, input_labels });
  return Array.from(iou_scores[0], ({ data }, prompt) => {
    const score = Math.max(...data);
    return { score, logits: pred_masks[0][prompt][data.indexOf(score)] };
  });
}

/** A mask in the image's size and in one colour. */
async function paint({ inputs }, { logits }, colour) {
  const tensor = logits.view(1, 1, 1, ...logits.dims), { width, height } = state.picture;
  const [{ data }] = await processor.post_process_masks(tensor, inputs.original_sizes, inputs.reshaped_input_sizes);
  const image = new ImageData(width, height), painted = new OffscreenCanvas(width, height);
  data.forEach((inside, i) => inside && image.data.set([...colour, 255], 4 * i));
  painted.getContext("2d").putImageData(image, 0, 0);
  return { painted, share: data.reduce((sum, inside) => sum + inside, 0) / data.length };
}

async function segment() {
  if (!state.picture) return;
  const one = await embed(), prompt = state.marks.flat(), began = performance.now();
  state.masks = [];
  if (state.everything) {
    const found = await everything(one), took = performance.now() - began;
    for (const [i, mask] of found.entries()) state.masks.push(await paint(one, mask, COLOURS[i % COLOURS.length]));
    state.masks.sort((a, b) => b.share - a.share); // small masks over large ones
    say(`${found.length} masks, ${ms(took)}, image ${ms(one.took)}`);
  } else if (prompt.length) {
    const [mask] = await decode(one, [prompt]), took = performance.now() - began;
    state.masks = [await paint(one, mask, COLOURS[0])];
    const score = page.adapter ? `${chosen() === "base" ? "Base" : "Adapter"}: score` : "Score";
    const share = `${Math.round(100 * state.masks[0].share)} % of the image`;
    say(`${score} ${mask.score.toFixed(2)}, ${share}, mask ${ms(took)}, image ${ms(one.took)}`);
  } else say(`Click on an object (image read in ${ms(one.took)}).`);
  draw();
}

/** The masks of a grid of clicks, best first, without those that cover the same. */
async function everything(one) {
  const { width, height } = state.picture, found = [], kept = [];
  const place = (i, size) => ((i + 0.5) * size) / GRID;
  for (let row = 0; row < GRID; row++) {
    await say("Everything", row / GRID);
    const point = (_, i) => [{ x: place(i, width), y: place(row, height), label: OBJECT }];
    found.push(...(await decode(one, Array.from({ length: GRID }, point))));
  }
  for (const mask of found.sort((a, b) => b.score - a.score)) {
    if (mask.score > LEAST_SCORE && kept.every((other) => overlap(mask, other) < MOST_OVERLAP)) kept.push(mask);
  }
  return kept;
}

/** IoU of two masks. */
function overlap({ logits: { data: a } }, { logits: { data: b } }) {
  let both = 0, any = 0;
  for (let i = 0; i < a.length; i++) {
    both += a[i] > 0 && b[i] > 0;
    any += a[i] > 0 || b[i] > 0;
  }
  return any ? both / any : 1;
}

// Drawing

function draw() {
  if (!state.picture) return;
  const { picture, cursor, drawing } = state, scale = canvas.width / picture.width;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.5;
  for (const { painted } of state.masks) context.drawImage(painted, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
  for (const [{ x, y, label }, corner] of drawing ? [...state.marks, drawing] : state.marks) {
    const shape = new Path2D();
    if (corner) shape.rect(x * scale, y * scale, (corner.x - x) * scale, (corner.y - y) * scale);
    else shape.arc(x * scale, y * scale, 12, 0, 7);
    outline(shape, { [OBJECT]: "#0a7d3c", [BACKGROUND]: "#b3261e" }[label]);
  }
  const cross = new Path2D(`M${cursor.x * scale - 20} ${cursor.y * scale}h40m-20 -20v40`);
  if (canvas.matches(":focus-visible")) outline(cross);
  $("undo").disabled = $("clear").disabled = !state.marks.length && !state.everything;
  $("save").disabled = !state.masks.length;
  $("everything").disabled = false;
}

function outline(shape, fillStyle = "transparent") {
  for (const [strokeStyle, lineWidth] of [["#000", 8], ["#fff", 4]]) {
    Object.assign(context, { strokeStyle, lineWidth, fillStyle });
    context.fill(shape);
    context.stroke(shape);
  }
}

// What the user does

async function open(file) {
  const blob = await file, picture = await createImageBitmap(blob), { width, height } = picture;
  Object.assign(state, { blob, picture, cursor: { x: width / 2, y: height / 2 } });
  Object.assign(canvas, { width: 1400, height: Math.round((1400 * height) / width) }); // sharp marks on small images
  $("stage").classList.remove("empty");
  show([]);
}

/** Show the masks of these marks, or of the whole image. */
function show(marks, everything = false) {
  Object.assign(state, { marks, everything, masks: [], corner: null, drawing: null });
  again();
}

function again() { draw(); enqueue("The image could not be segmented", segment); }
const openLater = (file) => file && enqueue("The image could not be opened", () => open(file));
const zoom = () => canvas.clientWidth / state.picture.width; // pixels of the screen for one of the image
const follow = ({ offsetX, offsetY }) => moveTo(offsetX / zoom(), offsetY / zoom());

/** Move the cross, and with it a box from the corner, unless that is next to it. */
function moveTo(x, y) {
  const { corner, picture: { width, height } } = state;
  const cursor = { x: Math.min(Math.max(x, 0), width), y: Math.min(Math.max(y, 0), height) };
  const at = (pick, label) => ({ x: pick(corner.x, cursor.x), y: pick(corner.y, cursor.y), label });
  const far = corner && Math.hypot(cursor.x - corner.x, cursor.y - corner.y) * zoom() > 6;
  Object.assign(state, { cursor, drawing: far ? [at(Math.min, TOP_LEFT), at(Math.max, BOTTOM_RIGHT)] : null });
  draw();
}

/** Take the box, in the place of another, or else a click where it began. */
function finish({ shiftKey }) {
  const { marks, drawing, corner } = state;
  if (drawing) show([...marks.filter((mark) => mark.length === 1), drawing]);
  else if (corner) show([...marks, [{ ...corner, label: shiftKey ? BACKGROUND : OBJECT }]]);
}

async function save() {
  const { width, height } = state.picture, whole = new OffscreenCanvas(width, height), out = whole.getContext("2d");
  out.fillRect(0, 0, width, height);
  if (!state.everything) out.filter = "brightness(0) invert(1)"; // one mask: white on black
  for (const { painted } of state.masks) out.drawImage(painted, 0, 0);
  const href = URL.createObjectURL(await whole.convertToBlob({ type: "image/png" }));
  Object.assign(document.createElement("a"), { href, download: "mask.png" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  follow(event);
  state.corner = state.cursor;
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", follow);
canvas.addEventListener("pointerup", finish);
canvas.addEventListener("pointercancel", () => show(state.marks, state.everything));
canvas.addEventListener("keydown", (event) => {
  const { cursor, picture: { width, height } } = state, key = event.key.toLowerCase();
  if (event.key in STEPS) {
    const [x, y] = STEPS[event.key].map((step) => step * (event.shiftKey ? 0.1 : 0.01) * width);
    moveTo(cursor.x + x, cursor.y + y);
    say(`Cross at ${Math.round(state.cursor.x)}, ${Math.round(state.cursor.y)} of ${width}, ${height}`);
  } else if (key === "b" && !state.corner) {
    state.corner = cursor;
    say("First corner of the box");
  } else if (key === "b" || key === "enter") {
    state.corner ??= cursor;
    finish(event);
  } else if (key === "backspace") show(state.marks.slice(0, -1));
  else if (key === "escape") show([]);
  else return;
  event.preventDefault();
});
for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, draw);

const on = (id, act) => $(id).addEventListener("click", act);
on("example", () => openLater(fetch("example.jpg").then((answer) => answer.blob())));
on("undo", () => show(state.marks.slice(0, -1)));
on("clear", () => show([]));
on("everything", () => show([], true));
on("save", () => enqueue("The mask could not be saved", save));
$("file").addEventListener("change", () => openLater($("file").files[0]));
for (const radio of document.querySelectorAll("input[name=model]")) radio.addEventListener("change", again);
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    $("stage").classList.toggle("over", kind === "dragover");
    openLater(event.dataTransfer.files[0]); // none before the drop
  });
}

enqueue("The model could not be loaded", start);
