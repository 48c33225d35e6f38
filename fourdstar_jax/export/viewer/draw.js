// Draws Gaussians as fourdstar_jax.rasterize does: EWA projection, 0.3 square pixels of blur,
// alpha = min(opacity exp(-sigma), 0.999), none below 1/255, blended in the order of camera z.

const ACROSS = 256; // Gaussians in a row of the texture that holds them
const NEAR = 0.01;

const SPLAT_VERTEX = `#version 300 es
precision highp float;
precision highp int;
precision highp sampler2D;
in uint which;
uniform sampler2D splats;
uniform mat4 view; // world to camera: x right, y down, z forward
uniform vec2 size; // of the picture, pixels
uniform float focal, scaling, opaqueness;
out vec2 at; // from the centre, standard deviations along the axes of the ellipse
flat out vec4 color;

void main() {
  ivec2 place = ivec2(4 * (int(which) % ${ACROSS}), int(which) / ${ACROSS});
  vec3 mean = texelFetch(splats, place, 0).xyz;
  vec4 first = texelFetch(splats, place + ivec2(1, 0), 0);
  vec2 second = texelFetch(splats, place + ivec2(2, 0), 0).xy;
  color = texelFetch(splats, place + ivec2(3, 0), 0);
  color.a = min(color.a * opaqueness, 1.0);
  vec3 p = (view * vec4(mean, 1.0)).xyz;
  gl_Position = vec4(2.0, 2.0, 2.0, 1.0); // outside
  if (p.z < ${NEAR} || color.a * 255.0 < 1.0) return;

  mat3 covariance = scaling * scaling * mat3(
    first.x, first.y, first.z, first.y, first.w, second.x, first.z, second.x, second.y);
  mat3 rows = transpose(mat3(view));
  vec2 slope = clamp(p.xy / p.z, -0.65 * size / focal, 0.65 * size / focal);
  vec3 across = focal / p.z * (rows[0] - slope.x * rows[2]);
  vec3 down = focal / p.z * (rows[1] - slope.y * rows[2]);
  float xx = dot(across, covariance * across) + 0.3;
  float xy = dot(across, covariance * down);
  float yy = dot(down, covariance * down) + 0.3;

  float middle = 0.5 * (xx + yy);
  float apart = length(vec2(0.5 * (xx - yy), xy));
  float large = middle + apart;
  vec2 axis = xx > yy ? vec2(large - yy, xy) : vec2(xy, large - xx);
  axis = apart < 1e-6 * middle ? vec2(1.0, 0.0) : normalize(axis);
  float reach = sqrt(2.0 * log(color.a * 255.0)) + 0.01;
  at = reach * (vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0);
  vec2 offset = at.x * sqrt(large) * axis
    + at.y * sqrt(max(middle - apart, 0.3)) * vec2(-axis.y, axis.x);
  vec2 pixel = focal * p.xy / p.z + offset; // from the middle of the picture
  gl_Position = vec4(2.0 * pixel / size * vec2(1.0, -1.0), 0.0, 1.0);
}`;

const SPLAT_FRAGMENT = `#version 300 es
precision highp float;
in vec2 at;
flat in vec4 color;
out vec4 result;

void main() {
  float alpha = min(color.a * exp(-0.5 * dot(at, at)), 0.999);
  if (alpha < 1.0 / 255.0) discard;
  result = vec4(color.rgb * alpha, alpha);
}`;

const WHOLE_VERTEX = `#version 300 es
void main() {
  gl_Position = vec4(4.0 * vec2(gl_VertexID & 1, gl_VertexID >> 1) - 1.0, 0.0, 1.0);
}`;

const WHOLE_FRAGMENT = `#version 300 es
precision highp float;
precision highp sampler2D;
uniform sampler2D splats, seen;
uniform vec3 background;
uniform vec2 size;
uniform float share; // of the input in the picture
out vec4 result;

void main() {
  vec4 drawn = texelFetch(splats, ivec2(gl_FragCoord.xy), 0);
  result = vec4(drawn.rgb + (1.0 - drawn.a) * background, 1.0);
  vec2 place = (gl_FragCoord.xy - 0.5 * size) / min(size.x, size.y) + 0.5;
  if (share > 0.0 && all(equal(place, clamp(place, 0.0, 1.0))))
    result.rgb = mix(result.rgb, texture(seen, place).rgb, share);
}`;

