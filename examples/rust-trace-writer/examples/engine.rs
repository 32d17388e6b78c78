//! A complete BitNet b1.58 engine, with a trace for `crossval`: GGUF with I2_S matrices, a prompt, greedy tokens.
//! It shares no code with bitnet_py, crossval or bitnet.cpp. `--mistake` breaks one layer on purpose.
//!
//!     cargo run --release --example engine -- model.gguf my-trace 1019,277,271,220,17,10,17,30
//!     cargo run --release --example engine -- model.gguf my-trace 1019,277 --decode 4 --mistake silu --layer 2

use std::collections::HashMap;
use trace_writer::{sha256, Model, TraceWriter};

type Fault = Box<dyn std::error::Error>;
const MISTAKES: [&str; 3] = ["interleaved-rope", "no-attn-sub-norm", "silu"];

/// A GGUF file: numbers and texts by key, and tensors by name.
#[derive(Default)]
struct File {
    bytes: Vec<u8>,
    at: usize,
    numbers: HashMap<String, f64>,
    texts: HashMap<String, String>,
    tensors: HashMap<String, (Vec<usize>, u32, usize)>, // dimensions (the row's first), type, offset
}

impl File {
    fn open(path: &str) -> Result<File, Fault> {
        let mut f = File { bytes: std::fs::read(path)?, ..File::default() };
        if f.take(8)? != b"GGUF\x03\0\0\0" {
            return Err(format!("{path} is not a GGUF file of version 3").into());
        }
        let (n_tensors, n_values) = (f.number(8)?, f.number(8)?);
        for _ in 0..n_values {
            let key = f.text()?;
            let kind = f.number(4)?;
            f.value(&key, kind)?;
        }
        for _ in 0..n_tensors {
            let name = f.text()?;
            let n_dims = f.number(4)?;
            let dims = (0..n_dims).map(|_| Ok(f.number(8)? as usize)).collect::<Result<Vec<_>, Fault>>()?;
            let (kind, offset) = (f.number(4)? as u32, f.number(8)? as usize);
            f.tensors.insert(name, (dims, kind, offset));
        }
        let alignment = *f.numbers.get("general.alignment").unwrap_or(&32.0) as usize;
        let start = f.at.div_ceil(alignment) * alignment;
        f.tensors.values_mut().for_each(|tensor| tensor.2 += start);
        Ok(f)
    }

    fn take(&mut self, n: usize) -> Result<&[u8], Fault> {
        let part = self.bytes.get(self.at..self.at.saturating_add(n)).ok_or("the file ends too early")?;
        self.at += n;
        Ok(part)
    }

