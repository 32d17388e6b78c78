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
//! trace.state("version", "1.2")?;                               // and source_commit, compiler, flags
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

use std::fmt::{Debug, Write as _};
use std::io::{Error, ErrorKind, Result, Write as _};
use std::path::{Path, PathBuf};

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
    head: String,
    engine: String,
    passes: Vec<String>,
    n_tokens: usize,
    pass: Option<Pass>,
}

#[derive(Default)]
struct Pass {
    token_ids: Vec<u32>,
    header: Vec<String>,
    taps: Vec<String>,
    data: Vec<u8>,
}

fn misuse<T>(why: &str) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidInput, why))
}

fn printable(c: char) -> bool {
    (' '..='~').contains(&c)
}

/// Lists, and texts without control characters, are written in JSON as Rust writes them.
fn json(value: impl Debug) -> String {
    format!("{value:?}")
}

impl TraceWriter {
    /// Make `directory`, which must not exist, and state engine, model and the token ids that are fed first.
    pub fn create(directory: impl AsRef<Path>, engine: &str, model: &Model, prompt_ids: &[u32]) -> Result<Self> {
        if engine.chars().any(|c| !printable(c)) || prompt_ids.is_empty() {
            return misuse("the engine's name is not printable ASCII, or the prompt has no tokens");
        }
        std::fs::create_dir(&directory)?;
        let mut head = String::from("{\"format\": \"crossval-trace\", \"format_version\": 1,");
        head += "\n \"model\": {";
        let numbers = [
            ("n_layers", model.n_layers),
            ("n_heads", model.n_heads),
            ("n_kv_heads", model.n_kv_heads),
            ("head_dim", model.head_dim),
            ("dim", model.dim),
            ("hidden_dim", model.hidden_dim),
            ("vocab_size", model.vocab_size),
        ];
        for (name, number) in numbers {
            let _ = write!(head, "\"{name}\": {number}, ");
        }
        let _ = write!(head, "\"sha256\": {}}},\n \"prompt\": {{\"token_ids\": ", json(&model.sha256));
        head += &json(prompt_ids);
        let directory = directory.as_ref().to_path_buf();
        let engine = json(engine);
        Ok(TraceWriter { directory, head, engine, passes: Vec::new(), n_tokens: 0, pass: None })
    }

    /// State a fact of the build, before the first pass: "version", "source_commit", "compiler" or "flags".
    pub fn state(&mut self, fact: &str, value: &str) -> Result<()> {
        if self.pass.is_some() || !self.passes.is_empty() || (fact.to_owned() + value).chars().any(|c| !printable(c)) {
            return misuse("a fact comes before the first pass, in printable ASCII");
        }
        let _ = write!(self.engine, ", {}: {}", json(fact), json(value));
        Ok(())
    }

    /// Begin the next pass: one call of the engine, with the tokens that follow those of the passes before it.
    pub fn begin_pass(&mut self, token_ids: &[u32]) -> Result<()> {
        if self.pass.is_some() || token_ids.is_empty() {
            return misuse("a pass begins inside another, or has no tokens");
        }
        self.pass = Some(Pass { token_ids: token_ids.to_vec(), ..Pass::default() });
        Ok(())
    }

    /// Write one tensor of all tokens of the pass; its shape is in docs/trace-format.md. `None`: of no layer.
    pub fn tap(&mut self, layer: Option<usize>, name: &str, data: &[f32], shape: &[usize]) -> Result<()> {
        self.tap_from(0, layer, name, data, shape)
    }

    /// The same for the tokens from `first` (0: the pass's first) to the last of the pass.
    pub fn tap_from(
        &mut self, first: usize, layer: Option<usize>, name: &str, data: &[f32], shape: &[usize],
    ) -> Result<()> {
        let number = self.passes.len();
        let Some(pass) = &mut self.pass else { return misuse("a tap outside a pass") };
        if first >= pass.token_ids.len() || data.is_empty() || shape.iter().product::<usize>() != data.len() {
            return misuse(&format!("{name}: {} values, shape {shape:?}, first token {first}", data.len()));
        }
        let name = layer.map_or(name.to_string(), |layer| format!("blk.{layer}.{name}"));
        let (start, shape) = (pass.data.len(), json(shape));
        data.iter().for_each(|value| pass.data.extend(value.to_le_bytes()));
        let format = format!("\"dtype\": \"F32\", \"shape\": {shape}");
        let end = pass.data.len();
        pass.header.push(format!("\"p{number}.{name}\": {{{format}, \"data_offsets\": [{start}, {end}]}}"));
        let rows: Vec<usize> = (first..pass.token_ids.len()).collect();
        let rows = if first > 0 { format!(", \"rows\": {rows:?}") } else { String::new() };
        pass.taps.push(format!("\n   {{\"name\": \"{name}\", {format}{rows}}}"));
        Ok(())
    }

    /// Write the pass file.
    pub fn end_pass(&mut self) -> Result<()> {
        let Some(pass) = self.pass.take() else { return misuse("no pass was begun") };
        if pass.taps.is_empty() {
            return misuse("a pass has no taps");
        }
        let header = format!("{{{}}}", pass.header.join(", "));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(pass.data);
        let file = format!("pass-{:04}.safetensors", self.passes.len());
        std::fs::write(self.directory.join(&file), &bytes)?;
        let kind = if self.n_tokens > 0 && pass.token_ids.len() == 1 { "decode" } else { "prefill" };
        self.passes.push(format!(
            "\n  {{\"kind\": \"{kind}\", \"start\": {}, \"token_ids\": {:?}, \"file\": \"{file}\", \
             \"sha256\": \"{}\",\n   \"taps\": [{}]}}",
            self.n_tokens,
            pass.token_ids,
            sha256(&bytes),
            pass.taps.join(",")
        ));
        self.n_tokens += pass.token_ids.len();
        Ok(())
    }

    /// Write `trace.json`, which makes the directory a trace.
    pub fn close(self) -> Result<()> {
        if self.pass.is_some() || self.passes.is_empty() {
            return misuse("closed inside a pass, or before the first");
        }
        let part = self.directory.join("trace.json.part");
        let mut file = std::fs::File::create(&part)?;
        let engine = format!("\"engine\": {{\"name\": {}}}", self.engine);
        write!(file, "{}}},\n {engine},\n \"passes\": [{}]}}\n", self.head, self.passes.join(","))?;
        file.sync_all()?;
        std::fs::rename(part, self.directory.join("trace.json"))
    }
}