class Drawing {
  constructor(canvas, capacity) {
    this.canvas = canvas;
    const gl = canvas.getContext("webgl2", { alpha: false, antialias: false, depth: false });
    if (!gl) throw Error("this browser has no WebGL 2");
    this.gl = gl;
    // Sums of hundreds of faint Gaussians need more than 8 bits.
    this.format = gl.getExtension("EXT_color_buffer_float") ? gl.RGBA16F : gl.RGBA8;
    this.splatting = this.program(SPLAT_VERTEX, SPLAT_FRAGMENT);
    this.finishing = this.program(WHOLE_VERTEX, WHOLE_FRAGMENT);
    this.height = Math.max(1, Math.ceil(capacity / ACROSS));
    this.floats = new Float32Array(this.height * ACROSS * FLOATS);
    this.splats = this.texture(gl.RGBA32F, 4 * ACROSS, this.height);
    this.seen = this.texture(gl.RGBA8, 1, 1);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.LINEAR);
    this.order = new Uint32Array(capacity);
    this.keys = new Uint32Array(capacity);
    this.starts = new Uint32Array((1 << 16) + 1);
    this.count = 0;
    this.vertices = gl.createVertexArray();
    gl.bindVertexArray(this.vertices);
    this.orders = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.orders);
    gl.bufferData(gl.ARRAY_BUFFER, this.order.byteLength, gl.DYNAMIC_DRAW);
    const which = gl.getAttribLocation(this.splatting, "which");
    gl.enableVertexAttribArray(which);
    gl.vertexAttribIPointer(which, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(which, 1);
    this.none = gl.createVertexArray();
    this.target = null;
  }

  program(vertex, fragment) {
    const { gl } = this;
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw Error(gl.getShaderInfoLog(shader));
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw Error(gl.getProgramInfoLog(program));
    return program;
  }

  texture(format, width, height) {
    const { gl } = this;
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texStorage2D(gl.TEXTURE_2D, 1, format, width, height);
    for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER])
      gl.texParameteri(gl.TEXTURE_2D, name, gl.NEAREST);
    for (const name of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T])
      gl.texParameteri(gl.TEXTURE_2D, name, gl.CLAMP_TO_EDGE);
    return texture;
  }

  // Takes the Gaussians that `floats` begins with.
  load(count) {
    const { gl } = this;
    this.count = count;
    const rows = Math.ceil(count / ACROSS);
    gl.bindTexture(gl.TEXTURE_2D, this.splats);
    gl.texSubImage2D(
      gl.TEXTURE_2D, 0, 0, 0, 4 * ACROSS, rows, gl.RGBA, gl.FLOAT, this.floats);
  }

  // Takes the input's picture, which `draw` lays over its own.
  show(image) {
    const { gl } = this;
    gl.deleteTexture(this.seen);
    this.seen = this.texture(gl.RGBA8, image.naturalWidth, image.naturalHeight);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.LINEAR);
    gl.pixelStorei(gl.UNPACK_FLIP_Y_WEBGL, true);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, gl.RGBA, gl.UNSIGNED_BYTE, image);
    gl.pixelStorei(gl.UNPACK_FLIP_Y_WEBGL, false);
  }

  // The farthest first, of equal ones the last: a counting sort over 65,536 depths.
  sort(view) {
    const { floats, count, keys, starts, order } = this;
    let least = Infinity, most = -Infinity;
    for (let i = 0, at = 0; i < count; i++, at += FLOATS) {
      const z = view[2] * floats[at] + view[6] * floats[at + 1] + view[10] * floats[at + 2];
      if (z < least) least = z;
      if (z > most) most = z;
    }
    const factor = most > least ? 65535 / (most - least) : 0;
    starts.fill(0);
    for (let i = 0, at = 0; i < count; i++, at += FLOATS) {
      const z = view[2] * floats[at] + view[6] * floats[at + 1] + view[10] * floats[at + 2];
      keys[i] = 65535 - ((z - least) * factor | 0);
      starts[keys[i] + 1]++;
    }
    for (let key = 0; key < 65535; key++) starts[key + 1] += starts[key];
    for (let i = count - 1; i >= 0; i--) order[starts[keys[i]]++] = i;
  }

  resize(width, height) {
    const { gl, canvas } = this;
    if (this.target && canvas.width === width && canvas.height === height) return;
    canvas.width = width;
    canvas.height = height;
    if (this.target) {
      gl.deleteTexture(this.image);
      gl.deleteFramebuffer(this.target);
    }
    this.image = this.texture(this.format, width, height);
    this.target = gl.createFramebuffer();
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.target);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, this.image, 0);
  }

  draw({ view, fovDeg, scaling, opaqueness, background, share }) {
    const { gl, canvas } = this;
    const { width, height } = canvas;
    const set = (program, kind, name, ...values) =>
      gl[`uniform${kind}`](gl.getUniformLocation(program, name), ...values);
    gl.viewport(0, 0, width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.target);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (this.count) {
      this.sort(view);
      gl.useProgram(this.splatting);
      gl.bindVertexArray(this.vertices);
      gl.bindBuffer(gl.ARRAY_BUFFER, this.orders);
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, this.order, 0, this.count);
      gl.activeTexture(gl.TEXTURE0);
      gl.bindTexture(gl.TEXTURE_2D, this.splats);
      const focal = Math.min(width, height) / 2 / Math.tan(fovDeg * Math.PI / 360);
      set(this.splatting, "1i", "splats", 0);
      set(this.splatting, "Matrix4fv", "view", false, view);
      set(this.splatting, "2f", "size", width, height);
      set(this.splatting, "1f", "focal", focal);
      set(this.splatting, "1f", "scaling", scaling);
      set(this.splatting, "1f", "opaqueness", opaqueness);
      gl.enable(gl.BLEND);
      gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.count);
      gl.disable(gl.BLEND);
    }
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.useProgram(this.finishing);
    gl.bindVertexArray(this.none);
    gl.activeTexture(gl.TEXTURE1);
    gl.bindTexture(gl.TEXTURE_2D, this.seen);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, this.image);
    set(this.finishing, "1i", "splats", 0);
    set(this.finishing, "1i", "seen", 1);
    set(this.finishing, "2f", "size", width, height);
    set(this.finishing, "3f", "background", ...background);
    set(this.finishing, "1f", "share", share);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }
}

// World to camera, by columns, for a camera around the origin (fourdstar_jax.geometry.orbit_cameras).
function orbitView(azimuthDeg, elevationDeg, radius) {
  const az = azimuthDeg * Math.PI / 180, el = elevationDeg * Math.PI / 180;
  const [sa, ca, se, ce] = [Math.sin(az), Math.cos(az), Math.sin(el), Math.cos(el)];
  return new Float32Array([
    ca, -sa * se, -ce * sa, 0,
    0, -ce, se, 0,
    -sa, -ca * se, -ce * ca, 0,
    0, 0, radius, 1,
  ]);
}
