// The page: objects side by side, seen by one camera at one time.

const element = (id) => document.getElementById(id);
const BACKGROUNDS = ["#ffffff", "#000000", "#808080"];
const state = {
  frame: 0, playing: !matchMedia("(prefers-reduced-motion: reduce)").matches, turning: false,
  azimuth: 0, elevation: 0, nearness: 1, beside: true, over: false,
};
const viewer = { state, panes: [], ready: false, draws: 0 }; // for the console, and tests
let stale = true; // something has changed since the last picture

class Pane {
  static async make(object) {
    const gaussians = await MovingGaussians.decode(bytesOf(object.data));
    const images = object.input.map((source) => Object.assign(new Image(), { src: source }));
    await Promise.all(images.map((image) => image.decode()));
    return new Pane(object, gaussians, images);
  }

  constructor({ name, rig }, gaussians, images) {
    Object.assign(this, { name, rig, gaussians, images, timestep: -1, recorder: null });
    this.root = document.createElement("section");
    this.root.className = "pane";
    this.seen = document.createElement("img");
    this.seen.className = "seen";
    this.seen.alt = "the input video";
    const stage = document.createElement("div");
    stage.className = "stage";
    this.canvas = document.createElement("canvas");
    this.title = document.createElement("p");
    stage.append(this.canvas, this.title);
    this.root.append(this.seen, stage);
    element("panes").append(this.root);
    this.drawing = new Drawing(this.canvas, gaussians.count);
    this.canvas.addEventListener("webglcontextlost", () => {
      element("message").textContent = "The browser has taken its pictures back: load the page again.";
    });
    follow(this.canvas);
    new ResizeObserver(() => { stale = true; }).observe(stage);
  }

  get seconds() { return this.gaussians.timesteps / this.gaussians.fps; }

  draw(seconds) {
    const { gaussians, drawing, rig, images } = this;
    const t = Math.floor(seconds * gaussians.fps + 1e-6) % gaussians.timesteps;
    if (t !== this.timestep) {
      this.timestep = t;
      drawing.load(gaussians.frame(t, drawing.floats));
      if (images.length) {
        this.seen.src = images[t % images.length].src;
        drawing.show(images[t % images.length]);
      }
      this.title.textContent = `${this.name}: ${gaussians.about.gaussians.toLocaleString("en")} Gaussians, `
        + `${drawing.count.toLocaleString("en")} seen, ${gaussians.fps} fps`;
    }
    this.seen.hidden = !(state.beside && images.length);
    const box = this.canvas.parentElement.getBoundingClientRect();
    const dots = devicePixelRatio || 1;
    drawing.resize(Math.max(1, Math.round(box.width * dots)), Math.max(1, Math.round(box.height * dots)));
    const over = state.over && images.length > 0;
    const color = element("background").value;
    drawing.draw({
      view: over ? orbitView(rig.azimuths_deg[0], 0, rig.radius)
        : orbitView(rig.azimuths_deg[0] + state.azimuth, state.elevation, rig.radius * state.nearness),
      fovDeg: rig.fov_deg,
      scaling: Number(element("scaling").value),
      opaqueness: Number(element("opaqueness").value),
      background: [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16) / 255),
      share: over ? 1 - Number(element("mix").value) : 0,
    });
  }

  still() {
    this.canvas.toBlob((blob) => save(blob, `${this.name}.png`), "image/png");
  }

  record(begin) {
    if (!begin) return this.recorder?.stop();
    const kinds = ["video/mp4;codecs=avc1.640028", "video/mp4", "video/webm;codecs=vp9", "video/webm"];
    const mimeType = kinds.find((kind) => MediaRecorder.isTypeSupported(kind));
    const parts = [];
    this.recorder = new MediaRecorder(this.canvas.captureStream(30), { mimeType, videoBitsPerSecond: 12e6 });
    this.recorder.ondataavailable = (event) => parts.push(event.data);
    this.recorder.onstop = () => {
      this.recorder = null;
      const type = mimeType.split(";")[0];
      save(new Blob(parts, { type }), `${this.name}.${type.split("/")[1]}`);
    };
    this.recorder.start();
  }
}

function save(blob, name) {
  viewer.saved = { name, size: blob.size };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// The camera follows a mouse, a pen and fingers.
function follow(canvas) {
  const points = new Map();
  const apart = () => {
    const [a, b] = [...points.values()];
    return Math.hypot(a.x - b.x, a.y - b.y);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    points.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = points.get(event.pointerId);
    if (!last) return;
    const before = points.size === 2 ? apart() : 0;
    points.set(event.pointerId, { x: event.clientX, y: event.clientY });
    leaveOverlay();
    if (points.size === 1) turn(-0.4 * (event.clientX - last.x), -0.4 * (event.clientY - last.y));
    else if (before > 0) approach(before / Math.max(apart(), 1));
  });
  for (const kind of ["pointerup", "pointercancel"])
    canvas.addEventListener(kind, (event) => points.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    leaveOverlay();
    approach(Math.exp(0.001 * event.deltaY));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => actions.reset());
}

function leaveOverlay() {
  if (!state.over) return;
  Object.assign(state, { azimuth: 0, elevation: 0, nearness: 1 });
  press("over", false);
}

function turn(azimuth, elevation) {
  state.azimuth = (state.azimuth + azimuth) % 360;
  state.elevation = Math.min(89, Math.max(-89, state.elevation + elevation));
  stale = true;
}

function approach(factor) {
  state.nearness = Math.min(5, Math.max(0.1, state.nearness * factor));
  stale = true;
}

function press(name, on) {
  state[name] = on;
  element(name).setAttribute("aria-pressed", on);
  stale = true;
}

function play(on) {
  state.playing = on;
  element("play").textContent = on ? "pause" : "play";
  stale = true;
}