    fn number(&mut self, size: usize) -> Result<u64, Fault> {
        Ok(self.take(size)?.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn text(&mut self) -> Result<String, Fault> {
        let size = self.number(8)? as usize;
        Ok(String::from_utf8_lossy(self.take(size)?).into_owned())
    }

    fn value(&mut self, key: &str, kind: u64) -> Result<(), Fault> {
        match kind {
            8 => {
                let text = self.text()?;
                self.texts.insert(key.into(), text);
            }
            9 => {
                let (of, count) = (self.number(4)?, self.number(8)?);
                for _ in 0..count {
                    self.value(key, of)?;
                }
            }
            0..=12 => {
                let bits = self.number([1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind as usize])?;
                let number = match kind {
                    6 => f64::from(f32::from_bits(bits as u32)),
                    12 => f64::from_bits(bits),
                    _ => bits as f64,
                };
                self.numbers.insert(key.into(), number);
            }
            _ => return Err(format!("{key} has the unknown type {kind}").into()),
        }
        Ok(())
    }

    /// A ternary matrix as -1, 0, +1, or a float tensor; `scale` is 1 for the latter.
    fn tensor(&mut self, name: &str, n: usize) -> Result<Matrix, Fault> {
        let (dims, kind, offset) = self.tensors.get(name).ok_or_else(|| format!("no tensor {name}"))?.clone();
        if dims.iter().product::<usize>() != n {
            return Err(format!("{name} has the dimensions {dims:?}, not {n} values").into());
        }
        self.at = offset;
        let mut matrix = Matrix { cols: dims[0], values: vec![], codes: vec![], scale: 1.0 };
        match kind {
            0 => matrix.values = self.take(4 * n)?.chunks_exact(4).map(single).collect(),
            1 => matrix.values = self.take(2 * n)?.chunks_exact(2).map(half).collect(),
            36 => {
                // 128 weights of a row are 32 bytes; byte b holds weights b, b + 32, b + 64, b + 96, high bits first
                let packed = self.take(n / 4)?;
                let code = |w: usize| (packed[w / 128 * 32 + w % 32] >> (6 - 2 * (w % 128 / 32)) & 3) as i8 - 1;
                matrix.codes = (0..n).map(code).collect();
                matrix.scale = single(self.take(4)?);
            }
            _ => return Err(format!("{name}: only F32, F16 and I2_S are read, this is type {kind}").into()),
        }
        Ok(matrix)
    }
}

fn single(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn half(bytes: &[u8]) -> f32 {
    let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
    let (whole, power) = if exponent > 0 { (1024.0 + fraction, exponent - 25) } else { (fraction, -24) };
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    sign * whole * 2f32.powi(power)
}

struct Matrix {
    cols: usize,
    values: Vec<f32>,
    codes: Vec<i8>,
    scale: f32,
}

struct Engine {
    file: File,
    shape: Model,
    eps: f64,
    base: f64,
    mistake: String,
    broken: usize,
    weights: HashMap<String, Matrix>,
    cache: Vec<[Vec<f32>; 2]>, // keys and values of every layer
    trace: TraceWriter,
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn norm(x: &[f32], weight: &Matrix, eps: f64) -> Vec<f32> {
    let row = |x: &[f32]| {
        let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = (1.0 / (mean + eps).sqrt()) as f32;
        x.iter().zip(&weight.values).map(|(v, w)| v * factor * w).collect::<Vec<_>>()
    };
    x.chunks_exact(weight.cols).flat_map(row).collect()
}

fn bit_linear(x: &[f32], weight: &Matrix) -> Vec<f32> {
    let row = |x: &[f32]| {
        let scale = 127.0 / x.iter().fold(1e-5f32, |top, v| top.max(v.abs())); // the largest becomes 127
        let codes: Vec<i32> = x.iter().map(|v| (v * scale).round_ties_even() as i32).collect();
        let dot = |w: &[i8]| w.iter().zip(&codes).map(|(w, c)| i32::from(*w) * c).sum::<i32>();
        weight.codes.chunks_exact(weight.cols).map(|w| dot(w) as f32 / scale * weight.scale).collect::<Vec<_>>()
    };
    x.chunks_exact(weight.cols).flat_map(row).collect()
}

impl Engine {
    fn wrong(&self, layer: usize, mistake: &str) -> bool {
        self.broken == layer && self.mistake == mistake
    }

    fn weight(&self, layer: usize, name: &str) -> &Matrix {
        &self.weights[&format!("blk.{layer}.{name}.weight")]
    }

    fn load(&mut self) -> Result<(), Fault> {
        let s = &self.shape;
        let (dim, hidden, kv) = (s.dim, s.hidden_dim, s.n_kv_heads * s.head_dim);
        let table = ("token_embd.weight".to_string(), s.vocab_size * dim);
        let mut wanted = vec![table, ("output_norm.weight".to_string(), dim)];
        for layer in 0..s.n_layers {
            #[rustfmt::skip]
            let parts = [
                ("attn_norm", dim), ("attn_sub_norm", dim), ("ffn_norm", dim), ("ffn_sub_norm", hidden),
                ("attn_q", dim * dim), ("attn_k", kv * dim), ("attn_v", kv * dim), ("attn_output", dim * dim),
                ("ffn_gate", hidden * dim), ("ffn_up", hidden * dim), ("ffn_down", dim * hidden),
            ];
            wanted.extend(parts.map(|(part, n)| (format!("blk.{layer}.{part}.weight"), n)));
        }
        for (name, n) in wanted {
            let matrix = self.file.tensor(&name, n)?;
            self.weights.insert(name, matrix);
        }
        Ok(())
    }

    fn rope(&self, layer: usize, x: &mut [f32], heads: usize, start: usize) {
        let (size, pairs) = (self.shape.head_dim, self.shape.head_dim / 2);
        for (at, head) in x.chunks_exact_mut(size).enumerate() {
            for i in 0..pairs {
                let angle = (start + at / heads) as f64 * self.base.powf(-2.0 * i as f64 / size as f64);
                let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
                let wrong = self.wrong(layer, "interleaved-rope");
                let (a, b) = if wrong { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
            }
        }
    }

    fn attention(&mut self, layer: usize, x: &[f32], start: usize) -> Result<Vec<f32>, Fault> {
        let (dim, heads, kv_heads, size) =
            (self.shape.dim, self.shape.n_heads, self.shape.n_kv_heads, self.shape.head_dim);
        let (n, kv) = (x.len() / dim, kv_heads * size);
        let n_kv = start + n;
        let normed = norm(x, self.weight(layer, "attn_norm"), self.eps);
        self.trace.tap(Some(layer), "attn_norm", &normed, &[n, dim])?;
        let mut q = bit_linear(&normed, self.weight(layer, "attn_q"));
        let mut k = bit_linear(&normed, self.weight(layer, "attn_k"));
        let v = bit_linear(&normed, self.weight(layer, "attn_v"));
        self.trace.tap(Some(layer), "q", &q, &[n, heads, size])?;
        self.trace.tap(Some(layer), "k", &k, &[n, kv_heads, size])?;
        self.trace.tap(Some(layer), "v", &v, &[n, kv_heads, size])?;
        self.rope(layer, &mut q, heads, start);
        self.rope(layer, &mut k, kv_heads, start);
        self.trace.tap(Some(layer), "q_rope", &q, &[n, heads, size])?;
        self.trace.tap(Some(layer), "k_rope", &k, &[n, kv_heads, size])?;
        self.cache[layer][0].extend(k);
        self.cache[layer][1].extend(v);
        let [keys, values] = &self.cache[layer];
        let (mut scores, mut weights) = (vec![0f32; heads * n * n_kv], vec![0f32; heads * n * n_kv]);
        let mut joined = vec![0f32; n * dim];
        for head in 0..heads {
            let of = head / (heads / kv_heads) * size;
            for row in 0..n {
                let (place, seen) = ((head * n + row) * n_kv, start + row + 1);
                let from = &q[row * dim + head * size..][..size];
                // Those after the token are recorded, and not used.
                let all: Vec<f64> = (0..n_kv).map(|key| dot(from, &keys[key * kv + of..])).collect();
                let scaled: Vec<f64> = all[..seen].iter().map(|v| v / (size as f64).sqrt()).collect();
                let top = scaled.iter().fold(f64::NEG_INFINITY, |top, v| top.max(*v));
                let sum: f64 = scaled.iter().map(|v| (v - top).exp()).sum();
                scores[place..][..n_kv].iter_mut().zip(&all).for_each(|(to, v)| *to = *v as f32);
                let weigh = |v: &f64| ((v - top).exp() / sum) as f32;
                weights[place..].iter_mut().zip(&scaled).for_each(|(to, v)| *to = weigh(v));
                for i in 0..size {
                    let part = |key: usize| f64::from(weights[place + key]) * f64::from(values[key * kv + of + i]);
                    joined[row * dim + head * size + i] = (0..seen).map(part).sum::<f64>() as f32;
                }
            }
        }
        self.trace.tap(Some(layer), "kq", &scores, &[heads, n, n_kv])?;
        self.trace.tap(Some(layer), "kq_soft_max", &weights, &[heads, n, n_kv])?;
        self.trace.tap(Some(layer), "kqv_out", &joined, &[n, dim])?;
        if !self.wrong(layer, "no-attn-sub-norm") {
            joined = norm(&joined, self.weight(layer, "attn_sub_norm"), self.eps);
        }
        self.trace.tap(Some(layer), "attn_sub_norm", &joined, &[n, dim])?;
        let out = bit_linear(&joined, self.weight(layer, "attn_output"));
        self.trace.tap(Some(layer), "attn_o_out", &out, &[n, dim])?;
        Ok(out)
    }

    fn feed_forward(&mut self, layer: usize, x: &[f32]) -> Result<Vec<f32>, Fault> {
        let (dim, hidden, silu) = (self.shape.dim, self.shape.hidden_dim, self.wrong(layer, "silu"));
        let n = x.len() / dim;
        let normed = norm(x, self.weight(layer, "ffn_norm"), self.eps);
        self.trace.tap(Some(layer), "ffn_norm", &normed, &[n, dim])?;
        let mut gate = bit_linear(&normed, self.weight(layer, "ffn_gate"));
        let up = bit_linear(&normed, self.weight(layer, "ffn_up"));
        self.trace.tap(Some(layer), "ffn_gate", &gate, &[n, hidden])?;
        self.trace.tap(Some(layer), "ffn_up", &up, &[n, hidden])?;
        gate.iter_mut().for_each(|g| *g = if silu { *g / (1.0 + (-*g).exp()) } else { g.max(0.0).powi(2) });
        self.trace.tap(Some(layer), "ffn_act", &gate, &[n, hidden])?;
        gate.iter_mut().zip(&up).for_each(|(g, u)| *g *= u);
        self.trace.tap(Some(layer), "ffn_out", &gate, &[n, hidden])?;
        let gate = norm(&gate, self.weight(layer, "ffn_sub_norm"), self.eps);
        self.trace.tap(Some(layer), "ffn_sub_norm", &gate, &[n, hidden])?;
        let out = bit_linear(&gate, self.weight(layer, "ffn_down"));
        self.trace.tap(Some(layer), "ffn_down", &out, &[n, dim])?;
        Ok(out)
    }

    /// Run one pass and return the best next token.
    fn forward(&mut self, ids: &[u32], start: usize) -> Result<u32, Fault> {
        let (dim, n) = (self.shape.dim, ids.len());
        let table = &self.weights["token_embd.weight"].values;
        let mut x: Vec<f32> = ids.iter().flat_map(|id| &table[*id as usize * dim..][..dim]).copied().collect();
        self.trace.begin_pass(ids)?;
        self.trace.tap(None, "inp_embd", &x, &[n, dim])?;
        for layer in 0..self.shape.n_layers {
            let added = self.attention(layer, &x, start)?;
            x.iter_mut().zip(added).for_each(|(x, a)| *x += a);
            self.trace.tap(Some(layer), "ffn_inp", &x, &[n, dim])?;
            let added = self.feed_forward(layer, &x)?;
            x.iter_mut().zip(added).for_each(|(x, a)| *x += a);
            self.trace.tap(Some(layer), "l_out", &x, &[n, dim])?;
        }
        let last = norm(&x[(n - 1) * dim..], &self.weights["output_norm.weight"], self.eps);
        self.trace.tap_from(n - 1, None, "result_norm", &last, &[1, dim])?;
        let table = &self.weights["token_embd.weight"].values;
        let logits: Vec<f32> = table.chunks_exact(dim).map(|row| dot(row, &last) as f32).collect();
        self.trace.tap_from(n - 1, None, "result_output", &logits, &[1, logits.len()])?;
        self.trace.end_pass()?;
        Ok((0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32)
    }
}

fn main() -> Result<(), Fault> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, ids, options @ ..] = words.as_slice() else {
        return Err("usage: engine MODEL TRACE_DIR ID,ID,... [--decode N] [--mistake NAME --layer N]".into());
    };
    let given: HashMap<&str, &str> = options.chunks_exact(2).map(|o| (o[0].as_str(), o[1].as_str())).collect();
    let option = |name: &str, default| given.get(name).map_or(Ok(default), |text| text.parse::<usize>());
    let mistake = given.get("--mistake").copied().unwrap_or("");
    if !mistake.is_empty() && !MISTAKES.contains(&mistake) {
        return Err(format!("unknown mistake {mistake}; there are {MISTAKES:?}").into());
    }
    let prompt = ids.split([',', ' ']).map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    let file = File::open(model)?;
    let arch = file.texts.get("general.architecture").cloned().unwrap_or_default();
    if arch != "bitnet-b1.58" && arch != "bitnet-25" {
        return Err(format!("{arch} is not squared-ReLU BitNet").into());
    }
    let number = |key: &str| file.numbers.get(&format!("{arch}.{key}")).copied().ok_or(format!("no {key}"));
    let (dim, n_heads) = (number("embedding_length")? as usize, number("attention.head_count")? as usize);
    let vocab_size = file.tensors.get("token_embd.weight").ok_or("no embedding")?.0[1];
    if prompt.iter().any(|id| *id as usize >= vocab_size) {
        return Err("a token is outside the vocabulary".into());
    }
    let (eps, base) = (number("attention.layer_norm_rms_epsilon")?, number("rope.freq_base")?);
    let shape = Model {
        sha256: sha256(&file.bytes),
        n_layers: number("block_count")? as usize,
        n_heads,
        n_kv_heads: number("attention.head_count_kv")? as usize,
        head_dim: dim / n_heads,
        dim,
        hidden_dim: number("feed_forward_length")? as usize,
        vocab_size,
    };
    let mut trace = TraceWriter::create(out, "Rust engine", &shape, &prompt)?;
    trace.state("version", env!("CARGO_PKG_VERSION"));
    let cache = vec![[vec![], vec![]]; shape.n_layers];
    let (mistake, broken) = (mistake.to_string(), option("--layer", 0)?);
    let mut engine = Engine { file, shape, eps, base, mistake, broken, weights: HashMap::new(), cache, trace };
    engine.load()?;
    let mut next = engine.forward(&prompt, 0)?;
    for i in 0..option("--decode", 4)? {
        println!("{next}");
        next = engine.forward(&[next], prompt.len() + i)?;
    }
    Ok(engine.trace.close()?)
}
