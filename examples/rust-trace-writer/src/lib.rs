//! Write what an engine computes as a trace for `crossval` (docs/trace-format.md); std only.
//!
//! ```no_run
//! use trace_writer::{sha256, Model, TraceWriter};
//! # fn main() -> std::io::Result<()> {
//! # let (prompt, x, q, logits) = (vec![1u32; 8], vec![0f32; 8 * 256], vec![0f32; 8 * 256], vec![0f32; 1024]);
//! let model = Model {
//!     sha256: sha256(&std::fs::read("model.gguf")?),
//!     n_layers: 4, n_heads: 4, n_kv_heads: 2, head_dim: 64, dim: 256, hidden_dim: 640, vocab_size: 1024,
//! };
//! let mut trace = TraceWriter::create("my-trace", "my engine", &model, &prompt)?;
//! trace.state("version", "1.2");                                // and source_commit, compiler, flags
//! trace.begin_pass(&prompt)?;                                   // the prompt; then one pass per decoded token
//! trace.tap(None, "inp_embd", &x, &[prompt.len(), 256])?;
//! trace.tap(Some(0), "q", &q, &[prompt.len(), 4, 64])?;         // blk.0.q
//! trace.tap_from(prompt.len() - 1, None, "result_output", &logits, &[1, 1024])?; // the last token only
//! trace.end_pass()?;
//! trace.close()
//! # }
//! ```
//!
//! Call `tap` when a tensor has been computed, before its buffer is reused or changed in place. One pass is in
//! memory at a time. `trace.json` comes last: without it the directory is not a trace.

use std::io::{Error, ErrorKind, Result};
use std::{fs, path::PathBuf};

mod sha256;
pub use sha256::sha256;

/// The model file's digest (of the GGUF file) and shape.
pub struct Model {
    pub sha256: String,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub dim: usize,
    pub hidden_dim: usize,
    pub vocab_size: usize,
}

/// A trace being written.
pub struct TraceWriter {
    directory: PathBuf,
    head: String, // of trace.json
    passes: Vec<String>,
    n_tokens: usize, // in these
    pass: Pass,
}

#[derive(Default)]
struct Pass {
    token_ids: Vec<u32>, // none outside a pass
    header: Vec<String>,
    taps: Vec<String>,
    data: Vec<u8>,
}

fn check(good: bool, why: &str) -> Result<()> {
    good.then_some(()).ok_or_else(|| Error::new(ErrorKind::InvalidInput, why))
}

/// A text in JSON; control characters become spaces.
fn json(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace(char::is_control, " "))
}

impl TraceWriter {
    /// Make `directory`, which must not exist, and state engine, model and the token ids that are fed first.
    pub fn create(directory: impl Into<PathBuf>, engine: &str, model: &Model, prompt_ids: &[u32]) -> Result<Self> {
        let directory = directory.into();
        fs::create_dir(&directory)?;
        let Model { sha256, n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size } = model;
        let head = format!(
            r#"{{"format": "crossval-trace", "format_version": 1,
 "model": {{"sha256": "{sha256}", "n_layers": {n_layers}, "n_heads": {n_heads}, "n_kv_heads": {n_kv_heads},
  "head_dim": {head_dim}, "dim": {dim}, "hidden_dim": {hidden_dim}, "vocab_size": {vocab_size}}},
 "prompt": {{"token_ids": {prompt_ids:?}}},
 "engine": {{"name": {}"#,
            json(engine)
        );
        Ok(TraceWriter { directory, head, passes: Vec::new(), n_tokens: 0, pass: Pass::default() })
    }

    /// State a fact of the build: "version", "source_commit", "compiler" or "flags".
    pub fn state(&mut self, fact: &str, value: &str) {
        self.head += &format!(", {}: {}", json(fact), json(value));
    }

    /// Begin the next pass: one call of the engine, with the tokens that follow those of the passes before it.
    pub fn begin_pass(&mut self, token_ids: &[u32]) -> Result<()> {
        let good = self.pass.token_ids.is_empty() && !token_ids.is_empty();
        check(good, "a pass begins inside another, or has no tokens")?;
        self.pass.token_ids = token_ids.to_vec();
        Ok(())
    }

    /// Record one tensor of all tokens of the pass; its shape is in docs/trace-format.md. `None`: of no layer.
    pub fn tap(&mut self, layer: Option<usize>, name: &str, data: &[f32], shape: &[usize]) -> Result<()> {
        self.tap_from(0, layer, name, data, shape)
    }

    /// The same for the tokens from `first` (0: the pass's first) to the last of the pass.
    pub fn tap_from(
        &mut self, first: usize, layer: Option<usize>, name: &str, data: &[f32], shape: &[usize],
    ) -> Result<()> {
        let (number, pass) = (self.passes.len(), &mut self.pass);
        let (n, count) = (pass.token_ids.len(), data.len());
        let name = layer.map_or(name.to_string(), |layer| format!("blk.{layer}.{name}"));
        let good = first < n && shape.iter().product::<usize>() == count;
        check(good, &format!("{name}: {count} values, shape {shape:?}, from token {first} of a pass of {n}"))?;
        let start = pass.data.len();
        pass.data.extend(data.iter().flat_map(|value| value.to_le_bytes()));
        let end = pass.data.len();
        let what = format!(r#""dtype": "F32", "shape": {shape:?}"#);
        let rows = if first > 0 { format!(r#", "rows": {:?}"#, Vec::from_iter(first..n)) } else { String::new() };
        pass.header.push(format!(r#""p{number}.{name}": {{{what}, "data_offsets": [{start}, {end}]}}"#));
        pass.taps.push(format!("\n   {{\"name\": \"{name}\", {what}{rows}}}"));
        Ok(())
    }

    /// Write the pass file.
    pub fn end_pass(&mut self) -> Result<()> {
        let pass = &self.pass;
        check(!pass.taps.is_empty(), "a pass ends that has no taps, or did not begin")?;
        let header = format!("{{{}}}", pass.header.join(", "));
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &pass.data].concat();
        let file = format!("pass-{:04}.safetensors", self.passes.len());
        fs::write(self.directory.join(&file), &bytes)?;
        let kind = if self.n_tokens > 0 && pass.token_ids.len() == 1 { "decode" } else { "prefill" };
        let (start, ids, digest, taps) = (self.n_tokens, &pass.token_ids, sha256(&bytes), pass.taps.join(","));
        self.passes.push(format!(
            r#"
  {{"kind": "{kind}", "start": {start}, "token_ids": {ids:?}, "file": "{file}", "sha256": "{digest}",
   "taps": [{taps}]}}"#
        ));
        self.n_tokens += pass.token_ids.len();
        self.pass = Pass::default();
        Ok(())
    }

    /// Write `trace.json`, which makes the directory a trace.
    pub fn close(self) -> Result<()> {
        let good = self.pass.token_ids.is_empty() && !self.passes.is_empty();
        check(good, "closed inside a pass, or before the first")?;
        let part = self.directory.join("trace.json.part");
        fs::write(&part, format!("{}}},\n \"passes\": [{}]}}\n", self.head, self.passes.join(",")))?;
        fs::rename(part, self.directory.join("trace.json"))
    }
}