// The slider counts frames of the first object, over the longest clip.
function frames() {
  return Math.max(...viewer.panes.map((pane) => Math.round(pane.seconds * viewer.panes[0].gaussians.fps)));
}

function goTo(frame) {
  state.frame = ((frame % frames()) + frames()) % frames();
  stale = true;
}

const actions = {
  play: () => play(!state.playing),
  back: () => { play(false); goTo(Math.floor(state.frame) - 1); },
  ahead: () => { play(false); goTo(Math.floor(state.frame) + 1); },
  turning: () => press("turning", !state.turning),
  reset: () => { Object.assign(state, { azimuth: 0, elevation: 0, nearness: 1 }); press("turning", false); },
  beside: () => press("beside", !state.beside),
  over: () => press("over", !state.over),
  still: () => { draw(); viewer.panes.forEach((pane) => pane.still()); },
  record: () => {
    press("record", !state.record);
    viewer.panes.forEach((pane) => pane.record(state.record));
  },
  background: () => {
    const next = BACKGROUNDS.indexOf(element("background").value) + 1;
    element("background").value = BACKGROUNDS[next % BACKGROUNDS.length];
    stale = true;
  },
  hide: () => { document.body.classList.toggle("bare"); stale = true; },
  nearer: () => approach(0.9),
  farther: () => approach(1 / 0.9),
};
const KEYS = {
  " ": "play", ArrowLeft: "back", ArrowRight: "ahead", t: "turning", r: "reset", i: "beside", o: "over",
  s: "still", v: "record", b: "background", h: "hide", "+": "nearer", "=": "nearer", "-": "farther",
};

function listen() {
  for (const name of ["play", "back", "ahead", "turning", "reset", "beside", "over", "still", "record"])
    element(name).addEventListener("click", actions[name]);
  for (const name of ["background", "scaling", "opaqueness", "mix"])
    element(name).addEventListener("input", () => { stale = true; });
  element("time").addEventListener("input", () => { play(false); goTo(Number(element("time").value)); });
  addEventListener("keydown", (event) => {
    const ranged = event.target.matches?.("input, select") && event.key.startsWith("Arrow");
    const pressed = event.target.matches?.("button") && event.key === " ";
    if (event.ctrlKey || event.metaKey || event.altKey || ranged || pressed || !(event.key in KEYS)) return;
    event.preventDefault();
    actions[KEYS[event.key]]();
  });
  addEventListener("hashchange", readAddress);
  const some = viewer.panes.some((pane) => pane.images.length);
  for (const name of ["beside", "over", "mix"]) element(name).disabled = !some;
  element("record").disabled = !("MediaRecorder" in window);
}

// viewer.html#t=3&az=90&el=-20&near=1.2&play=0&bg=000000&size=1&opacity=1&input=0&over=1&mix=0.5&ui=0
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name, use) => {
    if (given.has(name) && Number.isFinite(Number(given.get(name)))) use(Number(given.get(name)));
  };
  number("play", (x) => play(x !== 0));
  number("t", goTo);
  number("az", (x) => { state.azimuth = x; });
  number("el", (x) => { state.elevation = Math.min(89, Math.max(-89, x)); });
  number("near", (x) => { state.nearness = 1; approach(1 / x); });
  number("size", (x) => { element("scaling").value = x; });
  number("opacity", (x) => { element("opaqueness").value = x; });
  number("mix", (x) => { element("mix").value = x; });
  number("input", (x) => press("beside", x !== 0));
  number("over", (x) => press("over", x !== 0));
  number("ui", (x) => document.body.classList.toggle("bare", x === 0));
  if (/^[0-9a-f]{6}$/i.test(given.get("bg") ?? "")) element("background").value = `#${given.get("bg")}`;
  stale = true;
}

function draw() {
  const first = viewer.panes[0].gaussians;
  element("time").value = Math.floor(state.frame);
  element("frame").textContent = `${Math.floor(state.frame) + 1} / ${frames()}`;
  for (const pane of viewer.panes) pane.draw(Math.floor(state.frame + 1e-6) / first.fps);
  viewer.draws++;
  stale = false;
}

let last = 0, counted = { since: 0, draws: 0 };
function step(now) {
  const elapsed = Math.min(0.25, (now - last) / 1000);
  last = now;
  if (state.playing) {
    const before = Math.floor(state.frame);
    goTo(state.frame + elapsed * viewer.panes[0].gaussians.fps * Number(element("speed").value));
    stale = state.turning || state.record || before !== Math.floor(state.frame);
  }
  if (state.turning) turn(elapsed * 60, 0);
  if (stale || state.record) draw();
  if (now - counted.since > 1000) {
    const rate = (viewer.draws - counted.draws) * 1000 / (now - counted.since);
    element("rate").textContent = `${rate.toFixed(0)} drawn/s`;
    counted = { since: now, draws: viewer.draws };
  }
  requestAnimationFrame(step);
}

async function start() {
  if (!("DecompressionStream" in window)) throw Error("this browser has no DecompressionStream: take one of 2023 or later");
  const { objects } = JSON.parse(element("objects").textContent);
  for (const object of objects) viewer.panes.push(await Pane.make(object));
  if (!viewer.panes.length) throw Error("there is nothing in this page");
  document.title = `${viewer.panes.map((pane) => pane.name).join(", ")} - fourdstar_jax`;
  element("time").max = frames() - 1;
  element("message").textContent = "";
  listen();
  play(state.playing);
  readAddress();
  draw();
  viewer.ready = true;
  requestAnimationFrame((now) => { last = now; step(now); });
}

window.viewer = viewer;
start().catch((error) => { element("message").textContent = `Cannot show this: ${error.message}`; });
