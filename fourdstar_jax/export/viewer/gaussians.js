// Moving Gaussians from their compact form (fourdstar_jax/export/compact.py says what it is).

const ROWS = 13;
const FLOATS = 16; // of a Gaussian in a frame: mean, -, covariance (6), -, -, colour, opacity

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

class MovingGaussians {
  static async decode(bytes) {
    if (new TextDecoder().decode(bytes.subarray(0, 4)) !== "4DG1") throw Error("not a 4DG1 file");
    const size = new DataView(bytes.buffer, bytes.byteOffset).getUint32(4, true);
    const about = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + size)));
    const stream = new Blob([bytes.subarray(8 + size)]).stream();
    const whole = stream.pipeThrough(new DecompressionStream("deflate"));
    return new MovingGaussians(about, new Uint8Array(await new Response(whole).arrayBuffer()));
  }

  constructor(about, raw) {
    const numbers = ROWS * about.timesteps * about.gaussians;
    if (raw.length !== 2 * numbers) throw Error("damaged data");
    this.about = about;
    this.count = about.gaussians;
    this.timesteps = about.timesteps;
    this.fps = about.fps;
    this.rows = new Int16Array(numbers);
    for (let i = 0; i < numbers; i++) {
      const folded = raw[i] | (raw[numbers + i] << 8);
      this.rows[i] = (folded >> 1) ^ -(folded & 1);
    }
    const { count, rows } = this;
    for (let row = 0; row < ROWS; row++) {
      const start = row * this.timesteps * count;
      for (let i = start + count; i < start + this.timesteps * count; i++) rows[i] += rows[i - count];
    }
  }

  // Those of a timestep that are seen, FLOATS each, at the start of `out`. Returns how many.
  frame(t, out) {
    const { about, rows, count } = this;
    const plane = this.timesteps * count;
    const doubling = Math.LN2 / about.scale_steps;
    let at = 0;
    for (let g = 0; g < count; g++) {
      const i = t * count + g;
      const opacity = rows[9 * plane + i] / about.opacity_steps;
      if (opacity === 0) continue;
      for (let k = 0; k < 3; k++)
        out[at + k] = about.origin[k] + about.position_step * rows[k * plane + i];
      const sx = about.extent * Math.exp(doubling * rows[3 * plane + i]);
      const sy = about.extent * Math.exp(doubling * rows[4 * plane + i]);
      const sz = about.extent * Math.exp(doubling * rows[5 * plane + i]);
      const x = rows[6 * plane + i] / about.rotation_steps;
      const y = rows[7 * plane + i] / about.rotation_steps;
      const z = rows[8 * plane + i] / about.rotation_steps;
      const w = Math.sqrt(Math.max(0, 1 - x * x - y * y - z * z));
      const a = (1 - 2 * (y * y + z * z)) * sx, b = 2 * (x * y - w * z) * sy, c = 2 * (x * z + w * y) * sz;
      const d = 2 * (x * y + w * z) * sx, e = (1 - 2 * (x * x + z * z)) * sy, f = 2 * (y * z - w * x) * sz;
      const h = 2 * (x * z - w * y) * sx, p = 2 * (y * z + w * x) * sy, q = (1 - 2 * (x * x + y * y)) * sz;
      out[at + 4] = a * a + b * b + c * c;
      out[at + 5] = a * d + b * e + c * f;
      out[at + 6] = a * h + b * p + c * q;
      out[at + 7] = d * d + e * e + f * f;
      out[at + 8] = d * h + e * p + f * q;
      out[at + 9] = h * h + p * p + q * q;
      const luma = rows[10 * plane + i] / about.color_steps;
      const orange = rows[11 * plane + i] / about.color_steps;
      const green = rows[12 * plane + i] / about.color_steps;
      out[at + 12] = Math.min(1, Math.max(0, luma - green + orange));
      out[at + 13] = Math.min(1, Math.max(0, luma + green));
      out[at + 14] = Math.min(1, Math.max(0, luma - green - orange));
      out[at + 15] = opacity;
      at += FLOATS;
    }
    return at / FLOATS;
  }
}
